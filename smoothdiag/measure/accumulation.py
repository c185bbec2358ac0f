"""Accumulation: the micro-batches of one optimizer step, as the training loop met them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from smoothdiag import vectors
from smoothdiag.measure.batches import MicroBatch, RandomState, devices_of, map_tensors, tensors_of
from smoothdiag.measure.coordinates import is_distributed
from smoothdiag.measure.objective import Objective
from smoothdiag.measure.state import ModuleState
from smoothdiag.vectors import Vector

UNSEEN = (
    "The optimizer stepped but the probe saw no batch: nothing was measured. Iterate over probe.watch(loader), or call "
    "probe.observe(batch) before each forward pass."
)


@dataclass(frozen=True)
class Beginning:
    """A step before the optimizer took it.

    Attributes:
        start: The parameters.
        lrs: Learning rate of each.
        training: The gradient that the optimizer got; ``None`` where it is not known.
        untouched: Whether that is exactly what backward left, so that its length counts too.
    """

    start: Vector
    lrs: list[float]
    training: Vector | None = None
    untouched: bool = False


class Accumulation:
    """Collects micro-batches until the optimizer steps, and knows whether ``.grad`` is still what backward left.

    Args:
        model: The model in training; what its forward passes change is copied with every micro-batch.
        parameters: The coordinates x.

    Raises:
        ValueError: If a parameter has hooks that run when its gradient is ready, as an optimizer fused into backward
            has: every gradient the probe takes would move the parameters.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        _check_hooks(model)
        self._parameters = list(parameters)
        self.state = ModuleState(model, self._parameters)
        self._devices = devices_of(self._parameters)
        self._distributed = is_distributed(model, self._parameters)
        # Both kinds of hook see gradients of plain leaves; sharded ones are put in place behind their back.
        self._plain = not any(vectors.is_sharded(p) for p in parameters)
        self._observed: list[MicroBatch] = []
        self._used: list[int] = []
        self._versions: list[tuple[Tensor, int]] = []
        self._handles: list[RemovableHandle] = []
        self._left: dict[nn.Parameter, tuple[Tensor, int]] = {}

    @property
    def micro_batches(self) -> list[MicroBatch]:
        """The micro-batches that backward was called for since the gradients were last empty; all, if it never was."""
        if not self._used:
            return self._observed
        return [self._observed[index] for index in dict.fromkeys(self._used)]

    def add(self, batch: Any, weight: float | None = None) -> None:
        """Adds a micro-batch and the random states and buffers its forward pass starts from."""
        if not self._observed:
            self.state.mark()
            if self._plain:
                self._arm()
        # The loop may take entries out of the containers: keep containers of our own.
        kept = map_tensors(batch, lambda tensor: tensor)
        state = RandomState.capture(self._devices)
        self._observed.append(MicroBatch(kept, state, self.state.values(), weight))
        self._versions += [(tensor, tensor._version) for tensor in tensors_of(batch)]

    @property
    def has_observed(self) -> bool:
        """Whether any micro-batch was added since the last step."""
        return bool(self._observed)

    def clear(self) -> None:
        """Forgets everything and takes the hooks off; to be called before any backward pass of a measurement."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._left, self._used = [], {}, []
        self._observed, self._versions = [], []

    def data_changed(self) -> bool:
        """Returns whether a tensor of a batch was written to after it was added, on any rank."""
        changed = any(tensor._version != version for tensor, version in self._versions)
        return vectors.any_rank(changed, self._parameters[0]) if self._distributed else changed

    def beginning(self, start: Vector, lrs: list[float], *, by_closure: bool) -> Beginning | None:
        """Returns the step from ``start``, with the gradients that are there now.

        ``None`` where a closure, asked for them, left none: then there is nothing to step along.
        """
        if by_closure and all(p.grad is None for p in self._parameters):
            return None
        if by_closure and float(vectors.norm(vectors.sub(self._parameters, start))) != 0:
            return Beginning(start, lrs)  # the optimizer had its closure evaluated elsewhere
        untouched = None if self._distributed else self.untouched_gradient()
        # Whatever was done to its length, the direction of the gradient tells whether loss_fn is the loop's loss.
        training = gradients_of(self._parameters) if untouched is None else untouched
        return Beginning(start, lrs, training, untouched is not None)

    def untouched_gradient(self) -> list[Tensor] | None:
        """Returns copies of ``.grad`` if it holds exactly what one backward per micro-batch left, else ``None``."""
        if not self._left or len(set(self._used)) != len(self._used):
            return None
        gradient = []
        for parameter in self._parameters:
            left = self._left.get(parameter)
            if left is None:
                if parameter.grad is not None:
                    return None
                gradient.append(torch.zeros_like(parameter, requires_grad=False))
            elif self._is_left(parameter) and not left[0].is_sparse:
                gradient.append(left[0].detach().clone())
            else:
                return None
        return gradient

    def _is_left(self, parameter: nn.Parameter) -> bool:
        """Returns whether the gradient is as the last backward left it."""
        left = self._left.get(parameter)
        return left is not None and parameter.grad is left[0] and left[0]._version == left[1]

    def _arm(self) -> None:
        begun = torch.autograd.graph.register_multi_grad_hook(self._parameters, self._on_backward, mode="any")
        self._handles = [begun]
        for parameter in self._parameters:
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._on_gradient))  # type: ignore[no-untyped-call]

    def _on_backward(self, gradient: Tensor) -> None:
        if Objective.num_isolated:
            return  # another probe is measuring
        # Steps that are skipped (GradScaler) or abandoned leave their batches behind: gradients that start from
        # nothing show that a new accumulation has begun.
        if all(p.grad is None or not (self._is_left(p) or p.grad.any()) for p in self._parameters):
            self._left, self._used = {}, []
        # Batches without a backward (skipped by the loop) do not count.
        self._used.append(len(self._observed) - 1)

    def _on_gradient(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        if parameter.grad is not None and not Objective.num_isolated:
            self._left[parameter] = (parameter.grad, parameter.grad._version)


def gradients_of(parameters: Sequence[Tensor]) -> list[Tensor] | None:
    """Returns copies of the present gradients, zeros where one is missing; ``None`` where all are."""
    if all(p.grad is None for p in parameters):
        return None
    return [
        torch.zeros_like(p, requires_grad=False) if p.grad is None else p.grad.detach().to_dense().clone()
        for p in parameters
    ]


def _check_hooks(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
        if any(not isinstance(getattr(hook, "__self__", None), Accumulation) for hook in hooks.values()):
            raise ValueError(
                f"Parameter `model` should have no hooks that act when a gradient is ready. Found one on `{name}`, "
                "as an optimizer that steps within backward registers: its steps would run during measurements too. "
                "Use an ordinary optimizer.step() in the runs that are measured."
            )
