"""Accumulation: the micro-batches of one optimizer step, as the training loop met them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from smoothdiag import collectives, vectors
from smoothdiag.measure.loss.batches import MicroBatch, RandomState, devices_of, lasting, map_tensors, tensors_of
from smoothdiag.measure.loss.replicas import Replicas
from smoothdiag.measure.loss.state import ModuleState
from smoothdiag.measure.probe.backward import Backward
from smoothdiag.measure.probe.calls import Calls
from smoothdiag.measure.probe.ranks import Outlook
from smoothdiag.packing import Kept, Packing
from smoothdiag.vectors import Vector

Follows = Literal["copy", "mark", "nothing"]
"""What to do with the gradients of the loop's backward passes."""

SCALED = 1e-6
"""Relative distance of a gradient from a multiple of another one that rounding explains."""


@dataclass(frozen=True)
class Beginning:
    """A step as it was before the optimizer took it.

    Attributes:
        start: The parameters.
        lrs: Learning rate of each parameter.
        training: The gradient that backward left, or else the gradient that the optimizer got; ``None`` if neither is
            known.
        has_length: Whether the length of ``training`` counts too, and not just its direction.
        arrived: Length of the gradient that the optimizer got, if it differs from ``training``; NaN if it does not, or
            if it is not known.
        is_seen: Whether the step has micro-batches that were shown.
        scale: What ``training`` has been multiplied by since backward.
        is_marked: Whether ``training`` can still be found: it was marked, and nobody has moved the parameters.
        is_complete: Whether ``training`` is what backward left, entry by entry.
    """

    start: Kept
    lrs: list[float]
    training: Vector | None = None
    has_length: bool = False
    arrived: float = math.nan
    is_seen: bool = True
    scale: float = 1.0
    is_marked: bool = False
    is_complete: bool = False

    @property
    def multiplied(self) -> float:
        """What the optimizer's gradient is, in lengths of the gradient that backward left; 1 if that is not known."""
        if self.scale != 1 or self.training is None or not math.isfinite(self.arrived):
            return self.scale
        length = float(vectors.norm(self.training))
        return self.arrived / length if length else 1.0


class Accumulation:
    """Collects micro-batches, and the gradients that their backward passes leave, until the optimizer steps.

    Args:
        model: The model in training; whatever its forward passes change is copied with every micro-batch.
        parameters: The coordinates x.
        loss_fn: The loss of a micro-batch.
        distributed: Whether gradients are averaged over ranks.

    Attributes:
        state: Knows what moves in the model besides x.
        calls: Knows which micro-batches count, and how much, if they are calls of a model that returns its loss.
    """

    def __init__(
        self, model: nn.Module, parameters: Sequence[nn.Parameter], loss_fn: Any = None, *, distributed: bool
    ) -> None:
        self.calls: Calls | None = None
        self.state = ModuleState(model, loss_fn)
        self._distributed = distributed
        self._follows: Follows = "nothing"
        self._observed: list[MicroBatch] = []
        self._used: list[int] = []
        self._versions: list[tuple[Tensor, int]] = []
        self._take(parameters)

    def follow(self, parameters: Sequence[nn.Parameter]) -> None:
        """Continues with other coordinates and keeps the micro-batches."""
        self._backward.disarm()
        self._take(parameters)
        self._follows = "copy"  # to compare the gradients as the optimizer gets them

    def _take(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters, self._ids = list(parameters), {id(p) for p in parameters}
        self._devices = devices_of(self._parameters)
        self._backward = Backward(self._parameters, self._on_backward, averages=self._distributed)
        self._place: list[int] = []
        self._norms: Tensor | None = None
        self._packing: Packing | None = None

    @property
    def packing(self) -> Packing:
        """How x lies in pieces at present."""
        if self._packing is None or not self._packing.fits(self._parameters):
            self._packing = Packing(self._parameters)
        return self._packing

    @property
    def micro_batches(self) -> list[MicroBatch]:
        """The micro-batches with a backward pass since gradients were last empty; all of them if there was no pass."""
        if not self._used:
            return self._observed
        return [self._observed[index] for index in dict.fromkeys(self._used)]

    def measured(self, begun: Beginning, replicas: Replicas) -> list[MicroBatch]:
        """Returns the micro-batches of a step that the optimizer has taken, with the weights of calls."""
        if self.calls is None:
            return self.micro_batches
        return self.calls.weighted(self._observed, begun.multiplied, replicas)

    @property
    def has_observed(self) -> bool:
        """Whether any micro-batch was added since the last step."""
        return bool(self._observed)

    def has_gradients(self) -> bool:
        """Whether there are gradients, be they zero."""
        return any(p.grad is not None for p in self._parameters)

    @property
    def has_loss(self) -> bool:
        """Whether there is a loss to measure now that the optimizer steps; a ValueError if the model returns none."""
        return self.has_observed if self.calls is None else self.calls.begin(self._observed)

    def add(self, batch: Any, weight: float | None = None, *, copies: bool = False, follows: Follows = "copy") -> bool:
        """Adds a micro-batch with the random states and buffers that its forward pass starts from.

        Args:
            batch: The micro-batch.
            weight: Weight of its loss in the loss of the step.
            copies: Whether to copy it, instead of noticing later that the loop has written to it.
            follows: What to do with the gradients that backward leaves: copy them, mark them to see whether they are
                changed, or nothing.

        Returns:
            Whether x has moved since the earlier micro-batches, which are useless then and were dropped.
        """
        # The loop may take entries out of its containers, so the probe keeps containers of its own.
        kept = lasting(batch) if copies else map_tensors(batch, lambda tensor: tensor)
        micro = MicroBatch(kept, RandomState.capture(self._devices), self.state.snapshot(self._ids), weight)
        # Tensors made in inference mode do not count writes.
        versions = [(tensor, tensor._version) for tensor in tensors_of(batch) if not tensor.is_inference()]
        has_moved = self.has_observed and self._has_moved()
        if has_moved:
            self.clear()
        if not self._observed:
            self.state.mark(self._ids)
            self._place = [p._version for p in self._parameters]
            self._follows = follows
            if follows != "nothing":
                self._backward.arm(self.packing if follows == "mark" else None)
        self._observed.append(micro)
        self._versions += versions
        return has_moved

    def clear(self) -> None:
        """Forgets everything and removes the hooks; call it before any backward pass of a measurement."""
        self._backward.disarm()
        self._observed, self._used, self._versions = [], [], []
        self._place, self._norms = [], None
        if self.calls is not None:
            self.calls.clear()

    def outlook(self, begun: Beginning | None) -> Outlook:
        """Returns what is wrong with measuring a step: for one, a tensor of a batch was written to after ``add``."""
        if begun is None:
            return Outlook.MISSING
        if not begun.is_seen:
            return Outlook.UNSEEN
        has_changed = any(tensor._version != version for tensor, version in self._versions)
        return Outlook.CHANGED if has_changed else Outlook.FINE

    def notice(self) -> None:
        """Finds out what else in the model the loop's own passes have moved."""
        self.state.notice(self._ids)

    def beginning(self, start: Kept, lrs: list[float], *, by_closure: bool, is_scaled: bool) -> Beginning | None:
        """Returns the step from ``start`` with the present gradients, or ``None`` if a closure left no gradient.

        Args:
            start: The parameters.
            lrs: Learning rate of each parameter.
            by_closure: Whether the optimizer has evaluated a closure.
            is_scaled: Whether gradients still contain the factor of a GradScaler.
        """
        if by_closure and all(p.grad is None for p in self._parameters):
            return None
        if by_closure and float(vectors.norm(vectors.sub(self._parameters, start))) != 0:
            return Beginning(start, lrs)  # the optimizer evaluated its closure at another point
        if not by_closure and self._place and self._place != [p._version for p in self._parameters]:
            return Beginning(start, lrs)  # the loop moved the parameters, as in sharpness-aware minimisation
        if self._backward.fault is not None:
            raise self._backward.fault
        if self._backward.was_rewritten or self._follows == "nothing":
            return Beginning(start, lrs)  # the probe has no complete copy of what backward left
        if self._follows == "mark" and self._backward.sees:
            self._backward.pause()
            return Beginning(start, lrs, is_marked=not is_scaled)
        has_length = self._backward.is_untouched(self._parameters) and not is_scaled
        left = self._backward.left(self._parameters)
        self._backward.disarm()  # an optimizer may evaluate its closure again at another point
        if left is None:
            # The length may have been changed, but the direction still tells whether loss_fn is the loop's loss.
            return Beginning(start, lrs, gradients_of(self._parameters))
        arrived = math.nan if has_length or is_scaled else _length(self._parameters)
        return Beginning(start, lrs, left, has_length, arrived, is_complete=True)

    def settled(self, begun: Beginning, *, exact: bool) -> Beginning:
        """Returns the step with its gradient in ``.grad`` instead of a copy, where the optimizer has left it there.

        Args:
            begun: The step, which the optimizer has taken.
            exact: Whether a gradient that was multiplied by a number since backward is to be kept as a copy.
        """
        present = [p.grad for p in self._parameters]
        if not all(g is None or (g.layout is torch.strided and not vectors.is_sharded(g)) for g in present):
            return begun
        if begun.is_marked:
            scale = self._backward.scale(begun.start)
            if not math.isfinite(scale) or scale == 0:
                return begun
            found = _or_zeros(present, self._parameters)
            arrived = math.nan if scale == 1 else _length(self._parameters)
            return replace(begun, training=found, has_length=scale == 1, arrived=arrived, scale=scale, is_complete=True)
        if not begun.is_complete or begun.training is None:
            return begun
        scale = _scale(begun.training, found := _or_zeros(present, self._parameters))
        if not math.isfinite(scale) or scale == 0 or (exact and scale != 1):
            return begun
        return replace(begun, training=found, scale=scale)

    def _has_moved(self) -> bool:
        """Returns whether x has changed since the first micro-batch was added."""
        if self._place != [p._version for p in self._parameters]:
            return True
        if (number := len(self._observed)) & (number - 1):
            return False  # looking at the values costs time: only at 1, 2, 4, ... micro-batches
        before = self._norms
        norms = torch._foreach_norm(list(map(vectors.local, self._parameters)), 2)
        self._norms = torch.stack([norm.to(norms[0].device) for norm in norms])
        return before is not None and not torch.equal(before, self._norms)

    def _on_backward(self, fresh: bool) -> None:
        if fresh:
            self._used = []
            if self.calls is not None:
                self.calls.forget_earlier()
        # Batches without a backward pass, which the loop skipped, do not count.
        self._used.append(len(self._observed) - 1)


def gradients_of(parameters: Sequence[Tensor]) -> list[Tensor] | None:
    """Returns copies of the present gradients, with zeros for missing ones; ``None`` if all are missing."""
    if all(p.grad is None for p in parameters):
        return None
    return [
        torch.zeros_like(p, requires_grad=False) if p.grad is None else p.grad.detach().to_dense().clone()
        for p in parameters
    ]


def _or_zeros(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> list[Tensor]:
    pairs = zip(gradients, parameters, strict=True)
    return [torch.zeros_like(p, requires_grad=False) if g is None else g.detach() for g, p in pairs]


def _scale(before: Vector, now: Vector) -> float:
    """Returns the number by which a vector has been multiplied, up to rounding; NaN if it has changed otherwise."""
    size, length = vectors.norm(before), vectors.norm(now)
    factor = torch.where(size == length, 1.0, length / size)
    apart = vectors.distance(now, before, over=(1.0, 1 / factor))
    found, distance, largest = collectives.read([x.reshape(1) for x in (factor, apart, length)], {})
    rounding = 0.0 if found == 1 else SCALED * largest
    return float(found) if distance <= rounding else math.nan


def _length(parameters: Sequence[Tensor]) -> float:
    """Returns the norm of the present gradients; NaN if there are none."""
    gradients = [p.grad.detach().to_dense() for p in parameters if p.grad is not None]
    return float(vectors.norm(gradients)) if gradients else math.nan
