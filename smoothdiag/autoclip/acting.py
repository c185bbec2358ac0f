"""Acting: three ways of keeping a step within a length, none of which waits for the device."""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from smoothdiag import vectors
from smoothdiag.adapters import Adapter, Group, adapter_of
from smoothdiag.adapters.iterates import num_entries
from smoothdiag.autoclip.buckets import (
    Bucket,
    buckets,
    each,
    gradients,
    leave_out_non_finite,
    length_of,
    multiply,
    multiply_gradients,
    unscaled,
    wide,
)
from smoothdiag.autoclip.calibration import is_in_progression
from smoothdiag.autoclip.faults import Unfit
from smoothdiag.autoclip.history import Counts
from smoothdiag.autoclip.rates import Number, Peaks, plain, ratio, smaller
from smoothdiag.memory import retried


class Action(Protocol):
    """A way of keeping steps within a length.

    Attributes:
        shortens_updates: Whether it is the update that is measured and shortened, whatever the gradient.
        counts_steps: Whether it knows how many steps were longer than allowed.
    """

    shortens_updates: ClassVar[bool]
    counts_steps: ClassVar[bool]

    def before(self, longest: Number, counts: Counts, step: int) -> None:
        """Called before a step, with its gradients in place."""
        ...

    def after(self, longest: Number, counts: Counts, step: int) -> None:
        """Called after the step."""
        ...

    def drop(self) -> None:
        """Called when there will be no ``after``: gives back what is kept for it."""
        ...

    def reach(self, group: Group) -> float:
        """Returns the step length that goes with a gradient norm of 1 and a rate of 1, where clipping begins."""
        ...

    def reduction(self) -> Number:
        """Returns how long clipped steps are at present, in longest steps, if gradients are uncorrelated."""
        ...

    def taken(self, longest: Number) -> Number:
        """Returns how long the last step was, as far as it is known: no longer than a clipped one."""
        ...


class ScaleGradients:
    """Multiplies the gradients so that rate times norm stays within the longest step.

    Over all groups: the step is sqrt(sum of (rate_i ||g_i||)^2), with the largest rate each group has had so far, so
    that a decay of the rate shortens the longest step too. Gradients that are not finite become zero.
    """

    shortens_updates: ClassVar[bool] = False
    counts_steps: ClassVar[bool] = True

    def __init__(self, optimizer: torch.optim.Optimizer, adapter: Adapter, peaks: Peaks, *, acts: bool = True) -> None:
        self._optimizer, self._adapter, self._peaks, self._acts = optimizer, adapter, peaks, acts
        self._length: Number = math.inf  # of the last step, as equal gradients prolong it, at the largest rate

    def before(self, longest: Number, counts: Counts, step: int) -> None:
        """Scales the gradients."""
        squares = []
        for group, peak in zip(self._optimizer.param_groups, self._peaks.values, strict=True):
            if bucket := retried(partial(gradients, group)):
                norm, reach = length_of(bucket), self.reach(group)
                squares.append(retried(lambda norm=norm, rate=reach, peak=peak: (peak * rate * norm).square()))  # type: ignore[misc]
        if not squares:
            return
        length = retried(lambda: torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt())
        self._length = length = retried(partial(unscaled, self._optimizer, length))
        finite, scale = retried(lambda: (torch.isfinite(length), (longest / length).clamp(max=1.0)))
        retried(lambda: counts.add_gradient(finite, step))
        retried(lambda: counts.add_clipped((scale < 1) & finite))
        if self._acts:
            multiply_gradients(self._optimizer, scale, finite)

    def after(self, longest: Number, counts: Counts, step: int) -> None:
        """Does nothing."""

    def drop(self) -> None:
        """Does nothing."""

    def reach(self, group: Group) -> float:
        """Returns what momentum makes of a constant gradient."""
        return self._adapter.gain(group)

    def reduction(self) -> Number:
        """Returns what momentum and a decayed rate make of uncorrelated gradients."""
        return self._peaks.reduction(self._adapter.shortening)

    def taken(self, longest: Number) -> Number:
        """Returns that of the longest step, or less if the gradient was too small for it."""
        return self.reduction() * smaller(self._length, longest)


class ShortenUpdate:
    """Takes back the part of an update that is longer than the longest step, whatever optimizer made it.

    Gradients that are not finite become zero before the optimizer averages them.
    """

    shortens_updates: ClassVar[bool] = True
    counts_steps: ClassVar[bool] = True

    def __init__(self, optimizer: torch.optim.Optimizer, adapter: Adapter, *, acts: bool = True) -> None:
        self._optimizer, self._adapter, self._acts = optimizer, adapter, acts
        self._start: list[Bucket] = []
        self._length: Number = math.inf  # of the last update, before it was shortened
        self._num_entries = -1  # of the optimizer's state, when it was last looked through

    def before(self, longest: Number, counts: Counts, step: int) -> None:
        """Keeps a copy of the parameters."""
        self.drop()
        self._start = retried(self._copies)
        leave_out_non_finite(self._optimizer, counts, step, acts=self._acts)

    def after(self, longest: Number, counts: Counts, step: int) -> None:
        """Moves the parameters back towards the copy."""
        back, self._start = self._start, []
        if not back:
            return
        # From here on the copies hold the way back, in place: another copy of large models may not fit.
        for start, owners in back:
            here = retried(lambda owners=owners: [vectors.local(p) for p in owners])  # type: ignore[misc]
            if all(x.dtype == y.dtype for x, y in zip(start, here, strict=True)):
                retried(partial(torch._foreach_sub_, start, here))
            else:
                each(Tensor.sub_, start, here)
        self._length = length = length_of(back)
        self._look_for_iterates(length, step)
        scale = retried(lambda: (longest / length).clamp(max=1.0).nan_to_num(1.0))  # what is NaN is not spread
        retried(lambda: counts.add_clipped(scale < 1))
        if not self._acts or retried(lambda: scale.device.type == "cpu" and bool(scale == 1)):
            return
        rest = retried(lambda: 1 - scale)
        for start, owners in back:
            multiply(start, rest)
            # In float32 or wider, and then rounded; bit for bit x where the way back is zero.
            each(lambda p, d: vectors.local(p).add_(d), owners, start)

    def drop(self) -> None:
        """Gives back the copy."""
        self._start = []

    def reach(self, group: Group) -> float:
        """Returns 1: no gradient norm says how long an update is."""
        return 1.0

    def reduction(self) -> Number:
        """Returns 1: whatever the rate and the momentum, it is the update that is shortened."""
        return 1.0

    def taken(self, longest: Number) -> Number:
        """Returns the length of the update after it was shortened."""
        return smaller(self._length, longest)

    def _copies(self) -> list[Bucket]:
        held = [p for group in self._optimizer.param_groups for p in group["params"] if p.requires_grad]
        return [([wide(x.clone()) for x in local], owners) for local, owners in buckets(held, held)]

    def _look_for_iterates(self, moved: Tensor, step: int) -> None:
        """Looks through the state of the optimizer in the first step, where it has new entries, and now and then."""
        number = num_entries(self._optimizer)
        if self._acts and (number != self._num_entries or is_in_progression(step)):
            refused = self._adapter.late_refusal(moved)
            if refused:
                raise Unfit(ValueError(refused))
            self._num_entries = -1 if refused is None else number


class SetCap:
    """Writes the cap into the groups of an optimizer that clips by itself.

    Such an optimizer clips the average of the gradients, and every one of its steps may then be as long as the cap.
    Under `torch.optim.SGD` the longest step is that of equal gradients, and steps of uncorrelated ones are shorter by
    the root of (1 - momentum) / (1 + momentum): so is the cap here. Gradients that are not finite become zero.
    """

    shortens_updates: ClassVar[bool] = False
    counts_steps: ClassVar[bool] = False

    def __init__(self, optimizer: torch.optim.Optimizer, adapter: Adapter, peaks: Peaks, *, acts: bool = True) -> None:
        self._optimizer, self._adapter, self._peaks, self._acts = optimizer, adapter, peaks, acts

    def before(self, longest: Number, counts: Counts, step: int) -> None:
        """Writes ``longest_step`` where a group has one, and else ``threshold``."""
        if self._acts:
            retried(partial(self._write, longest))
        leave_out_non_finite(self._optimizer, counts, step, acts=self._acts)

    def _write(self, longest: Number) -> None:
        for group, peak in zip(self._optimizer.param_groups, self._peaks.values, strict=True):
            cap = longest / self.reach(group)
            if group["longest_step"] is not None:
                group["longest_step"] = cap * ratio(plain(group["lr"]), peak)
            elif isinstance(peak, Tensor) or peak > 0:
                group["threshold"] = cap / peak

    def after(self, longest: Number, counts: Counts, step: int) -> None:
        """Does nothing."""

    def drop(self) -> None:
        """Does nothing."""

    def reach(self, group: Group) -> float:
        """Returns the inverse of what the cap is shortened by."""
        return 1 / self._adapter.shortening(group)

    def reduction(self) -> Number:
        """Returns what the cap is shortened by, also by a decayed rate."""
        return self._peaks.reduction(self._adapter.shortening)

    def taken(self, longest: Number) -> Number:
        """Returns the length of a clipped step: how often the optimizer clips is not known."""
        return self.reduction() * longest


def action_for(optimizer: torch.optim.Optimizer, mode: str, peaks: Peaks) -> Action:
    """Returns the way to act on an optimizer.

    Raises:
        ValueError: If ``mode`` does not fit the optimizer, or nothing but watching it does.
    """
    adapter, acts = adapter_of(optimizer), mode != "shadow"
    clips_itself = adapter.way == "cap"
    if clips_itself and mode == "clip":
        raise ValueError(
            'Parameter `mode` should be "set" for an optimizer that clips by itself. '
            f'Found `mode = "clip"` with {type(optimizer).__name__}.'
        )
    if not clips_itself and mode == "set":
        raise ValueError(
            'Parameter `mode` should be "clip" for an optimizer that has no threshold of its own. '
            f'Found `mode = "set"` with {type(optimizer).__name__}.'
        )
    if (acts or adapter.way != "updates") and (refused := adapter.refusal()):
        raise ValueError(refused)
    if clips_itself:
        return SetCap(optimizer, adapter, peaks, acts=acts)
    if adapter.way == "gradients":
        return ScaleGradients(optimizer, adapter, peaks, acts=acts)
    return ShortenUpdate(optimizer, adapter, acts=acts)
