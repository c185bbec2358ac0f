"""Ways: chooses how AutoClip acts on an optimizer, and acts on several of which each wants a way of its own."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from smoothdiag.adapters import Group, Joint, adapter_of, name_of
from smoothdiag.autoclip.acting import Action, ScaleGradients, SetCap, ShortenUpdate, length_along
from smoothdiag.autoclip.buckets import leave_out_non_finite, multiply_gradients
from smoothdiag.autoclip.history import Counts
from smoothdiag.autoclip.rates import Number, Peaks
from smoothdiag.memory import retried

SHARE = math.sqrt(0.5)
"""Largest part of the longest step for gradients that are scaled before others step: half of its square."""


class ShortenBoth:
    """Keeps a step short that optimizers of both kinds take together, such as SGD and AdamW.

    It scales the gradients of the first kind before the step, so that their part has at most half of the squared
    longest step. Afterwards it shortens the update of the second kind to what is left. So no step is longer than
    allowed, and neither kind can stop the other one.
    """

    shortens_updates: ClassVar[bool] = True
    counts_steps: ClassVar[bool] = True

    def __init__(self, optimizer: Joint, peaks: Peaks, *, acts: bool = True) -> None:
        self._optimizer, self._peaks, self._acts = optimizer, peaks, acts
        kinds = {"gradients": list[torch.optim.Optimizer](), "updates": list[torch.optim.Optimizer]()}
        for member in optimizer.optimizers:
            kinds[adapter_of(member).way].append(member)
        self._scaled, others = Joint(kinds["gradients"]), Joint(kinds["updates"])
        self._adapter = adapter_of(self._scaled)
        self._others = ShortenUpdate(others, adapter_of(others), acts=acts)
        self._scale, self._part = torch.ones(()), torch.zeros(())  # of the gradients, and how long their part is then

    def before(self, longest: Number, counts: Counts, step: int) -> None:
        """Scales the gradients of the first kind, and keeps what tells the update of the second."""
        leave_out_non_finite(self._optimizer, counts, step, acts=self._acts)
        self._others.keep(step)
        mine = {id(group) for group in self._scaled.param_groups}
        pairs = zip(self._optimizer.param_groups, self._peaks.values, strict=True)
        peaks = [peak for group, peak in pairs if id(group) in mine]
        length = length_along(self._scaled, peaks, self._adapter.gain)
        if length is None:
            self._scale, self._part = torch.ones(()), torch.zeros(())
            return
        self._scale = retried(lambda: (SHARE * longest / length).clamp(max=1.0).nan_to_num(1.0))
        self._part = retried(lambda: (self._scale * length).nan_to_num(0.0))
        if self._acts:
            multiply_gradients(self._scaled, self._scale, retried(lambda: torch.isfinite(length)))

    def after(self, longest: Number, counts: Counts, step: int, *, measured: bool) -> None:
        """Shortens the update of the second kind."""
        scale = self._others.shortened(retried(lambda: self._left(longest)), step, measured=measured)
        was_scaled = retried(lambda: self._scale < 1)
        retried(lambda: counts.add_clipped(was_scaled if scale is None else was_scaled | _on(scale < 1, was_scaled)))

    def drop(self) -> None:
        """Frees what was kept."""
        self._others.drop()

    def reach(self, group: Group) -> float:
        """Returns 1: the gradient norm does not say how long an update is."""
        return 1.0

    def reduction(self) -> Number:
        """Returns 1: steps are as long as the longest step allows."""
        return 1.0

    def taken(self, longest: Number) -> Number:
        """Returns the length of the step after it was shortened."""
        others = self._others.taken(self._left(longest))
        return (self._part**2 + _on(torch.as_tensor(others), self._part) ** 2).sqrt()

    def unclipped(self) -> Number:
        """Returns the length of the step as both kinds would have taken it."""
        others = torch.as_tensor(self._others.unclipped())
        return ((self._part / self._scale) ** 2 + _on(others, self._part) ** 2).sqrt()

    def _left(self, longest: Number) -> Tensor:
        """Returns how long the update of the second kind may be."""
        return (longest**2 - self._part**2).clamp(min=0.0).sqrt()


def _on(value: Tensor, other: Tensor) -> Tensor:
    return value.to(other.device)


def action_for(optimizer: torch.optim.Optimizer, mode: str, peaks: Peaks) -> Action:
    """Returns the way to act on an optimizer.

    Raises:
        ValueError: If ``mode`` does not fit the optimizer, or if AutoClip must not act on it at all.
    """
    adapter, acts = adapter_of(optimizer), mode != "shadow"
    if isinstance(optimizer, Joint) and any(adapter_of(member).way == "cap" for member in optimizer.optimizers):
        raise ValueError(
            "Parameter `optimizer` should hold one optimizer alone if that clips by itself. Found "
            f"{name_of(optimizer)}: give AutoClip a list of optimizers that do not, or one that does."
        )
    clips_itself = adapter.way == "cap"
    if clips_itself and mode == "clip":
        raise ValueError(
            'Parameter `mode` should be "set" for an optimizer that clips by itself. '
            f'Found `mode = "clip"` with {name_of(optimizer)}.'
        )
    if not clips_itself and mode == "set":
        raise ValueError(
            'Parameter `mode` should be "clip" for an optimizer that has no threshold of its own. '
            f'Found `mode = "set"` with {name_of(optimizer)}.'
        )
    if (acts or adapter.way not in ("updates", "mixed")) and (refused := adapter.refusal()):
        raise ValueError(refused)
    if clips_itself:
        return SetCap(optimizer, adapter, peaks, acts=acts)
    if isinstance(optimizer, Joint) and adapter.way == "mixed":
        return ShortenBoth(optimizer, peaks, acts=acts)
    if adapter.way == "gradients":
        return ScaleGradients(optimizer, adapter, peaks, acts=acts)
    return ShortenUpdate(optimizer, adapter, acts=acts)
