"""One run: a workload at a rate, from a seed, under one way of clipping."""

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from statistics import fmean, median
from typing import Any

import torch
from tasks import Batch, Data, Task
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from workloads import Kind, Workload

NUM_EVALUATIONS = 10
"""Evenly spaced evaluations of a run; the best of them is ``best``."""

TAIL, TAIL_STEP = 5, 0.02
"""``tail`` is the mean of ``TAIL`` evaluations that are this share of the run apart."""

LOST_AFTER = 20
"""A run is given up after so many losses in a row that are not finite."""

SCALE_STEPS = 20
"""Number of steps whose median length sets the scale of the oracle's grid."""


class Clipper:
    """What happens between the backward pass and the step, and after the step; this base class does nothing."""

    clipped = 0
    longest_step = math.nan
    reason = ""
    probe_gradients = 0

    def observe(self, batch: Batch) -> None:
        """Called before the forward pass."""

    def before(self) -> None:
        """Called when the gradients are there."""

    def after(self) -> None:
        """Called after the step."""

    def finish(self) -> None:
        """Called after the run, before the results are read."""


@dataclass
class Loop:
    """A run that has been set up, as a clipper sees it."""

    workload: Workload
    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    lr: float
    seed: int
    steps: int
    schedulers: list[LRScheduler]
    loss: float = math.nan

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.model.parameters())

    @property
    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    @property
    def steady_rate(self) -> float:
        """Length of the step that equal gradients add up to, per norm of the gradient."""
        return self.lr * self.workload.gain


@dataclass(frozen=True)
class Arm:
    """A way of clipping.

    Attributes:
        attach: Makes the clipper of a run.
        optimizers: Makes the optimizers from workload, network and rate; None: the workload's own.
        kinds: Kinds of optimizers that the arm applies to.
        rate: Returns the factor for the rate, given the run at the whole rate.
    """

    attach: Callable[[Loop], Clipper]
    optimizers: Callable[[Workload, nn.Module, float], list[torch.optim.Optimizer]] | None = None
    kinds: tuple[Kind, ...] = ("sgd", "adamw", "muon")
    rate: Callable[[Workload, float, int, int], float] | None = None


def data_of(workload: Workload) -> Data:
    return _data_of(workload.task)


@cache
def _data_of(task: Task) -> Data:
    return task.data()


def set_up(workload: Workload, lr: float, seed: int, arm: Arm, steps: int) -> Loop:
    """Returns a run from the initial weights that every arm has at this seed."""
    if arm.rate is not None:
        lr *= arm.rate(workload, lr, seed, steps)
    torch.manual_seed(seed)
    model = workload.task.model()
    optimizers = (arm.optimizers or Workload.optimizers)(workload, model, lr)
    return Loop(workload, model, optimizers, lr, seed, steps, workload.schedulers(optimizers, steps))


def step(loop: Loop, clipper: Clipper, batch: Batch) -> float:
    """Takes one step and returns the training loss before the step."""
    clipper.observe(batch)
    loss = loop.workload.task.loss_fn(loop.model, batch)
    loop.loss = float(loss.detach())
    loss.backward()
    clipper.before()
    for optimizer in loop.optimizers:
        optimizer.step()
    clipper.after()
    loop.model.zero_grad()
    for scheduler in loop.schedulers:
        scheduler.step()
    return loop.loss


def validate(loop: Loop) -> float:
    # A schedule-free optimizer trains at other weights than those that it offers for use.
    switched = [loop.model, *(optimizer for optimizer in loop.optimizers if hasattr(optimizer, "eval"))]
    for each in switched:
        each.eval()
    with torch.no_grad():
        loss = float(loop.workload.task.loss_fn(loop.model, data_of(loop.workload).validation))
    for each in switched:
        each.train()
    return loss


def evaluation_steps(steps: int) -> tuple[list[int], list[int]]:
    """Returns after how many steps to evaluate, and which of these evaluations make up the tail."""
    spaced = [round(steps * i / NUM_EVALUATIONS) for i in range(1, NUM_EVALUATIONS + 1)]
    apart = max(1, round(TAIL_STEP * steps))
    tail = [steps - i * apart for i in reversed(range(TAIL)) if steps - i * apart > 0]
    return sorted({*spaced, *tail}), tail


def train(workload: Workload, lr: float, seed: int, arm: Arm, steps: int) -> dict[str, Any]:
    """Trains and returns the results of a run; order of data and initial weights depend only on the seed."""
    began = time.process_time()
    loop = set_up(workload, lr, seed, arm, steps)
    clipper = arm.attach(loop)
    initial = validate(loop)
    evaluate, tail = evaluation_steps(steps)
    found: dict[int, float] = {}
    taken = lost = 0
    for batch in itertools.islice(data_of(workload).batches(seed + 1), steps):
        loss = step(loop, clipper, batch)
        taken += 1
        lost = 0 if math.isfinite(loss) else lost + 1
        if lost == LOST_AFTER:
            break
        if taken in evaluate:
            found[taken] = validate(loop)
    clipper.finish()
    final = found.get(steps, math.nan)
    return {
        "initial": initial,
        "final": final,
        "tail": fmean(found.get(i, math.nan) for i in tail),
        "best": min((loss for loss in found.values() if math.isfinite(loss)), default=math.nan),
        "diverged": not final <= initial,
        "clip_share": clipper.clipped / taken,
        "probe_gradients": clipper.probe_gradients,
        "train_gradients": taken,
        "seconds": time.process_time() - began,
        "longest_step": clipper.longest_step,
        "reason": clipper.reason,
    }


@cache
def typical_step(workload: Workload) -> float:
    """Returns the median length of the first steps at the smallest rate, if equal gradients added up [x]."""
    workload = replace(workload, schedule="constant")
    loop = set_up(workload, workload.safe_rate, 0, Arm(lambda loop: Clipper()), SCALE_STEPS)
    lengths = Lengths(loop)
    for batch in itertools.islice(data_of(workload).batches(1), SCALE_STEPS):
        step(loop, lengths, batch)
    return median(lengths.found)


class Lengths(Clipper):
    """Records the lengths of steps: under SGD from the gradient, under AdamW from the update itself."""

    def __init__(self, loop: Loop) -> None:
        self.loop, self.found = loop, []
        self.start: list[Tensor] = []

    def before(self) -> None:
        if self.loop.workload.kind == "sgd":
            self.found.append(self.loop.steady_rate * float(torch.nn.utils.get_total_norm(self.loop.gradients)))
        else:
            self.start = [p.detach().clone() for p in self.loop.parameters]

    def after(self) -> None:
        if self.start:
            moved = [p.detach() - x for p, x in zip(self.loop.parameters, self.start, strict=True)]
            self.found.append(float(torch.nn.utils.get_total_norm(moved)))
