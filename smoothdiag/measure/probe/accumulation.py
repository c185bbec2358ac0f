"""Accumulation: the micro-batches of one optimizer step, as the training loop met them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smoothdiag import vectors
from smoothdiag.measure.loss.batches import MicroBatch, RandomState, devices_of, map_tensors, tensors_of
from smoothdiag.measure.loss.state import ModuleState
from smoothdiag.measure.probe.backward import Backward
from smoothdiag.vectors import Vector


@dataclass(frozen=True)
class Beginning:
    """A step before the optimizer took it.

    Attributes:
        start: The parameters.
        lrs: Learning rate of each.
        training: The gradient that backward left, else the one that the optimizer got; ``None`` where neither is known.
        has_length: Whether the length of ``training`` counts too, and not just its direction.
        arrived: Length of the gradient that the optimizer got, where it is another one; NaN where that is not known.
    """

    start: Vector
    lrs: list[float]
    training: Vector | None = None
    has_length: bool = False
    arrived: float = math.nan


class Accumulation:
    """Collects micro-batches until the optimizer steps, and what their backward passes leave.

    Args:
        model: The model in training; what its forward passes change is copied with every micro-batch.
        parameters: The coordinates x.
        loss_fn: The loss of a micro-batch.
        distributed: Whether gradients are averaged over ranks.

    Attributes:
        state: What moves in the model beside x.
    """

    def __init__(
        self, model: nn.Module, parameters: Sequence[nn.Parameter], loss_fn: Any = None, *, distributed: bool
    ) -> None:
        self.state = ModuleState(model, loss_fn)
        self._distributed = distributed
        self._observed: list[MicroBatch] = []
        self._used: list[int] = []
        self._versions: list[tuple[Tensor, int]] = []
        self._take(parameters)

    def follow(self, parameters: Sequence[nn.Parameter]) -> None:
        """Goes on with other coordinates, and keeps the micro-batches."""
        self._backward.disarm()
        self._take(parameters)

    def _take(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters, self._ids = list(parameters), {id(p) for p in parameters}
        self._devices = devices_of(self._parameters)
        self._backward = Backward(self._parameters, self._on_backward, averages=self._distributed)
        self._place: list[int] = []
        self._norms: Tensor | None = None

    @property
    def micro_batches(self) -> list[MicroBatch]:
        """The micro-batches that backward was called for since the gradients were last empty; all, if it never was."""
        if not self._used:
            return self._observed
        return [self._observed[index] for index in dict.fromkeys(self._used)]

    @property
    def has_observed(self) -> bool:
        """Whether any micro-batch was added since the last step."""
        return bool(self._observed)

    def add(self, batch: Any, weight: float | None = None) -> bool:
        """Adds a micro-batch with the random states and buffers its forward pass starts from.

        Returns:
            Whether x has moved since the micro-batches before it, which are of no use any more and were dropped.
        """
        # The loop may take entries out of the containers: keep containers of our own.
        kept = map_tensors(batch, lambda tensor: tensor)
        micro = MicroBatch(kept, RandomState.capture(self._devices), self.state.snapshot(self._ids), weight)
        # Tensors made in inference mode do not count who writes to them.
        versions = [(tensor, tensor._version) for tensor in tensors_of(batch) if not tensor.is_inference()]
        has_moved = self.has_observed and self._has_moved()
        if has_moved:
            self.clear()
        if not self._observed:
            self.state.mark(self._ids)
            self._place = [p._version for p in self._parameters]
            self._backward.arm()
        self._observed.append(micro)
        self._versions += versions
        return has_moved

    def clear(self) -> None:
        """Forgets everything and takes the hooks off; to be called before any backward pass of a measurement."""
        self._backward.disarm()
        self._observed, self._used, self._versions = [], [], []
        self._place, self._norms = [], None

    def data_changed(self) -> bool:
        """Returns whether a tensor of a batch was written to after it was added."""
        return any(tensor._version != version for tensor, version in self._versions)

    def notice(self) -> None:
        """Finds out what else moved in the model while the loop's own passes were made."""
        self.state.notice(self._ids)

    def beginning(self, start: Vector, lrs: list[float], *, by_closure: bool, is_scaled: bool) -> Beginning | None:
        """Returns the step from ``start``, with the gradients that are there now.

        ``None`` where a closure, asked for them, left none: then there is nothing to step along.

        Args:
            start: The parameters.
            lrs: Learning rate of each.
            by_closure: Whether the optimizer has evaluated a closure.
            is_scaled: Whether gradients hold the factor of a GradScaler.
        """
        if by_closure and all(p.grad is None for p in self._parameters):
            return None
        if by_closure and float(vectors.norm(vectors.sub(self._parameters, start))) != 0:
            return Beginning(start, lrs)  # the optimizer had its closure evaluated elsewhere
        if not by_closure and self._place and self._place != [p._version for p in self._parameters]:
            return Beginning(start, lrs)  # the loop did, as in sharpness-aware minimisation
        if self._backward.fault is not None:
            raise self._backward.fault
        if self._backward.was_rewritten:
            return Beginning(start, lrs)  # of what backward left nothing whole is known
        has_length = self._backward.is_untouched(self._parameters) and not is_scaled
        left = self._backward.left(self._parameters)
        self._backward.disarm()  # an optimizer may have its closure evaluated again, elsewhere
        if left is None:
            # Whatever was done to its length, the direction of the gradient tells whether loss_fn is the loop's loss.
            return Beginning(start, lrs, gradients_of(self._parameters))
        arrived = math.nan if has_length or is_scaled else _length(self._parameters)
        return Beginning(start, lrs, left, has_length, arrived)

    def _has_moved(self) -> bool:
        """Returns whether x is another one than when the first micro-batch was added."""
        if self._place != [p._version for p in self._parameters]:
            return True
        if (number := len(self._observed)) & (number - 1):
            return False  # a look at the values, at 1, 2, 4, ... micro-batches, costs time
        before = self._norms
        norms = torch._foreach_norm(list(map(vectors.local, self._parameters)), 2)
        self._norms = torch.stack([norm.to(norms[0].device) for norm in norms])
        return before is not None and not torch.equal(before, self._norms)

    def _on_backward(self, fresh: bool) -> None:
        if fresh:
            self._used = []
        # Batches without a backward (skipped by the loop) do not count.
        self._used.append(len(self._observed) - 1)


def gradients_of(parameters: Sequence[Tensor]) -> list[Tensor] | None:
    """Returns copies of the present gradients, zeros where one is missing; ``None`` where all are."""
    if all(p.grad is None for p in parameters):
        return None
    return [
        torch.zeros_like(p, requires_grad=False) if p.grad is None else p.grad.detach().to_dense().clone()
        for p in parameters
    ]


def _length(parameters: Sequence[Tensor]) -> float:
    """Returns the norm of the present gradients; NaN where there are none."""
    gradients = [p.grad.detach().to_dense() for p in parameters if p.grad is not None]
    return float(vectors.norm(gradients)) if gradients else math.nan


def check_hooks(model: nn.Module) -> None:
    """Raises a ValueError if a parameter has hooks that run when its gradient is ready.

    An optimizer that is fused into backward has them: every gradient the probe takes would move the parameters.
    """
    for name, parameter in model.named_parameters():
        hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
        if any(not isinstance(getattr(hook, "__self__", None), Backward) for hook in hooks.values()):
            raise ValueError(
                f"Parameter `model` should have no hooks that act when a gradient is ready. Found one on `{name}`, "
                "as an optimizer that steps within backward registers: its steps would run during measurements too. "
                "Use an ordinary optimizer.step() in the runs that are measured."
            )
