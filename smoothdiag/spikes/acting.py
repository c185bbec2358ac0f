"""Acting: what a guard does at a spike, before the optimizer steps."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from smoothdiag.adapters.skipping import DeviceSkip, HiddenGradients, skips_on_device
from smoothdiag.autoclip.buckets import gradient_norm, multiply_gradients

Action = Literal["log", "skip", "clip"]

DONE = {"log": "logged", "skip": "skipped", "clip": "clipped"}
"""What an event says was done."""


class Acting(Protocol):
    """What to do with a step that begins."""

    def before(self, spiked: Tensor, target: Tensor) -> None:
        """Acts before the step.

        Args:
            spiked: A 0-dim bool: whether to act.
            target: The norm that a long gradient is clipped to.
        """
        ...

    def after(self) -> None:
        """Puts back what the step needed no longer; also if the step has failed."""
        ...


class Log:
    """Does nothing."""

    def before(self, spiked: Tensor, target: Tensor) -> None:
        """Does nothing."""

    def after(self) -> None:
        """Does nothing."""


class Skip:
    """Leaves out the step: parameters, moments and step counts stay as they are.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._undo: DeviceSkip | HiddenGradients | None = None

    def before(self, spiked: Tensor, target: Tensor) -> None:
        """Tells the optimizer; waits for the device if it has to hide the gradients."""
        if skips_on_device(self._optimizer):
            self._undo = DeviceSkip(self._optimizer, spiked)
        elif bool(spiked):
            self._undo = HiddenGradients(self._optimizer)

    def after(self) -> None:
        """Leaves optimizer and gradients as they were."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo.end()


class Clip:
    """Scales long gradients to what is usual, and makes a gradient zero that is not finite.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def before(self, spiked: Tensor, target: Tensor) -> None:
        """Scales the gradients on their device."""
        if spiked.device.type == "cpu" and not spiked:
            return
        # The loop may have clipped already, and shown the norm before that.
        norm = gradient_norm(self._optimizer)
        if norm is None:
            return
        wanted = (target.to(norm.dtype) / norm).clamp(max=1.0).nan_to_num(1.0)
        scale = torch.where(spiked, wanted, torch.ones_like(wanted))
        multiply_gradients(self._optimizer, scale, norm.isfinite() | ~spiked)

    def after(self) -> None:
        """Does nothing."""


def acting_of(action: Action, optimizer: torch.optim.Optimizer) -> Acting:
    """Returns what an action does."""
    return Skip(optimizer) if action == "skip" else Clip(optimizer) if action == "clip" else Log()
