"""Closures that AutoClip can follow: evaluated once, before the optimizer has moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from smoothdiag import vectors
from smoothdiag.autoclip.calibration import is_in_progression
from smoothdiag.autoclip.faults import Unfit
from smoothdiag.measure.probe.closures import Arguments, after_closure
from smoothdiag.memory import retried

_WAY_OUT = (
    "Clip gradients by hand inside the closure, or give the probe and AutoClip the optimizer that this one wraps: its "
    "steps begin where it is."
)


class Closures:
    """Follows the closure of every step, and sees whether the parameters were moved before it was evaluated.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._place: Place | None = None
        self._has_checked = False
        self._versions_tell = False
        self.has_begun = False

    def begin(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        step: int,
        act: Callable[[], None],
        again: Callable[[], None],
    ) -> Arguments | None:
        """Returns the arguments of a step whose closure is followed by ``act``; None if it has no closure."""
        self.has_begun, self._place = False, None
        changed = after_closure(args, kwargs, act, again=again)
        if changed is not None:
            # Values tell for certain and take as long as a norm; elsewhere torch counts how often a tensor is written.
            self._place = Place(self._optimizer, by_value=not self._has_checked or is_in_progression(step))
        return changed

    def check_place(self) -> None:
        """Checks that the parameters are where the step began.

        Raises:
            Unfit: If the optimizer has moved them before it evaluated the closure, as those do that look around.
        """
        place, self._place = self._place, None
        if place is None:
            return
        written, moved = place.is_written(), place.is_elsewhere()
        if moved is not None:
            self._has_checked, self._versions_tell = True, not written and not moved
        elif self._versions_tell:
            moved = written
        if moved:
            raise Unfit(
                RuntimeError(
                    "The closure of a step should be evaluated where the step begins: AutoClip measures updates from "
                    f"there. Found that {type(self._optimizer).__name__} had moved the parameters before, as SAM does. "
                    f"{_WAY_OUT}"
                )
            )

    def check_begun(self) -> None:
        """Raises a RuntimeError if a step has ended without a gradient that AutoClip could have acted on."""
        if not self.has_begun:
            raise RuntimeError(
                "The closure of a step should be evaluated: AutoClip acts after it. Found that "
                f"{type(self._optimizer).__name__} did not. Call backward before the step instead, and step without a "
                "closure."
            )


class Place:
    """Where the parameters of an optimizer are, without a copy of them.

    Args:
        optimizer: The optimizer.
        by_value: Whether to remember values, by their norms.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, by_value: bool) -> None:
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._versions = [p._version for p in self._parameters]
        self._norms = self._measure() if by_value and self._parameters else None

    def is_written(self) -> bool:
        """Returns whether torch has seen one of them being written to."""
        return any(p._version != version for p, version in zip(self._parameters, self._versions, strict=True))

    def is_elsewhere(self) -> bool | None:
        """Returns whether their values are others; None where those were not remembered."""
        if self._norms is None:
            return None
        before, now = self._norms, self._measure()
        return retried(lambda: not torch.equal(before.nan_to_num(-1.0), now.nan_to_num(-1.0)))

    def _measure(self) -> Tensor:
        # The local parts: ranks need not wait for each other to see whether their own have moved.
        return retried(lambda: vectors.norms([vectors.local(p) for p in self._parameters]))


def second_evaluation() -> Exception:
    """Returns the error of a closure that is evaluated again in the same step."""
    return RuntimeError(
        "The closure of a step should be evaluated once: AutoClip acts on one gradient. Found a second evaluation."
    )
