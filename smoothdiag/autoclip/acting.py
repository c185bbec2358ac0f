"""Acting: three ways of keeping a step within a length. None of them waits for the device.

`smoothdiag.autoclip.step` calls ``before`` when the gradients are there, and ``after`` when the optimizer has moved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from smoothdiag import vectors
from smoothdiag.adapters import Adapter, Group
from smoothdiag.adapters.iterates import num_entries
from smoothdiag.autoclip.buckets import (
    Bucket,
    copies_of,
    each,
    gradients,
    leave_out_non_finite,
    length_of,
    multiply,
    multiply_gradients,
    subtract,
    unscaled,
)
from smoothdiag.autoclip.faults import Unfit
from smoothdiag.autoclip.following import Following
from smoothdiag.autoclip.history import Counts
from smoothdiag.autoclip.progression import is_in_progression
from smoothdiag.autoclip.rates import Number, Peaks, plain, ratio, smaller
from smoothdiag.memory import retried

TINY = torch.finfo(torch.float32).tiny
"""In place of no length at all, as at the rate zero: optimizers want a positive one."""

NEARLY = 0.9
"""An update of this share of the longest step is so long that a bound on the next one would not help."""


class Action(Protocol):
    """A way of keeping steps within a length.

    Attributes:
        shortens_updates: Whether it measures and shortens the update itself, whatever the gradient was.
        counts_steps: Whether it can count the steps that were longer than allowed.
    """

    shortens_updates: ClassVar[bool]
    counts_steps: ClassVar[bool]

    def before(self, longest: Number, counts: Counts, step: int) -> None:
        """Called before a step, with its gradients in place."""
        ...

    def after(self, longest: Number, counts: Counts, step: int, *, measured: bool) -> None:
        """Called after the step; ``measured`` if somebody will ask how long it was."""
        ...

    def drop(self) -> None:
        """Frees what ``before`` has kept, because the step is over or has failed."""
        ...

    def reach(self, group: Group) -> float:
        """Returns how long a step is at the edge of clipping, for a gradient norm of 1 and a rate of 1."""
        ...

    def reduction(self) -> Number:
        """Returns how long clipped steps are at present if gradients are uncorrelated, as a share of the longest."""
        ...

    def taken(self, longest: Number) -> Number:
        """Returns how long the last step was, as far as it is known: at most as long as a clipped one."""
        ...

    def unclipped(self) -> Number:
        """Returns how long the last step would have been without AutoClip; infinite if that is not known."""
        ...


class ScaleGradients:
    """Multiplies the gradients so that rate times norm is at most the longest step.

    The length of a step counts all groups: sqrt(sum of (rate_i ||g_i||)^2). Each group counts with the largest rate it
    has had so far, so that steps become shorter when the rate decays. Gradients that are not finite become zero.
    """

    shortens_updates: ClassVar[bool] = False
    counts_steps: ClassVar[bool] = True

    def __init__(self, optimizer: torch.optim.Optimizer, adapter: Adapter, peaks: Peaks, *, acts: bool = True) -> None:
        self._optimizer, self._adapter, self._peaks, self._acts = optimizer, adapter, peaks, acts
        # Of steps whose gradients are all equal to the last gradient, at the largest rate so far.
        self._length: Number = math.inf
        self._is_clipped: Tensor | None = None  # whether the step that has begun is

    def before(self, longest: Number, counts: Counts, step: int) -> None:
        """Scales the gradients."""
        if (length := length_along(self._optimizer, self._peaks.values, self.reach)) is None:
            return
        self._length = length
        finite, scale = retried(lambda: (torch.isfinite(length), (longest / length).clamp(max=1.0)))
        retried(lambda: counts.add_gradient(finite, step))
        self._is_clipped = retried(lambda: (scale < 1) & finite)
        if self._acts:
            multiply_gradients(self._optimizer, scale, finite)

    def after(self, longest: Number, counts: Counts, step: int, *, measured: bool) -> None:
        """Counts the step."""
        if (clipped := self._is_clipped) is not None:
            retried(lambda: counts.add_clipped(clipped))

    def drop(self) -> None:
        """Forgets whether the step was clipped."""
        self._is_clipped = None

    def reach(self, group: Group) -> float:
        """Returns how many times longer momentum makes steps of a constant gradient."""
        return self._adapter.gain(group)

    def reduction(self) -> Number:
        """Returns how far averaging and a decayed rate shorten steps of uncorrelated gradients."""
        return self._peaks.reduction(self._adapter.shortening)

    def taken(self, longest: Number) -> Number:
        """Returns the length of a clipped step, or less if the gradient was too small to be clipped."""
        return self.reduction() * smaller(self._length, longest)

    def unclipped(self) -> Number:
        """Returns the length of steps whose gradients are all equal to the last one, at the largest rate so far."""
        return self._length


def length_along(
    optimizer: torch.optim.Optimizer, peaks: Sequence[Number], reach: Callable[[Group], float]
) -> Tensor | None:
    """Returns how long a step along the present gradients is [x]; ``None`` if there are no gradients.

    Args:
        optimizer: The optimizer.
        peaks: The learning rate that each of its groups counts with [x^2/f].
        reach: Returns how long a step of a group is, for a gradient norm of 1 and a rate of 1.
    """
    squares = []
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        if bucket := retried(partial(gradients, group)):
            norm, rate = length_of(bucket), reach(group)
            squares.append(retried(lambda norm=norm, rate=rate, peak=peak: (peak * rate * norm).square()))  # type: ignore[misc]
    if not squares:
        return None
    length = retried(lambda: torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt())
    return retried(partial(unscaled, optimizer, length))


class ShortenUpdate:
    """Lets the optimizer step, and then moves the parameters back if the update was longer than the longest step.

    It works out the update from what the optimizer keeps, where that can be done, and else from a copy of the
    parameters. Gradients that are not finite become zero before the optimizer averages them.
    """

    shortens_updates: ClassVar[bool] = True
    counts_steps: ClassVar[bool] = True

    def __init__(self, optimizer: torch.optim.Optimizer, adapter: Adapter, *, acts: bool = True) -> None:
        self._optimizer, self._adapter, self._acts = optimizer, adapter, acts
        self._start: list[Bucket] = []
        self._following, self._follows = Following(optimizer, adapter), False
        self._length: Number = math.inf  # the length of the last update, before it was shortened
        self._num_entries = -1  # entries of the optimizer's state when AutoClip last looked for copies in it

    def before(self, longest: Number, counts: Counts, step: int) -> None:
        """Keeps a copy of the parameters, if the update will not follow from what the optimizer keeps."""
        self.keep(step)
        leave_out_non_finite(self._optimizer, counts, step, acts=self._acts)

    def keep(self, step: int) -> None:
        """Prepares to tell the update once the step has been taken."""
        self.drop()
        self._follows = self._following.begin(step)
        if not self._follows:
            self._start = copies_of(self._optimizer)

    def after(self, longest: Number, counts: Counts, step: int, *, measured: bool) -> None:
        """Moves the parameters back by as much as the update was too long."""
        scale = self.shortened(longest, step, measured=measured)
        if scale is not None:
            retried(lambda: counts.add_clipped(scale < 1))

    def shortened(self, longest: Number, step: int, *, measured: bool) -> Tensor | None:
        """Shortens the update, and returns by which factor; ``None`` if it was certainly short enough."""
        back, self._start = self._start, []
        if not back and not self._follows:
            return None
        if self._follows and not measured and not is_in_progression(step):
            self._length = self._following.at_most(longest)
            if math.isfinite(self._length):
                return None
        if not self._follows:
            subtract(back)
            if self._following.check(back, step, may_wait=measured or is_in_progression(step)):
                back, self._follows = [], True  # a resumed run compares where the whole run did not
        self._length = length = self._following.length() if self._follows else length_of(back)
        self._look_for_iterates(length, step)
        scale = retried(lambda: (longest / length).clamp(max=1.0).nan_to_num(1.0))  # a NaN stays where it is
        if scale.device.type == "cpu":
            self._following.was_long = retried(lambda: bool(length > NEARLY * longest))
        if self._acts and not retried(lambda: scale.device.type == "cpu" and bool(scale == 1)):
            self._move_back(back, retried(lambda: 1 - scale))
        return scale

    def _move_back(self, back: Sequence[Bucket], rest: Tensor) -> None:
        if self._follows:
            self._following.take_back(rest)
        for start, owners in back:
            multiply(start, rest)
            # Computed in float32 or wider, then rounded. Where the way back is zero, x stays as it is to the bit.
            each(lambda p, d: vectors.local(p).add_(d), owners, start)

    def drop(self) -> None:
        """Frees the copy."""
        self._start, self._follows = [], False
        self._following.drop()

    def reach(self, group: Group) -> float:
        """Returns 1: the gradient norm does not say how long an update is."""
        return 1.0

    def reduction(self) -> Number:
        """Returns 1: AutoClip shortens the update itself, whatever the rate and the momentum."""
        return 1.0

    def taken(self, longest: Number) -> Number:
        """Returns the length of the update after it was shortened."""
        return smaller(self._length, longest)

    def unclipped(self) -> Number:
        """Returns the length of the update before it was shortened; of a step that is not measured, perhaps a bound."""
        return self._length

    def _look_for_iterates(self, moved: Tensor, step: int) -> None:
        """Looks for a copy of the parameters: when the state has new entries, and at the steps of the progression."""
        number = num_entries(self._optimizer)
        if self._acts and (number != self._num_entries or is_in_progression(step)):
            refused = self._adapter.late_refusal(moved)
            if refused:
                raise Unfit(ValueError(refused))
            self._num_entries = -1 if refused is None else number


class SetCap:
    """Writes the longest step into the groups of an optimizer that clips by itself.

    Such an optimizer clips the average of the gradients, so each of its steps may be as long as the cap. SGD, which
    averages clipped gradients, reaches the longest step only if all gradients are equal. If they are uncorrelated, its
    steps are shorter by the factor sqrt((1 - momentum) / (1 + momentum)). The cap is shortened by the same factor, so
    that S means the same for both. Gradients that are not finite become zero.
    """

    shortens_updates: ClassVar[bool] = False
    counts_steps: ClassVar[bool] = False

    def __init__(self, optimizer: torch.optim.Optimizer, adapter: Adapter, peaks: Peaks, *, acts: bool = True) -> None:
        self._optimizer, self._adapter, self._peaks, self._acts = optimizer, adapter, peaks, acts

    def before(self, longest: Number, counts: Counts, step: int) -> None:
        """Writes ``longest_step`` if a group has one, and else ``threshold``."""
        if self._acts:
            retried(partial(self._write, longest))
        leave_out_non_finite(self._optimizer, counts, step, acts=self._acts)

    def _write(self, longest: Number) -> None:
        for group, peak in zip(self._optimizer.param_groups, self._peaks.values, strict=True):
            cap = longest / self.reach(group)
            if group["longest_step"] is not None:
                found = cap * ratio(plain(group["lr"]), peak)
                positive = found.nan_to_num(TINY).clamp(TINY) if isinstance(found, Tensor) else max(TINY, found)
                group["longest_step"] = positive
            elif isinstance(peak, Tensor) or peak > 0:
                group["threshold"] = cap / peak

    def after(self, longest: Number, counts: Counts, step: int, *, measured: bool) -> None:
        """Does nothing."""

    def drop(self) -> None:
        """Does nothing."""

    def reach(self, group: Group) -> float:
        """Returns one over the factor that shortens the cap."""
        return 1 / self._adapter.shortening(group)

    def reduction(self) -> Number:
        """Returns the factor that shortens the cap, with the decay of the rate in it."""
        return self._peaks.reduction(self._adapter.shortening)

    def taken(self, longest: Number) -> Number:
        """Returns the length of a clipped step: AutoClip cannot see whether the optimizer has clipped."""
        return self.reduction() * longest

    def unclipped(self) -> Number:
        """Returns infinity: AutoClip does not see the average that the optimizer clips."""
        return math.inf
