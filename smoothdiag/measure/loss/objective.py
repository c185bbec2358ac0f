"""Objective: the loss on fixed data as a deterministic function of the parameters."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from smoothdiag import vectors
from smoothdiag.measure.loss.batches import MicroBatch
from smoothdiag.measure.loss.coordinates import reshard
from smoothdiag.measure.loss.graph import leaves_of
from smoothdiag.measure.loss.isolation import Isolated, isolation
from smoothdiag.measure.loss.replicas import Replicas
from smoothdiag.measure.loss.shares import LossFn, Reduction
from smoothdiag.measure.loss.state import ModuleState, Snapshot
from smoothdiag.measure.loss.sweeps import Evaluation, Sweeps
from smoothdiag.packing import Kept, Packing
from smoothdiag.vectors import Vector

__all__ = ["Evaluation", "LossFn", "Objective", "Reduction"]


class Objective(Sweeps):
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
        super().__init__(model, loss_fn, micro_batches, reduction)
        self.parameters = list(parameters)
        self.packing, self._host = Packing(self.parameters) if packing is None else packing, host
        self.replicas = Replicas(model, self.parameters) if replicas is None else replicas
        self.num_grads = self.num_reverse = 0
        self.loss_scale = 1.0
        self._state = ModuleState(model, loss_fn) if state is None else state
        # DistributedDataParallel no longer averages parameters that have changed their dtype.
        self._widens = widen_half and not self.replicas
        self._isolated: Isolated | None = None
        self._traced: set[int] = set()
        self.distributed = distributed

    def point(self) -> list[Tensor]:
        """Returns a copy of the present parameter values."""
        return vectors.clone(self.parameters)

    def losses(self) -> Iterator[Tensor]:
        """Yields this rank's share of each micro-batch in the loss, with its graph; call it inside ``isolated``."""
        with self.replicas.apart():
            for micro in self._micro_batches:
                yield self._loss(micro)

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
        try:
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
        finally:
            self.packing.release()

    @property
    def end(self) -> Kept:
        """The parameters as ``isolated`` found them, inside of it. They are put back from here, so it gives copies."""
        assert self._isolated is not None
        return self._isolated.parameters.guarded()

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

    def _backward(
        self, micro: MicroBatch, inspect: Callable[[Tensor], None] | None, within: AbstractContextManager[Any]
    ) -> Tensor:
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
            strays = [leaf for leaf in leaves_of(loss) if id(leaf) not in held]
            known = self._isolated.strays  # what they hold now may come from an evaluation of another micro-batch
            known.update({leaf: leaf.grad for leaf in strays if leaf not in known})
            self._state.strays.meet(strays)
        for leaf in self._isolated.strays:
            leaf.grad = None
        with self.replicas.unseen(), within:
            loss.backward(torch.full_like(loss, self.loss_scale))  # type: ignore[no-untyped-call]
        return loss.detach()

    @property
    def widened_dtypes(self) -> set[torch.dtype]:
        """The training dtypes of parameters outside x that are widened now, inside ``isolated``."""
        return set() if self._isolated is None else self._isolated.widened_dtypes

    @property
    def _is_widened(self) -> bool:
        return self._isolated is not None and self._isolated.is_widened
