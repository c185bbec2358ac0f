"""Replicas: gradients under DistributedDataParallel without its reducer, which a fault would leave half-way."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from smoothdiag.measure.loss.agreement import all_failed, positions
from smoothdiag.measure.loss.faults import NotPutBack, PeerFailed
from smoothdiag.vectors import Vector

BUCKET = 25 * 2**20
"""Bytes averaged at once, as in DistributedDataParallel."""

Buckets = list[tuple["dist.ProcessGroup", Tensor]]


class Replicas:
    """The modules of a model that are copied to all ranks (DistributedDataParallel); false if there are none.

    The ranks measure in step although any of them may fail. Forward and backward passes run inside ``apart``, where
    they call no collective. ``mean``, ``average`` and ``broadcast_buffers`` do call collectives: they allocate what
    they need, then ask by one collective of two numbers whether all ranks have come so far, and go on only then. A rank
    that fails anywhere inside ``in_step`` takes part in one more such question, the next that the other ranks ask.

    Keep one object from measurement to measurement: it learns whether the loss calls collectives of its own.

    Args:
        model: The model.
        parameters: The coordinates x.

    Attributes:
        has_collectives: Whether the loss calls collectives itself (SyncBatchNorm, gathered embeddings). Other ranks may
            then wait inside the loss for a rank that has failed and cannot tell them, so the run ends unless all ranks
            fail at the same place.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        self.modules = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
        self.has_collectives = any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
        managed: dict[nn.Parameter, dict[dist.ProcessGroup, None]] = {}
        for module in self.modules:
            for name, parameter in module.module.named_parameters():
                if name not in module.parameters_to_ignore:
                    managed.setdefault(parameter, {})[module.process_group] = None
        self._managed = list(managed)
        held = set(map(id, parameters))
        self._own = [m for m in self.modules if any(id(p) in held for p in m.parameters())]
        self._groups = [tuple(managed.get(parameter, ())) for parameter in parameters]
        self._told: Exception | None = None
        # Allocated now, because there may be no memory when it is needed.
        self._message = torch.zeros(2, dtype=torch.float64, device=parameters[0].device)

    def __bool__(self) -> bool:
        return bool(self.modules)

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Ends on all ranks alike: by the exception raised inside, or by PeerFailed if only other ranks raised one.

        It may be nested; ranks are told of an exception once. If code goes on after the exception of an inner scope,
        call ``meet`` before that scope: otherwise ranks inside would take a failure outside for their own.

        Raises:
            NotPutBack: From the exception, if the other ranks cannot be told about that exception.
        """
        if not self:
            yield
            return
        self._told = None
        self._rebuild()
        try:
            yield
            self.mean(0.0)
        except (PeerFailed, NotPutBack):
            raise
        except Exception as error:
            if error is not self._told:
                self._tell(error)
                self._told = error
            raise

    def meet(self) -> None:
        """Makes sure that all ranks have reached this call.

        Raises:
            PeerFailed: If a rank failed before.
        """
        if self:
            self.mean(0.0)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Keeps forward and backward passes from calling collectives, and leaves the modules as they were.

        Gradients inside are the rank's own, not averaged.
        """
        flags = [module.require_forward_param_sync for module in self.modules]
        before = self._position()
        with ExitStack() as stack:
            for module in self.modules:
                stack.enter_context(module.no_sync())
                # Forward passes read this flag before they set it.
                module.require_forward_param_sync = False
            try:
                yield
            finally:
                for module, flag in zip(self.modules, flags, strict=True):
                    module.require_forward_param_sync = flag
        if self._position() != before:
            self.has_collectives = True

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Hides one backward pass from the reducers; the gradients are in ``.grad`` when it is over.

        Reducers that look for unused parameters note each gradient, also under no_sync. They expect it in the loop's
        next backward pass, which fails if it does not use the parameter.
        """
        taken: dict[Tensor, Tensor] = {}

        def take(parameter: Tensor) -> None:
            # Reducers look at ``.grad`` after this hook, and note nothing if it is None.
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                taken[parameter] = taken[parameter] + gradient if parameter in taken else gradient

        handles = [
            p.register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]
            for p in self._managed
            if p.requires_grad
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter, gradient in taken.items():
                parameter.grad = gradient

    def mean(self, value: float) -> float:
        """Returns the mean of a number over the ranks.

        Raises:
            PeerFailed: If another rank failed meanwhile.
        """
        failures, total = self._exchange(0.0, value)
        if failures:
            raise PeerFailed("Another rank failed in this measurement; the warning on that rank names the cause.")
        return total / self.group.size()

    def average(self, loss: float, gradient: Vector) -> tuple[float, list[Tensor]]:
        """Returns the means of a loss and its gradient over the ranks, equal to training bit for bit with two ranks.

        Raises:
            PeerFailed: If another rank failed meanwhile.
        """
        share, buckets = self._packed(gradient)
        loss = self.mean(loss)
        with _lost():
            for group, flat in buckets:
                dist.all_reduce(flat, group=group)
        return loss, share

    def pending(self) -> str:
        """Returns what in the training loop would bring a measurement out of step; "" if nothing."""
        joins = any(getattr(module, "_join_config", None) and module._join_config.enable for module in self.modules)
        return "a Join context, in which ranks without further data take part in no measurement" if joins else ""

    def broadcasting(self) -> list[DistributedDataParallel]:
        """Returns the modules whose next forward pass will fetch the buffers of the first rank; call it before."""
        return [module for module in self.modules if module.will_sync_module_buffers()]  # type: ignore[no-untyped-call]

    def broadcast_buffers(self, modules: Sequence[DistributedDataParallel]) -> None:
        """Gives buffers the values they have on the first rank, as forward passes of ``modules`` would have done.

        Raises:
            PeerFailed: If another rank failed meanwhile.
        """
        if not modules:
            return
        kinds: dict[tuple[dist.ProcessGroup, torch.dtype, torch.device], list[Tensor]] = {}
        for module in modules:
            for name, buffer in module.module.named_buffers():
                if name not in module.parameters_to_ignore:
                    kind = (module.process_group, buffer.dtype, buffer.device)
                    kinds.setdefault(kind, []).append(buffer.detach())
        packed = [(kind[0], bs, torch.cat([b.reshape(-1) for b in bs])) for kind, bs in kinds.items()]
        self.mean(0.0)
        with _lost():
            for group, buffers, flat in packed:
                dist.broadcast(flat, dist.get_global_rank(group, 0), group=group)
                for buffer, part in zip(buffers, torch.split(flat, [b.numel() for b in buffers]), strict=True):
                    buffer.data.copy_(part.view(buffer.shape))

    @property
    def group(self) -> "dist.ProcessGroup":
        """The ranks that measure together, which the outermost module names."""
        return self.modules[0].process_group

    def _packed(self, gradient: Vector) -> tuple[list[Tensor], Buckets]:
        """Returns this rank's share in the mean of a gradient, as views into the buckets to be summed."""
        share, buckets = list(gradient), Buckets()
        kinds: dict[tuple[tuple[dist.ProcessGroup, ...], torch.dtype, torch.device], list[int]] = {}
        for index, groups in enumerate(self._groups):
            if groups:
                kinds.setdefault((groups, share[index].dtype, share[index].device), []).append(index)
        for (groups, _, _), indices in kinds.items():
            for part in _parts(share, indices):
                flat = torch.cat([share[i].reshape(-1) for i in part])
                for index, piece in zip(part, torch.split(flat, [share[i].numel() for i in part]), strict=True):
                    share[index] = piece.view(share[index].shape)
                for group in groups:
                    # Scaled before the sum, as DistributedDataParallel does: the last bit depends on it.
                    flat *= 1 / group.size()
                    buckets.append((group, flat))
        return share, buckets

    def _position(self) -> dict[str, list[int]]:
        try:
            return positions() if self else {}
        except (RuntimeError, AttributeError):  # the backend does not count; then only types of layers tell
            return {}

    def _rebuild(self) -> None:
        """Lets reducers reorder their buckets, which they do once, in the forward pass after the first backward.

        Reordering calls collectives, which must not wait for a rank that has failed before its forward pass.
        """
        for module in self.modules:
            if not module._has_rebuilt_buckets and module.reducer._rebuild_buckets():
                module._has_rebuilt_buckets = True
            # A forward pass without a backward pass leaves a reducer waiting for gradients. It would take those of a
            # measurement for them, and after a fault it would wait for ever. Where x does not lie, the loop may still
            # call backward on such a pass, as a GAN does that trains the generator through an earlier output.
            is_settled = module._has_rebuilt_buckets or module.find_unused_parameters
            if module in self._own and is_settled and not module.static_graph:
                module.reducer._reset_state()

    def _tell(self, error: Exception) -> None:
        if self.has_collectives:
            if not all_failed(dist.get_process_group_ranks(self.group)):
                raise NotPutBack(
                    "A measurement failed on this rank, but not on all ranks at the same place. The loss calls "
                    "collectives of its own (as SyncBatchNorm does), in which the other ranks now wait for this one, "
                    "so the run cannot go on. Resume from a checkpoint; if memory ran out, measure fewer estimators."
                ) from error
            return
        try:
            self._exchange(1.0, 0.0)
        except NotPutBack as lost:
            raise lost from error

    def _exchange(self, *numbers: float) -> list[float]:
        with _lost():
            for index, number in enumerate(numbers):
                self._message[index].fill_(number)
            dist.all_reduce(self._message, group=self.group)
            found: list[float] = self._message.tolist()
        return found


@contextmanager
def _lost() -> Iterator[None]:
    """Turns an exception in a collective into NotPutBack: this rank no longer knows where the others are."""
    try:
        yield
    except Exception as error:
        raise NotPutBack(
            f"A collective of a measurement failed ({type(error).__name__}: {error}). The ranks are no longer in step, "
            "so the run cannot go on. Resume from the last checkpoint."
        ) from error


def _parts(gradient: Vector, indices: Sequence[int]) -> Iterator[list[int]]:
    """Yields runs of indices whose tensors fill a bucket."""
    part, size = list[int](), 0
    for index in indices:
        part.append(index)
        size += gradient[index].numel() * gradient[index].element_size()
        if size >= BUCKET:
            yield part
            part, size = [], 0
    if part:
        yield part
