"""Objective: the loss on fixed data as a deterministic function of the parameters."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from smoothdiag import vectors
from smoothdiag.vectors import Vector

LossFn = Callable[[nn.Module, Any], Tensor]
Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class RandomState:
    """The states of every generator that a forward pass may draw from."""

    cpu: Tensor
    devices: tuple[tuple[torch.device, Tensor], ...]
    numpy: Any
    python: Any

    @classmethod
    def capture(cls, devices: Sequence[torch.device] = ()) -> "RandomState":
        """Returns the present states: torch on the CPU and on ``devices``, NumPy's global one, Python's."""
        states = tuple((device, torch.get_device_module(device).get_rng_state(device)) for device in devices)
        return cls(torch.get_rng_state(), states, np.random.get_state(), random.getstate())  # noqa: NPY002

    @staticmethod
    def seed(seed: int) -> None:
        """Seeds every generator, those of all devices too."""
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)

    def restore(self) -> None:
        """Puts every generator back into the captured state."""
        torch.set_rng_state(self.cpu)
        for device, state in self.devices:
            torch.get_device_module(device).set_rng_state(state, device)
        np.random.set_state(self.numpy)  # noqa: NPY002
        random.setstate(self.python)


@dataclass(frozen=True)
class MicroBatch:
    """One batch, as the training loop saw it, and the random state its forward pass starts from."""

    batch: Any
    random_state: RandomState


@dataclass(frozen=True)
class Evaluation:
    """The loss [f] and its gradient [f/x], one tensor per parameter, at one point."""

    loss: float
    gradient: list[Tensor]


class Objective:
    """The loss on fixed micro-batches as a function of the parameters alone.

    Every evaluation sees the same data, the same random numbers and the same buffers, and leaves no trace:
    parameters, buffers, ``.grad``, train or eval mode and random states are what they were, bit for bit.
    The gradient is taken by ``backward`` with the parameters displaced in place, which is the one way that
    every model that can be trained supports.

    Args:
        model: The model that ``loss_fn`` is called with.
        loss_fn: ``loss_fn(model, batch)`` returns the scalar loss of one micro-batch.
        micro_batches: What the loss is evaluated on.
        parameters: The coordinates x; other parameters stay where they are.
        buffers: Values of ``model.buffers()`` at the start of each evaluation; ``None`` takes the present ones.
        reduction: ``"mean"`` or ``"sum"`` of the micro-batch losses.

    Attributes:
        parameters: The coordinates x.
        num_grads: Gradients evaluated so far.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        micro_batches: Sequence[MicroBatch],
        parameters: Sequence[nn.Parameter],
        *,
        buffers: Vector | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        self.parameters = list(parameters)
        self._model = model
        self._loss_fn = loss_fn
        self._micro_batches = list(micro_batches)
        # Everything that backward may give a gradient to: x, and what it leaves where it is.
        self._holders = list(dict.fromkeys([*self.parameters, *model.parameters()]))
        self._live_buffers = list(model.buffers())
        self._start_buffers = vectors.clone(self._live_buffers) if buffers is None else list(buffers)
        self._weight = 1.0 / len(self._micro_batches) if reduction == "mean" else 1.0
        self._isolated = False
        self.num_grads = 0

    def point(self) -> list[Tensor]:
        """Returns a copy of the present parameter values."""
        return vectors.clone(self.parameters)

    def evaluate(self, point: Vector | None = None) -> Evaluation:
        """Returns the loss and its gradient at ``point`` (default: the present parameter values).

        Raises:
            ValueError: If ``loss_fn`` returns anything but a scalar tensor that depends on the parameters.
        """
        with self.isolated(), torch.enable_grad():
            self._place(point)
            self.num_grads += 1
            loss = sum(float(self._backward(micro)) for micro in self._micro_batches)
            return Evaluation(loss, [_dense_gradient(p) for p in self.parameters])

    def value(self, point: Vector | None = None) -> float:
        """Returns the loss at ``point`` by forward passes only."""
        with self.isolated(), torch.no_grad():
            self._place(point)
            return sum(float(self._loss(micro)) * self._weight for micro in self._micro_batches)

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """Saves everything an evaluation may touch and puts it back; cheap when already inside."""
        if self._isolated:
            yield
            return
        devices = sorted({p.device for p in self.parameters if p.device.type != "cpu"}, key=str)
        random_state = RandomState.capture(devices)
        values, buffers = self.point(), vectors.clone(self._live_buffers)
        gradients = [p.grad for p in self._holders]
        modes = [(module, module.training) for module in self._model.modules()]
        self._isolated = True
        try:
            yield
        finally:
            self._isolated = False
            vectors.assign_(self.parameters, values)
            vectors.assign_(self._live_buffers, buffers)
            for parameter, gradient in zip(self._holders, gradients, strict=True):
                parameter.grad = gradient
            for module, mode in modes:
                module.training = mode
            random_state.restore()

    def _place(self, point: Vector | None) -> None:
        if point is not None:
            vectors.assign_(self.parameters, point)
        vectors.assign_(self._live_buffers, self._start_buffers)
        for parameter in self._holders:
            parameter.grad = None
        # Autocast keeps cast copies of the weights while its region lasts: they are of another point.
        torch.clear_autocast_cache()

    def _backward(self, micro: MicroBatch) -> Tensor:
        loss = self._loss(micro)
        if not loss.requires_grad:
            raise ValueError(
                "Parameter `loss_fn` should return a loss that depends on the trainable parameters. "
                "Found a detached tensor; is it computed under no_grad, or from .item() or .detach()?"
            )
        (loss * self._weight).backward()  # type: ignore[no-untyped-call]
        return loss.detach() * self._weight

    def _loss(self, micro: MicroBatch) -> Tensor:
        micro.random_state.restore()
        loss = self._loss_fn(self._model, micro.batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"Parameter `loss_fn` should return a scalar tensor. Found {found}.")
        return loss.reshape(())


def _dense_gradient(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros_like(parameter, requires_grad=False)
    return gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
