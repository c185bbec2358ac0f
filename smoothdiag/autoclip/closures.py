"""Closures: AutoClip can follow a closure that the optimizer evaluates once, before it moves the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from smoothdiag import vectors
from smoothdiag.adapters import name_of
from smoothdiag.adapters.turns import Arguments
from smoothdiag.autoclip.faults import Unfit
from smoothdiag.autoclip.progression import is_in_progression
from smoothdiag.measure.probe.closures import after_closure
from smoothdiag.memory import retried

_WAY_OUT = (
    "Clip gradients by hand inside the closure, or give the probe and AutoClip the optimizer that this one wraps: its "
    "steps begin where it is."
)


class Closures:
    """Follows the closure of every step, and notices if the optimizer moves the parameters before it evaluates it.

    Args:
        optimizer: The optimizer.
        who: Who acts on the gradients, for messages.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, who: str = "AutoClip") -> None:
        self._optimizer, self._who = optimizer, who
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
        found: Callable[[Any], None] = lambda result: None,
    ) -> Arguments | None:
        """Returns the arguments of a step with a closure that calls ``act`` at its end; None without a closure."""
        self.has_begun, self._place = False, None
        changed = after_closure(args, kwargs, act, again=again, found=found)
        if changed is not None:
            # Comparing values is certain, and costs a norm. Otherwise torch's counts of writes to a tensor have to do.
            self._place = Place(self._optimizer, by_value=not self._has_checked or is_in_progression(step))
        return changed

    def check_place(self) -> None:
        """Checks that the parameters are where the step began.

        Raises:
            Unfit: If the optimizer has moved them before it evaluated the closure, as SAM does.
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
                    f"The closure of a step should be evaluated where the step begins: {self._who} acts on gradients "
                    f"there. Found that {name_of(self._optimizer)} had moved the parameters before, as SAM does. "
                    f"{_WAY_OUT}"
                )
            )

    def check_begun(self) -> None:
        """Raises a RuntimeError if the optimizer has stepped without evaluating its closure."""
        if not self.has_begun:
            raise RuntimeError(
                f"The optimizer should evaluate the closure of its step: {self._who} acts right after that. Found that "
                f"{name_of(self._optimizer)} did not. Call backward before the step instead, and step without a "
                "closure."
            )


class Place:
    """Remembers where the parameters of an optimizer are, without a copy of them.

    Args:
        optimizer: The optimizer.
        by_value: Whether to remember the norms of the parameters, and not only how often they were written to.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, by_value: bool) -> None:
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._versions = [p._version for p in self._parameters]
        self._norms = self._measure() if by_value and self._parameters else None

    def is_written(self) -> bool:
        """Returns whether torch has counted a write to one of them."""
        return any(p._version != version for p, version in zip(self._parameters, self._versions, strict=True))

    def is_elsewhere(self) -> bool | None:
        """Returns whether their values have changed; None if no values were remembered."""
        if self._norms is None:
            return None
        before, now = self._norms, self._measure()
        return retried(lambda: not torch.equal(before.nan_to_num(-1.0), now.nan_to_num(-1.0)))

    def _measure(self) -> Tensor:
        # The local parts: ranks need not wait for each other to see whether their own have moved.
        return retried(lambda: vectors.norms([vectors.local(p) for p in self._parameters]))


def second_evaluation(who: str = "AutoClip") -> Exception:
    """Returns the error for a closure that is evaluated again in the same step."""
    return RuntimeError(
        f"The closure of a step should be evaluated once: {who} acts on one gradient. Found a second evaluation."
    )
