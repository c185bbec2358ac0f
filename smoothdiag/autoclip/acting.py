"""Acting: three ways of keeping a step within a length, none of which waits for the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from smoothdiag import vectors
from smoothdiag.autoclip.counts import Counts
from smoothdiag.autoclip.rates import Group, Number, Peaks, gain, plain, ratio, shortening, smaller
from smoothdiag.geometry import Euclidean
from smoothdiag.optim import GGNC, ClippedMomentum
from smoothdiag.optim.arithmetic import global_norm, multiply_

Bucket = tuple[list[Tensor], list[Tensor]]
"""Local tensors of one device and dtype, and the tensors they are part of."""


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

    def after(self, longest: Number, counts: Counts) -> None:
        """Called after the step."""
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

    def __init__(self, optimizer: torch.optim.Optimizer, peaks: Peaks, *, acts: bool = True) -> None:
        self._optimizer, self._peaks, self._acts = optimizer, peaks, acts
        self._length: Number = math.inf  # of the last step, as equal gradients prolong it, at the largest rate

    def before(self, longest: Number, counts: Counts, step: int) -> None:
        """Scales the gradients."""
        squares = []
        for group, peak in zip(self._optimizer.param_groups, self._peaks.values, strict=True):
            if bucket := _gradients(group):
                rate = peak * self.reach(group)
                squares.append((rate * global_norm(bucket)).square())
        if not squares:
            return
        length = torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()
        self._length = length = _unscaled(self._optimizer, length)
        finite, scale = torch.isfinite(length), (longest / length).clamp(max=1.0)
        counts.add_gradient(finite, step)
        counts.add_clipped((scale < 1) & finite)
        if self._acts:
            _multiply_gradients(self._optimizer, scale, finite)

    def after(self, longest: Number, counts: Counts) -> None:
        """Does nothing."""

    def reach(self, group: Group) -> float:
        """Returns what momentum makes of a constant gradient."""
        return gain(group)

    def reduction(self) -> Number:
        """Returns what momentum and a decayed rate make of uncorrelated gradients."""
        return self._peaks.reduction()

    def taken(self, longest: Number) -> Number:
        """Returns that of the longest step, or less if the gradient was too small for it."""
        return self.reduction() * smaller(self._length, longest)


class ShortenUpdate:
    """Takes back the part of an update that is longer than the longest step, whatever optimizer made it.

    Gradients that are not finite become zero before the optimizer averages them.
    """

    shortens_updates: ClassVar[bool] = True
    counts_steps: ClassVar[bool] = True

    def __init__(self, optimizer: torch.optim.Optimizer, *, acts: bool = True) -> None:
        self._optimizer, self._acts = optimizer, acts
        self._start: list[Bucket] = []
        self._length: Number = math.inf  # of the last update, before it was shortened

    def before(self, longest: Number, counts: Counts, step: int) -> None:
        """Keeps a copy of the parameters."""
        self._start = [([_wide(x.clone()) for x in local], owners) for local, owners in self._parameters()]
        _leave_out_non_finite(self._optimizer, counts, step, acts=self._acts)

    def after(self, longest: Number, counts: Counts) -> None:
        """Moves the parameters back towards the copy."""
        back, self._start = self._start, []
        if not back:
            return
        for (start, _), (here, _) in zip(back, self._parameters(), strict=True):
            torch._foreach_sub_(start, here)  # in place: another copy of large models may not fit
        self._length = length = global_norm(back)
        scale = (longest / length).clamp(max=1.0).nan_to_num(1.0)  # what is NaN is not spread
        counts.add_clipped(scale < 1)
        if not self._acts or (scale.device.type == "cpu" and bool(scale == 1)):
            return
        for (start, _), (here, _) in zip(back, self._parameters(), strict=True):
            multiply_(start, 1 - scale)
            for x, d in zip(here, start, strict=True):
                x.add_(d)  # in float32 or wider, and then rounded; bit for bit x where d is zero

    def reach(self, group: Group) -> float:
        """Returns 1: no gradient norm says how long an update is."""
        return 1.0

    def reduction(self) -> Number:
        """Returns 1: whatever the rate and the momentum, it is the update that is shortened."""
        return 1.0

    def taken(self, longest: Number) -> Number:
        """Returns the length of the update after it was shortened."""
        return smaller(self._length, longest)

    def _parameters(self) -> list[Bucket]:
        held = [p for group in self._optimizer.param_groups for p in group["params"] if p.requires_grad]
        return _buckets(held, held)


class SetCap:
    """Writes the cap into the groups of an optimizer that clips by itself.

    Such an optimizer clips the average of the gradients, and every one of its steps may then be as long as the cap.
    Under `torch.optim.SGD` the longest step is that of equal gradients, and steps of uncorrelated ones are shorter by
    the root of (1 - momentum) / (1 + momentum): so is the cap here. Gradients that are not finite become zero.

    Raises:
        ValueError: If the optimizer measures steps in another norm, or with one norm for each group.
    """

    shortens_updates: ClassVar[bool] = False
    counts_steps: ClassVar[bool] = False

    def __init__(self, optimizer: torch.optim.Optimizer, peaks: Peaks, *, acts: bool = True) -> None:
        self._optimizer, self._peaks, self._acts = optimizer, peaks, acts
        for group in optimizer.param_groups:
            geometry, radius = group.get("geometry", Euclidean()), group.get("radius", 1.0)
            if not isinstance(geometry, Euclidean) or radius != 1:
                raise ValueError(
                    "Parameter `optimizer` should step in the Euclidean norm, with a radius of 1: the longest step is "
                    f"measured in it. Found `geometry = {geometry}`, `radius = {radius}`."
                )
            if group.get("norm_scope", "all") != "all" and len(optimizer.param_groups) > 1:
                raise ValueError(
                    'Parameter `norm_scope` should be "all": the longest step is one of all groups together. '
                    f'Found `norm_scope = "{group["norm_scope"]}"` with {len(optimizer.param_groups)} groups.'
                )

    def before(self, longest: Number, counts: Counts, step: int) -> None:
        """Writes ``longest_step`` where a group has one, and else ``threshold``."""
        if self._acts:
            for group, peak in zip(self._optimizer.param_groups, self._peaks.values, strict=True):
                cap = longest / self.reach(group)
                if group["longest_step"] is not None:
                    group["longest_step"] = cap * ratio(plain(group["lr"]), peak)
                elif isinstance(peak, Tensor) or peak > 0:
                    group["threshold"] = cap / peak
        _leave_out_non_finite(self._optimizer, counts, step, acts=self._acts)

    def after(self, longest: Number, counts: Counts) -> None:
        """Does nothing."""

    def reach(self, group: Group) -> float:
        """Returns the inverse of what the cap is shortened by."""
        return 1 / shortening(group)

    def reduction(self) -> Number:
        """Returns what the cap is shortened by, also by a decayed rate."""
        return self._peaks.reduction()

    def taken(self, longest: Number) -> Number:
        """Returns the length of a clipped step: how often the optimizer clips is not known."""
        return self.reduction() * longest


def action_for(optimizer: torch.optim.Optimizer, mode: str, peaks: Peaks) -> Action:
    """Returns the way to act on an optimizer.

    Raises:
        ValueError: If ``mode`` does not fit the optimizer.
    """
    clips_itself, acts = isinstance(optimizer, ClippedMomentum | GGNC), mode != "shadow"
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
    if clips_itself:
        return SetCap(optimizer, peaks, acts=acts)
    if isinstance(optimizer, torch.optim.SGD):
        return ScaleGradients(optimizer, peaks, acts=acts)
    return ShortenUpdate(optimizer, acts=acts)


def check_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Raises a RuntimeError if a gradient has no length that is easily told."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.layout != torch.strided:
                raise RuntimeError("AutoClip needs dense gradients. Found a sparse one.")
            if vectors.is_sharded(p.grad) and any(placement.is_partial() for placement in p.grad.placements):
                raise RuntimeError("AutoClip needs gradients that are summed over ranks. Found a partial one.")


def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor | None:
    """Returns the norm of all gradients, without the factor of a GradScaler; ``None`` where there are none."""
    buckets = [bucket for group in optimizer.param_groups for bucket in _gradients(group)]
    return _unscaled(optimizer, global_norm(buckets)) if buckets else None


def _gradients(group: Group) -> list[Bucket]:
    grads = [p.grad for p in group["params"] if p.grad is not None]
    return _buckets(grads, grads)


def _buckets(tensors: Sequence[Tensor], owners: Sequence[Tensor]) -> list[Bucket]:
    """Returns local parts by device and dtype."""
    found: dict[Any, Bucket] = {}
    for tensor, owner in zip(tensors, owners, strict=True):
        local = vectors.local(tensor)
        members = found.setdefault((local.device, local.dtype), ([], []))
        members[0].append(local)
        members[1].append(owner)
    return list(found.values())


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype.itemsize < 4 else x


def _unscaled(optimizer: torch.optim.Optimizer, length: Tensor) -> Tensor:
    """Returns the length without the factor of a GradScaler, which fused optimizers take out in their step."""
    factor = getattr(optimizer, "grad_scale", None)
    return length if factor is None else length / factor.to(length.device)


def _leave_out_non_finite(optimizer: torch.optim.Optimizer, counts: Counts, step: int, *, acts: bool) -> None:
    if (norm := gradient_norm(optimizer)) is None:
        return
    finite = torch.isfinite(norm)
    counts.add_gradient(finite, step)
    if acts:
        _multiply_gradients(optimizer, None, finite)


def _multiply_gradients(optimizer: torch.optim.Optimizer, scale: Tensor | None, finite: Tensor) -> None:
    """Multiplies all gradients by ``scale``, or makes them zero where they are not all finite."""
    on_cpu = finite.device.type == "cpu"  # there is nothing to wait for there
    for group in optimizer.param_groups:
        for grads, _ in _gradients(group):
            if scale is not None and not (on_cpu and bool(scale == 1)):
                multiply_(grads, scale)
            if not (on_cpu and bool(finite)):
                lost = ~finite.to(grads[0].device)
                for grad in grads:
                    grad.masked_fill_(lost, 0.0)
