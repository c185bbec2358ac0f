"""A training loop that can be forked, with what it leaves behind: loss, norms and rate of each step."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from plants import Plant
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

COLUMNS = ("step", "loss", "grad_norm", "update_norm", "lr")

LOST_AFTER = 3
"""A run is given up after so many losses in a row that are not finite."""


class Watcher:
    """What watches a run or acts on it, called where a loop would call it; this base class does nothing."""

    def before_forward(self, step: int, batch: Any) -> None:
        pass

    def before_step(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Called with the loss and the norm before clipping, when the gradients are there."""

    def after_step(self, step: int) -> None:
        pass


@dataclass
class Loop:
    """A run in progress.

    Attributes:
        model: The network.
        optimizer: The optimizer.
        loss_fn: Mean loss of a batch.
        rate: Returns the rate of a step.
        plant: What goes wrong.
        watcher: What watches.
        rows: A row of ``COLUMNS`` for each step; the gradient norm is that before clipping, as loops log it.
        validated: Validation loss by the number of steps taken.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss_fn: Callable[[nn.Module, Any], Tensor]
    rate: Callable[[int], float]
    plant: Plant = field(default_factory=Plant)
    watcher: Watcher = field(default_factory=Watcher)
    rows: list[tuple[float, ...]] = field(default_factory=list)
    validated: dict[int, float] = field(default_factory=dict)
    lost: int = 0

    @property
    def curve(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows, columns=list(COLUMNS)).astype({"step": int})

    @property
    def given_up(self) -> bool:
        return self.lost >= LOST_AFTER

    def fork(self, plant: Plant) -> "Loop":
        """Returns a run that goes on from here with a plant."""
        model, optimizer = copy.deepcopy((self.model, self.optimizer))
        rows, validated = list(self.rows), dict(self.validated)
        return Loop(model, optimizer, self.loss_fn, self.rate, plant, Watcher(), rows, validated)

    def step(self, step: int, batch: Any) -> None:
        """Takes a step and notes it."""
        batch = self.plant.batch(step, batch)
        self.plant.prepare(step, self.model)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step) * self.plant.rate(step)
        self.watcher.before_forward(step, batch)
        loss = self.loss_fn(self.model, batch)
        loss.backward()
        parameters = list(self.model.parameters())
        grad_norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        if (most := self.plant.max_norm(step)) is not None:
            clip_grads_with_norm_(parameters, most, grad_norm)
        start = [p.detach().clone() for p in parameters]
        self.watcher.before_step(loss.detach(), grad_norm)
        self.optimizer.step()
        self.watcher.after_step(step)
        update_norm = get_total_norm([p.detach() - x for p, x in zip(parameters, start, strict=True)])
        found = float(loss.detach()), float(grad_norm), float(update_norm)
        self.rows.append((step, *found, self.optimizer.param_groups[0]["lr"]))
        self.optimizer.zero_grad()
        self.lost = 0 if math.isfinite(found[0]) else self.lost + 1

    def validate(self, taken: int, batch: Any) -> None:
        with torch.no_grad():
            self.validated[taken] = float(self.loss_fn(self.model, batch))
