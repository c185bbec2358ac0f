"""Objective: the loss on fixed data as a deterministic function of the parameters."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from smoothdiag import vectors
from smoothdiag.measure.loss.batches import MicroBatch, copied, cut, map_tensors
from smoothdiag.measure.loss.coordinates import reshard
from smoothdiag.measure.loss.delivery import ArrivedTwice, Delivery, Take, take_gradient
from smoothdiag.measure.loss.graph import leaves_of
from smoothdiag.measure.loss.isolation import Isolated, isolation
from smoothdiag.measure.loss.replicas import Replicas
from smoothdiag.measure.loss.state import ModuleState, Snapshot
from smoothdiag.packing import Kept, Packing, Tally
from smoothdiag.vectors import Vector

LossFn = Callable[[nn.Module, Any], Tensor]
Reduction = Literal["mean", "sum"]
WHOLE = "whole gradient"
"""Name of the sums of a sweep for the gradient, where the sweep itself needs them."""

Place = Callable[[Tally, int, list[Tensor]], None]
"""Moves the parameters of one piece of x, given by its number, to a point; it may add sums to the tally."""


@dataclass(frozen=True)
class Evaluation:
    """The loss and its gradient at one point.

    Attributes:
        loss: Loss [f].
        gradient: Gradient [f/x], one tensor per parameter.
        variance: Trace of the covariance of ``gradient`` [f^2/x^2], estimated from micro-batches of equal
            weight; NaN if there is only one.
    """

    loss: float
    gradient: list[Tensor] = field(repr=False)
    variance: float = math.nan


class Objective:
    """The loss on fixed micro-batches as a function of the parameters alone.

    Every evaluation sees the same data, random numbers and buffers. It leaves no trace: afterwards parameters, buffers,
    ``.grad``, train or eval mode and random states are what they were, bit for bit. The gradient is taken by
    ``backward`` with the parameters moved in place, because every model that can be trained supports that. Under data
    parallelism it is the gradient averaged over ranks.

    Args:
        model: The model that ``loss_fn`` is called with.
        loss_fn: ``loss_fn(model, batch)`` returns the scalar loss of one micro-batch.
        micro_batches: The data of the loss.
        parameters: The coordinates x; other parameters do not move.
        state: Knows what forward passes change besides x; ``None`` makes a new one.
        reduction: ``"mean"`` or ``"sum"`` of the micro-batch losses that have no weight of their own.
        widen_half: Whether to evaluate float16 and bfloat16 parameters and buffers in float32, so that points and
            gradients are not rounded to 8 or 11 bits.
        distributed: Whether gradients, and with them the loss, are averaged over ranks.
        replicas: The model's modules under DistributedDataParallel, kept from one measurement to the next.
        packing: How x lies in pieces; ``None`` makes a new one.
        host: Host memory for the present parameters while the loss is evaluated, as ``Packing.host_memory`` returns it;
            ``None`` keeps them on their devices.

    Attributes:
        model: The model.
        parameters: The coordinates x.
        distributed: Whether the loss is a mean over ranks.
        num_grads: Gradients evaluated so far.
        num_reverse: What differentiating twice has cost so far, in gradients; ``num_grads`` leaves it out.
        loss_scale: Factor on the loss during ``backward``, so that float16 gradients do not underflow; it is divided
            by 16 when they overflow.
        num_isolated: How many objectives of the process are being evaluated at the moment.

    Examples:
        >>> problem = sd.problems.quadratic([1.0, 3.0])
        >>> loss = sd.objective(problem.as_module(torch.ones(2)), lambda model, batch: model(), [None])
        >>> found = loss.evaluate([torch.tensor([2.0, 1.0])])
        >>> print(found.loss, found.gradient[0].tolist())
        3.5 [2.0, 3.0]
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
        replicas: Replicas | None = None,
        packing: Packing | None = None,
        host: Sequence[Tensor] | None = None,
    ) -> None:
        self.parameters = list(parameters)
        self.packing, self._host = Packing(self.parameters) if packing is None else packing, host
        self.replicas = Replicas(model, self.parameters) if replicas is None else replicas
        self.num_grads = self.num_reverse = 0
        self.loss_scale = 1.0
        self.model, self._loss_fn = model, loss_fn
        self._micro_batches, self._reduction = list(micro_batches), reduction
        self._state = ModuleState(model, loss_fn) if state is None else state
        # DistributedDataParallel no longer averages parameters that have changed their dtype.
        self._widens = widen_half and not self.replicas
        self._isolated: Isolated | None = None
        self._traced: set[int] = set()
        self.distributed = distributed

    @property
    def num_micro_batches(self) -> int:
        """Number of micro-batches in the loss."""
        return len(self._micro_batches)

    def point(self) -> list[Tensor]:
        """Returns a copy of the present parameter values."""
        return vectors.clone(self.parameters)

    def evaluate(self, point: Vector | None = None, inspect: Callable[[Tensor], None] | None = None) -> Evaluation:
        """Returns the loss and its gradient at ``point`` (default: the present parameter values).

        Args:
            point: Where to evaluate, one tensor per parameter.
            inspect: Called with the loss of each micro-batch before ``backward``.

        Raises:
            ValueError: If ``loss_fn`` returns anything but a scalar tensor that depends on the parameters.
        """
        gradient: list[Any] = [None] * len(self.parameters)

        def keep(tally: Tally, k: int, found: list[Tensor]) -> None:
            for i, g in zip(tally.packing.pieces[k].indices, found, strict=True):
                gradient[i] = g

        tally = self.sweep(point, keep, inspect)
        return Evaluation(tally.total("loss"), gradient, self.variance(tally))

    def sweep(
        self,
        point: Vector | Place | None,
        take: Callable[[Tally, int, list[Tensor]], None],
        inspect: Callable[[Tensor], None] | None = None,
    ) -> Tally:
        """Evaluates the gradient at a point, and hands it on piece by piece, so that it need not be held as a whole.

        Args:
            point: Where to evaluate: a vector, or a function that moves the parameters of one piece there.
            take: Called with the gradients of each piece, which it must not write to. It may add sums to the tally.
            inspect: As in ``evaluate``.

        Returns:
            What ``point`` and ``take`` have added, and the ``loss``.
        """
        while True:
            tally = Tally(self.packing)
            try:
                self._sweep(tally, point, take, inspect)
            except ArrivedTwice:
                self._state.hands_on = False
                continue
            if self.loss_scale == 1 or not math.isfinite(tally.total("loss")) or math.isfinite(tally.total(WHOLE)):
                return tally
            self.loss_scale /= 16

    def _sweep(
        self,
        tally: Tally,
        point: Vector | Place | None,
        take: Callable[[Tally, int, list[Tensor]], None],
        inspect: Callable[[Tensor], None] | None,
    ) -> None:
        with self.isolated(), torch.enable_grad():
            self.place(point if point is None or isinstance(point, Sequence) else partial(point, tally))
            self.num_grads += 1
            total: dict[int, list[Tensor]] = {}
            num, reached = len(self._micro_batches), False
            loss = self._nothing()
            # Averages over replicas and gathered shards come after backward, so hooks within it do not see them.
            early = self._state.hands_on and not self.distributed
            for number, micro in enumerate(self._micro_batches, start=1):

                def arrive(k: int, found: list[Tensor], is_last: bool = number == num) -> None:
                    if num > 1:
                        tally.squares(k, ["micro"], _itself, tally.packing.pieces[k].of(found))
                        before = total.pop(k, None)
                        found = found if before is None else [a + b for a, b in zip(before, found, strict=True)]
                    if not is_last:
                        total[k] = found
                        return
                    if num > 1 or self.loss_scale != 1:
                        tally.squares(k, [WHOLE], _itself, tally.packing.pieces[k].of(found))
                    take(tally, k, found)

                if self.replicas:
                    share, is_reached = self._average(micro, inspect, arrive)
                else:
                    delivery = Delivery(
                        self.packing, self.parameters, lambda k, found: arrive(k, self._unscaled(found)), early=early
                    )
                    with delivery:
                        share = self._backward(micro, inspect)
                    delivery.finish()
                    is_reached = delivery.has_any
                loss, reached = loss + share.to(loss), reached or is_reached
            if not reached:
                raise ValueError(
                    "Parameter `loss_fn` should return a loss that depends on the parameters the optimizer holds. "
                    "Found no gradient for any of them. Let loss_fn use the model that it is given, not another one."
                )
            self._add_loss(tally, loss)

    def _average(
        self, micro: MicroBatch, inspect: Callable[[Tensor], None] | None, arrive: Take
    ) -> tuple[Tensor, bool]:
        """Takes the mean of one micro-batch over replicas: hands on its gradient, and returns its loss."""
        with self.replicas.apart():
            share = float(self._backward(micro, inspect))
            reached = any(p.grad is not None for p in self.parameters)
            part = self._unscaled([take_gradient(p) for p in self.parameters])
        share, part = self.replicas.average(share, part)
        for k in range(len(self.packing.pieces)):
            arrive(k, self.packing.take(k, part))
        return torch.tensor(share, dtype=torch.float64), reached

    def _unscaled(self, gradients: list[Tensor]) -> list[Tensor]:
        return gradients if self.loss_scale == 1 else [g / self.loss_scale for g in gradients]

    def variance(self, tally: Tally) -> float:
        """Returns ``Evaluation.variance`` of a sweep."""
        k = len(self._micro_batches)
        if k < 2 or len({micro.weight for micro in self._micro_batches}) > 1:
            return math.nan
        # The parts g_i add up to g, for a mean as for a sum: Var(g) = k Var(g_i), unbiased with k - 1.
        return (k * tally.total("micro") - tally.total(WHOLE)) / (k - 1)

    def value(self, point: Vector | None = None) -> float:
        """Returns the loss at ``point`` by forward passes only."""
        return self.look(point).total("loss")

    def look(self, point: Vector | Place | None) -> Tally:
        """Evaluates the loss alone, by forward passes; the tally is as for ``sweep``."""
        tally = Tally(self.packing)
        # Gradients stay enabled although none is taken: without them, compiled models and fused kernels differ.
        with self.isolated(), torch.enable_grad():
            self.place(point if point is None or isinstance(point, Sequence) else partial(point, tally))
            loss = self._nothing()
            with self.replicas.apart():
                for micro in self._micro_batches:
                    loss = loss + self._loss(micro).detach().to(loss)
            self._add_loss(tally, loss.new_tensor(self.replicas.mean(float(loss))) if self.replicas else loss)
        return tally

    def _nothing(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.parameters[0].device)

    def _add_loss(self, tally: Tally, loss: Tensor) -> None:
        # With replicas the loss is a mean already.
        tally.number("loss", loss, is_mean=self.distributed and not self.replicas)

    def losses(self) -> Iterator[Tensor]:
        """Yields this rank's share of each micro-batch in the loss, with its graph; call it inside ``isolated``."""
        with self.replicas.apart():
            for micro in self._micro_batches:
                yield self._loss(micro)

    def halves(self) -> tuple["Objective", "Objective"]:
        """Returns the loss on two disjoint halves of the data, each weighted as if it were the whole.

        Several micro-batches go to the halves in turn; a single one is cut along the first dimension of its tensors.

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
        if self._isolated is not None:
            yield
            return
        start = self._micro_batches[0].state
        keep = partial(
            self.packing.keep, self.parameters, host=self._host, lends=lambda x: self._widens and vectors.is_half(x)
        )
        with isolation(self.model, self.parameters, self._state, start, keep, widen_half=self._widens) as isolated:
            if modules := self.replicas.broadcasting():
                # The loop's forward pass began with the buffers of the first rank, so these begin with them too.
                isolated.start.assign()
                self.replicas.broadcast_buffers(modules)
                isolated.start = self.state()
            self._isolated, self._traced = isolated, set()
            Objective.num_isolated += 1
            try:
                yield
            finally:
                self._isolated = None
                Objective.num_isolated -= 1

    @property
    def end(self) -> Kept:
        """The parameters as ``isolated`` found them, inside of it."""
        assert self._isolated is not None
        return self._isolated.parameters

    def state(self) -> Snapshot:
        """Returns the present state of what forward passes change besides the parameters."""
        return self._state.snapshot({id(p) for p in self.parameters})

    def place(
        self, point: Vector | Callable[[int, list[Tensor]], None] | None = None, state: Snapshot | None = None
    ) -> None:
        """Moves to ``point``, and the rest to ``state`` or back to the start; call it inside ``isolated``.

        A function as ``point`` is called with the number of each piece of x and the tensors to write to.
        """
        assert self._isolated is not None
        reshard(self.model)
        if isinstance(point, Kept):
            point.restore(self.parameters)
        elif isinstance(point, Sequence):
            vectors.assign_(self.parameters, point)
        elif point is not None:
            for k in range(len(self.packing.pieces)):
                point(k, self.packing.take(k, self.parameters))
        (self._isolated.start if state is None else state).assign(widen=self._isolated.is_widened)
        for parameter in self._isolated.holders:
            parameter.grad = None
        # Autocast keeps cast copies of the weights while its region lasts; they belong to another point.
        torch.clear_autocast_cache()

    def _backward(self, micro: MicroBatch, inspect: Callable[[Tensor], None] | None) -> Tensor:
        loss = self._loss(micro)
        if not loss.requires_grad:
            raise ValueError(
                "Parameter `loss_fn` should return a loss that depends on the trainable parameters. "
                "Found a detached tensor: look for no_grad, .item() or .detach() in loss_fn."
            )
        if inspect is not None:
            inspect(loss)
        assert self._isolated is not None
        if id(micro) not in self._traced:
            self._traced.add(id(micro))
            held = {id(p) for p in self._isolated.holders}
            # Tensors that belong to another optimizer, or to the loss itself, get gradients too.
            self._isolated.strays.update({leaf: leaf.grad for leaf in leaves_of(loss) if id(leaf) not in held})
        for leaf in self._isolated.strays:
            leaf.grad = None
        with self.replicas.unseen():
            loss.backward(torch.full_like(loss, self.loss_scale))  # type: ignore[no-untyped-call]
        return loss.detach()

    def _loss(self, micro: MicroBatch) -> Tensor:
        """Returns the share of one micro-batch in the loss."""
        micro.random_state.restore()
        # A copy each time: loss_fn may write to tensors and take entries out of containers.
        batch = map_tensors(micro.batch, self._copy)
        try:
            loss = self._loss_fn(self.model, batch)
        except Exception as error:
            error.add_note("This error came from loss_fn(model, batch), which was called again to measure.")
            if self._is_widened:
                error.add_note(
                    "Parameters in float16 or bfloat16 are float32 while they are measured. If loss_fn casts tensors "
                    "by hand, let it cast to the present dtype of the model: x.to(next(model.parameters()).dtype)."
                )
            raise
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"Parameter `loss_fn` should return a scalar tensor, such as a mean. Found {found}.")
        loss = loss.reshape(())
        if micro.weight is not None:
            return loss * micro.weight
        # A training loop divides too; multiplying by the reciprocal would differ in the last bit.
        return loss / len(self._micro_batches) if self._reduction == "mean" else loss

    def _copy(self, tensor: Tensor) -> Tensor:
        twin = copied(tensor)
        return (vectors.widened(twin) if self._is_widened else twin).requires_grad_(tensor.requires_grad)

    @property
    def widened_dtypes(self) -> set[torch.dtype]:
        """The training dtypes of parameters outside x that are widened now, inside ``isolated``."""
        return set() if self._isolated is None else self._isolated.widened_dtypes

    @property
    def _is_widened(self) -> bool:
        return self._isolated is not None and self._isolated.is_widened

    def _weight(self, micro: MicroBatch) -> float:
        if micro.weight is not None:
            return micro.weight
        return 1 / len(self._micro_batches) if self._reduction == "mean" else 1.0


def _itself(piece: Tensor) -> list[Tensor]:
    return [vectors.wide(piece)]
