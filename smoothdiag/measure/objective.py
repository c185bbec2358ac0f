"""Objective: the loss on fixed data as a deterministic function of the parameters."""

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from smoothdiag import vectors
from smoothdiag.measure.batches import MicroBatch, RandomState, copied, cut, devices_of, is_half, map_tensors, widened
from smoothdiag.measure.coordinates import no_sync, reshard
from smoothdiag.measure.graph import leaves_of
from smoothdiag.measure.state import ModuleState
from smoothdiag.rows import SmoothdiagWarning
from smoothdiag.vectors import Vector

LossFn = Callable[[nn.Module, Any], Tensor]
Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class Evaluation:
    """The loss and its gradient at one point.

    Attributes:
        loss: Loss [f].
        gradient: Gradient [f/x], one tensor per parameter.
        variance: Trace of the covariance of ``gradient`` [f^2/x^2], estimated from micro-batches of equal
            weight; NaN where there is only one.
    """

    loss: float
    gradient: list[Tensor] = field(repr=False)
    variance: float = math.nan


class Objective:
    """The loss on fixed micro-batches as a function of the parameters alone.

    Every evaluation sees the same data, the same random numbers and the same buffers, and leaves no trace:
    parameters, buffers, ``.grad``, train or eval mode and random states are what they were, bit for bit.
    The gradient is taken by ``backward`` with the parameters displaced in place, which is the one way that
    every model that can be trained supports. Under data parallelism it is the gradient averaged over ranks.

    Args:
        model: The model that ``loss_fn`` is called with.
        loss_fn: ``loss_fn(model, batch)`` returns the scalar loss of one micro-batch.
        micro_batches: What the loss is evaluated on.
        parameters: The coordinates x; other parameters stay where they are.
        state: What forward passes change beside x; ``None`` takes the buffers.
        reduction: ``"mean"`` or ``"sum"`` of the micro-batch losses that have no weight of their own.
        widen_half: Evaluate in float32 where parameters and buffers are float16 or bfloat16, so that points and
            gradients are not rounded to 8 or 11 bits.
        distributed: Whether ``backward`` averages gradients over ranks; the loss is then averaged too.

    Attributes:
        model: The model.
        parameters: The coordinates x.
        distributed: Whether the loss is a mean over ranks.
        num_grads: Gradients evaluated so far.
        loss_scale: Factor that the loss has during ``backward``, so that float16 gradients do not underflow;
            divided by 16 where they overflow.
        num_isolated: Objectives, of all there are, that are displaced at the moment.
    """

    num_isolated = 0

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        micro_batches: Sequence[MicroBatch],
        parameters: Sequence[nn.Parameter],
        *,
        state: ModuleState | None = None,
        reduction: Reduction = "mean",
        widen_half: bool = False,
        distributed: bool = False,
    ) -> None:
        self.parameters = list(parameters)
        self.num_grads = 0
        self.loss_scale = 1.0
        self.model, self._loss_fn = model, loss_fn
        self._micro_batches, self._reduction = list(micro_batches), reduction
        # Everything that backward may give a gradient to: x, and what it leaves where it is.
        self._holders = list(dict.fromkeys([*self.parameters, *model.parameters()]))
        self._state = ModuleState(model, self.parameters) if state is None else state
        self._widened = [t for t in [*self._holders, *model.buffers()] if widen_half and is_half(t)]
        self._start_state: Vector = []
        self._isolated = False
        self._strays: dict[Tensor, Tensor | None] = {}
        self._traced: set[int] = set()
        self.distributed = distributed

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches in the loss."""
        return len(self._micro_batches)

    def point(self) -> list[Tensor]:
        """Returns a copy of the present parameter values."""
        return vectors.clone(self.parameters)

    def evaluate(self, point: Vector | None = None, inspect: Callable[[Tensor], None] | None = None) -> Evaluation:
        """Returns the loss and its gradient at ``point`` (default: the present parameter values).

        Args:
            point: Where.
            inspect: Called with the loss of each micro-batch before ``backward``.

        Raises:
            ValueError: If ``loss_fn`` returns anything but a scalar tensor that depends on the parameters.
        """
        found = self._evaluate(point, inspect)
        while self.loss_scale > 1 and math.isfinite(found.loss) and not vectors.norm(found.gradient).isfinite():
            self.loss_scale /= 16
            found = self._evaluate(point, inspect)
        return found

    def _evaluate(self, point: Vector | None, inspect: Callable[[Tensor], None] | None) -> Evaluation:
        with self.isolated(), torch.enable_grad():
            self.place(point)
            self.num_grads += 1
            loss, gradient, squares, reached = 0.0, list[Tensor](), list[Tensor](), False
            for micro in self._micro_batches:
                loss += self._backward(micro, inspect)
                reached = reached or any(p.grad is not None for p in self.parameters)
                part = [_take_gradient(p) for p in self.parameters]
                part = part if self.loss_scale == 1 else [g / self.loss_scale for g in part]
                if len(self._micro_batches) > 1:
                    squares.append(vectors.norm(part).square())
                gradient = [a + b for a, b in zip(gradient, part, strict=True)] if gradient else part
            if not reached:
                raise ValueError(
                    "Parameter `loss_fn` should return a loss that depends on the parameters the optimizer holds. "
                    "Found no gradient for any of them; does it use another model than the one it is given?"
                )
            return Evaluation(self._averaged(loss), gradient, self._variance(gradient, squares))

    def value(self, point: Vector | None = None) -> float:
        """Returns the loss at ``point`` by forward passes only."""
        # Gradients stay enabled although none is taken: compiled models and fused kernels differ without.
        with self.isolated(), torch.enable_grad():
            self.place(point)
            return self._averaged(sum(float(self._loss(micro).detach()) for micro in self._micro_batches))

    def losses(self) -> Iterator[Tensor]:
        """Yields this rank's share of each micro-batch in the loss at the present parameters, with its graph.

        For derivatives that ``backward`` does not give; to be used inside ``isolated``.
        """
        with no_sync(self.model):
            for micro in self._micro_batches:
                yield self._loss(micro)

    def halves(self) -> tuple["Objective", "Objective"]:
        """Returns the loss on two disjoint halves of the data, each weighted as if it were the whole.

        Several micro-batches are dealt out in turn; a single one is cut along the first dimension of its tensors.

        Raises:
            ValueError: If there is only one micro-batch and it cannot be cut.
        """
        if len(self._micro_batches) > 1:
            weights = [self._weight(micro) for micro in self._micro_batches]
            parts = []
            for chosen in (slice(0, None, 2), slice(1, None, 2)):
                scale = sum(weights) / sum(weights[chosen])
                pairs = zip(self._micro_batches[chosen], weights[chosen], strict=True)
                parts.append([replace(micro, weight=weight * scale) for micro, weight in pairs])
        else:
            (micro,) = self._micro_batches
            parts = [[replace(micro, batch=half)] for half in cut(micro.batch)]
        halves = []
        for part in parts:
            half = copy.copy(self)
            half._micro_batches = part
            halves.append(half)
        return halves[0], halves[1]

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """Saves everything an evaluation may touch and puts it back; cheap when already inside."""
        if self._isolated:
            yield
            return
        random_state = RandomState.capture(devices_of(self.parameters))
        reshard(self.model)
        values, tensors, contents = self.point(), self._state.tensors(), self._state.values()
        start = self._micro_batches[0].state or ()
        self._start_state = [*start, *contents[len(start) :]]
        self._state.mark()
        gradients = [p.grad for p in self._holders]
        self._strays, self._traced = {}, set()
        # Gradients that are views into a bucket (DDP) are overwritten by the next backward.
        buckets = [None if g is None or not g._is_view() else g.clone() for g in gradients]
        modes = [(module, module.training) for module in self.model.modules()]
        narrow = [t.data for t in self._widened]
        for tensor in self._widened:
            tensor.data = tensor.data.float()
        self._isolated = True
        Objective.num_isolated += 1
        try:
            yield
        finally:
            self._isolated = False
            Objective.num_isolated -= 1
            reshard(self.model)
            for tensor, data in zip(self._widened, narrow, strict=True):
                tensor.grad = None
                tensor.data = data
            vectors.assign_(self.parameters, values)
            self._state.put_back(tensors, contents)
            for leaf, stray in self._strays.items():
                leaf.grad = stray
            for parameter, gradient, bucket in zip(self._holders, gradients, buckets, strict=True):
                parameter.grad = gradient
                if gradient is not None and bucket is not None:
                    gradient.copy_(bucket)
            for module, mode in modes:
                module.training = mode
            random_state.restore()
            if self._state.notice():
                warnings.warn(
                    "loss_fn changed parameters that the optimizer does not hold, at this measurement for the first "
                    "time, so this once they could not be put back: the run is not what it would have been without "
                    "the probe. From now on they are.",
                    SmoothdiagWarning,
                )

    def state(self) -> list[Tensor]:
        """Returns copies of what forward passes change beside the parameters, as it is now."""
        return self._state.values()

    def place(self, point: Vector | None = None, state: Vector | None = None) -> None:
        """Moves to ``point``, and the rest to ``state`` or back to the start; to be used inside ``isolated``."""
        reshard(self.model)
        if point is not None:
            vectors.assign_(self.parameters, point)
        self._state.assign(self._start_state if state is None else state)
        for parameter in self._holders:
            parameter.grad = None
        # Autocast keeps cast copies of the weights while its region lasts: they are of another point.
        torch.clear_autocast_cache()

    def _backward(self, micro: MicroBatch, inspect: Callable[[Tensor], None] | None) -> float:
        loss = self._loss(micro)
        if not loss.requires_grad:
            raise ValueError(
                "Parameter `loss_fn` should return a loss that depends on the trainable parameters. "
                "Found a detached tensor; is it computed under no_grad, or from .item() or .detach()?"
            )
        if inspect is not None:
            inspect(loss)
        if id(micro) not in self._traced:
            self._traced.add(id(micro))
            held = {id(p) for p in self._holders}
            # Tensors that belong to another optimizer, or to the loss itself, get gradients too.
            self._strays |= {leaf: leaf.grad for leaf in leaves_of(loss) if id(leaf) not in held}
        for leaf in self._strays:
            leaf.grad = None
        loss.backward(torch.full_like(loss, self.loss_scale))  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _loss(self, micro: MicroBatch) -> Tensor:
        """Returns the share of one micro-batch in the loss."""
        micro.random_state.restore()
        # A copy each time: loss_fn may write to tensors and take entries out of containers.
        batch = map_tensors(micro.batch, self._copy)
        try:
            loss = self._loss_fn(self.model, batch)
        except Exception as error:
            error.add_note("This came from loss_fn(model, batch), called again by the probe to measure.")
            raise
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"Parameter `loss_fn` should return a scalar tensor. Found {found}.")
        loss = loss.reshape(())
        if micro.weight is not None:
            return loss * micro.weight
        # Divided as a training loop divides, not multiplied by the reciprocal: the two differ in the last bit.
        return loss / len(self._micro_batches) if self._reduction == "mean" else loss

    def _averaged(self, loss: float) -> float:
        return vectors.mean_over_ranks(loss, self.parameters[0]) if self.distributed else loss

    def _copy(self, tensor: Tensor) -> Tensor:
        twin = copied(tensor)
        return (widened(twin) if self._widened else twin).requires_grad_(tensor.requires_grad)

    def _weight(self, micro: MicroBatch) -> float:
        if micro.weight is not None:
            return micro.weight
        return 1 / len(self._micro_batches) if self._reduction == "mean" else 1.0

    def _variance(self, gradient: Vector, squares: Sequence[Tensor]) -> float:
        k = len(squares)
        if k < 2 or len({micro.weight for micro in self._micro_batches}) > 1:
            return math.nan
        # The parts g_i add up to g, for a mean as for a sum: Var(g) = k Var(g_i), unbiased with k - 1.
        spread = k * torch.stack(list(squares)).sum() - vectors.norm(gradient).square()
        return float(spread) / (k - 1)


def _take_gradient(parameter: nn.Parameter) -> Tensor:
    """Returns the gradient and takes it away from the parameter; zeros where there is none."""
    gradient, parameter.grad = parameter.grad, None
    if gradient is None:
        return torch.zeros_like(parameter, requires_grad=False)
    if gradient.is_sparse:
        return gradient.detach().to_dense()
    # A view into a bucket (DDP) is overwritten by the next backward.
    return gradient.detach().clone() if gradient._is_view() else gradient.detach()
