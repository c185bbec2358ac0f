"""Acting: three ways of keeping a step within a length, none of which waits for the device."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from smoothdiag import vectors
from smoothdiag.optim import GGNC, ClippedMomentum
from smoothdiag.optim.arithmetic import global_norm

Group = Mapping[str, Any]
Length = float | Tensor


class Counts:
    """How many steps were shortened and how many gradients were not finite; counted on the device."""

    def __init__(self) -> None:
        self.clipped: Tensor | int = 0
        self.skipped: Tensor | int = 0

    def add(self, clipped: Tensor, finite: Tensor) -> None:
        """Counts one step."""
        self.clipped = self.clipped + (clipped & finite).long()
        self.skipped = self.skipped + (~finite).long()


class Action(Protocol):
    """A way of keeping steps within a length."""

    def before(self, longest: Length, counts: Counts) -> None:
        """Called before a step, with its gradients in place."""
        ...

    def after(self, longest: Length, counts: Counts) -> None:
        """Called after the step."""
        ...


class ScaleGradients:
    """Multiplies the gradients so that rate times norm stays within the longest step.

    Over all groups: the step is sqrt(sum of (rate_i ||g_i||)^2), with the largest rate each group has had so far, so
    that a decay of the rate shortens the longest step too. Gradients that are not finite become zero.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, peaks: "Peaks", *, acts: bool = True) -> None:
        self._optimizer, self._peaks, self._acts = optimizer, peaks, acts

    def before(self, longest: Length, counts: Counts) -> None:
        """Scales the gradients."""
        squares = []
        for group, rate in zip(self._optimizer.param_groups, self._peaks.steady_rates(), strict=True):
            squares += [(rate * norm).square() for norm in _gradient_norms(group)]
        if not squares:
            return
        length = torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()
        finite, scale = torch.isfinite(length), (longest / length).clamp(max=1.0)
        counts.add(scale < 1, finite)
        if self._acts:
            _multiply_gradients(self._optimizer, scale, finite)

    def after(self, longest: Length, counts: Counts) -> None:
        """Does nothing."""


class ShortenUpdate:
    """Takes back the part of an update that is longer than the longest step, whatever optimizer made it.

    Gradients that are not finite become zero before the optimizer averages them.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, acts: bool = True) -> None:
        self._optimizer, self._acts = optimizer, acts
        self._start: list[Tensor] = []

    def before(self, longest: Length, counts: Counts) -> None:
        """Keeps a copy of the parameters."""
        self._start = vectors.clone(_parameters(self._optimizer))
        _leave_out_non_finite(self._optimizer, counts, acts=self._acts)

    def after(self, longest: Length, counts: Counts) -> None:
        """Moves the parameters back towards the copy."""
        parameters, start = _parameters(self._optimizer), self._start
        self._start = []
        length = vectors.norm(vectors.sub(parameters, start))
        scale = (longest / length).clamp(max=1.0)
        counts.add(scale < 1, torch.ones_like(scale, dtype=torch.bool))
        if self._acts:
            for p, x in zip(parameters, start, strict=True):
                here, there = vectors.local(p), vectors.local(x)
                # At a weight of 1 lerp returns the end bit for bit.
                here.copy_(torch.lerp(there, here, scale.to(here)))


class SetCap:
    """Writes the cap into the groups of an optimizer that clips by itself.

    Such an optimizer clips the average of the gradients, and every one of its steps may then be as long as the cap.
    Under `torch.optim.SGD` the longest step is that of equal gradients, and steps of uncorrelated ones are shorter by
    the root of (1 - momentum) / (1 + momentum): so is the cap here. Gradients that are not finite become zero.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, peaks: "Peaks") -> None:
        self._optimizer, self._peaks = optimizer, peaks

    def before(self, longest: Length, counts: Counts) -> None:
        """Writes ``longest_step`` where a group has one, and else ``threshold``."""
        for group, rate in zip(self._optimizer.param_groups, self._peaks.values, strict=True):
            cap = longest * shortening(group)
            if group["longest_step"] is not None:
                group["longest_step"] = cap
            elif isinstance(rate, Tensor) or rate > 0:
                group["threshold"] = cap / rate
        _leave_out_non_finite(self._optimizer, counts, acts=True)

    def after(self, longest: Length, counts: Counts) -> None:
        """Does nothing."""


class Peaks:
    """The largest learning rate that each group has had so far.

    A rate that is a tensor on a GPU is compared there; whether it rose is then not known without waiting.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self.values: list[float | Tensor] = [0.0 for _ in optimizer.param_groups]

    def update(self) -> bool:
        """Takes up the present rates; returns whether one of them is above all of its earlier ones."""
        self.values += [0.0] * (len(self._optimizer.param_groups) - len(self.values))
        rose = False
        for i, group in enumerate(self._optimizer.param_groups):
            rate, peak = group["lr"], self.values[i]
            if isinstance(rate, Tensor) and rate.device.type != "cpu":
                self.values[i] = torch.maximum(rate.detach(), torch.as_tensor(peak).to(rate))
            elif float(rate) > peak:
                rose = rose or float(rate) > 1.001 * float(peak)
                self.values[i] = float(rate)
        return rose

    def steady_rates(self) -> list[float | Tensor]:
        """The same times what momentum makes of a constant gradient."""
        return [peak * gain(group) for peak, group in zip(self.values, self._optimizer.param_groups, strict=True)]


def gain(group: Group) -> float:
    """Returns how many learning rates long a step is, per norm of a constant gradient, under `torch.optim.SGD`."""
    momentum = float(group.get("momentum", 0.0))
    return (1 - float(group.get("dampening", 0.0))) / (1 - momentum) if momentum else 1.0


def shortening(group: Group) -> float:
    """Returns how long steps are that average uncorrelated gradients, in those that do not average."""
    momentum, nu = float(group["momentum"]), float(group.get("nu", 1.0))
    return nu * math.sqrt((1 - momentum) / (1 + momentum)) + 1 - nu


def action_for(optimizer: torch.optim.Optimizer, mode: str, peaks: Peaks) -> Action:
    """Returns the way to act on an optimizer.

    Raises:
        ValueError: If ``mode`` does not fit the optimizer.
    """
    clips_itself = isinstance(optimizer, ClippedMomentum | GGNC)
    if mode == "set":
        if not clips_itself:
            raise ValueError(
                'Parameter `mode` should be "clip" for an optimizer that has no threshold of its own. '
                f'Found `mode = "set"` with {type(optimizer).__name__}.'
            )
        return SetCap(optimizer, peaks)
    if clips_itself and mode == "clip":
        raise ValueError(
            'Parameter `mode` should be "set" for an optimizer that clips by itself. '
            f'Found `mode = "clip"` with {type(optimizer).__name__}.'
        )
    if isinstance(optimizer, torch.optim.SGD):
        return ScaleGradients(optimizer, peaks, acts=mode != "shadow")
    return ShortenUpdate(optimizer, acts=mode != "shadow")


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def _gradients(group: Group) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yields local parts of gradients of one device and dtype, and the parameters they belong to."""
    buckets: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for p in group["params"]:
        if p.grad is not None:
            grad = vectors.local(p.grad)
            grads, owners = buckets.setdefault((grad.device, grad.dtype), ([], []))
            grads.append(grad)
            owners.append(p)
    yield from buckets.values()


def _gradient_norms(group: Group) -> list[Tensor]:
    return [global_norm([bucket]) for bucket in _gradients(group)]


def _leave_out_non_finite(optimizer: torch.optim.Optimizer, counts: Counts, *, acts: bool) -> None:
    norms = [norm for group in optimizer.param_groups for norm in _gradient_norms(group)]
    if not norms:
        return
    finite = torch.isfinite(torch.stack([norm.to(norms[0].device) for norm in norms]).sum())
    counts.add(torch.zeros_like(finite), finite)
    if acts:
        _multiply_gradients(optimizer, torch.ones((), device=finite.device), finite)


def _multiply_gradients(optimizer: torch.optim.Optimizer, scale: Tensor, finite: Tensor) -> None:
    for group in optimizer.param_groups:
        for grads, _ in _gradients(group):
            device = grads[0].device
            torch._foreach_mul_(grads, scale.to(device, torch.promote_types(grads[0].dtype, torch.float32)))
            if device.type == "cpu" and finite.device.type == "cpu" and bool(finite):
                continue  # on a CPU there is nothing to wait for
            for grad in grads:
                grad.masked_fill_(~finite.to(device), 0.0)
