"""Ranks: measures together with the other processes of a run, and goes on together after a fault."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum

import torch.distributed as dist
from torch import Tensor, nn

from smoothdiag import collectives
from smoothdiag.measure.loss.faults import PeerFailed
from smoothdiag.measure.loss.replicas import Replicas
from smoothdiag.measure.probe.sharded import Shards


class Outlook(IntEnum):
    """What may be wrong with a step that is to be measured, from harmless to worst."""

    FINE = 0
    CHANGED = 1
    """A tensor of its micro-batches was overwritten."""
    UNSEEN = 2
    """Its micro-batches are not known, but the probe has kept others."""
    MISSING = 3
    """There is nothing to measure it on."""
    FAILED = 4
    """An error was kept for it."""


class Ranks:
    """Keeps the processes of a run in step; does nothing if there is only one process.

    Args:
        model: The model.
        parameters: The coordinates x.

    Attributes:
        replicas: The model's modules under DistributedDataParallel.
        shards: The model's modules under FSDP2.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        self.replicas, self.shards = Replicas(model, parameters), Shards(model)

    @property
    def group(self) -> "dist.ProcessGroup | None":
        """The ranks that measure together; ``None`` for all."""
        return self.replicas.group if self.replicas else None

    def worst(self, local: Outlook, like: Tensor, fault: Exception | None, *, distributed: bool) -> Outlook:
        """Returns the worst outlook of all ranks, each of which calls this with its own.

        Args:
            local: The outlook of this rank.
            like: A tensor on the device of this rank.
            fault: The error that was kept for the step, which is raised once the other ranks know of it.
            distributed: Whether there are other ranks.

        Raises:
            PeerFailed: If another rank has kept an error for the step.
        """
        worst = Outlook(collectives.max_over_ranks(local, like, self.group)) if distributed else local
        if fault is not None:
            raise fault
        if worst is Outlook.FAILED:
            raise PeerFailed("Another rank could not prepare this measurement; its warning names the cause.")
        return worst

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Ends alike on all ranks, and restores the wrappers of the model if an exception is raised inside.

        Put it around whatever may fail without ending the run. It may be nested; call ``meet`` before each inner one.

        Raises:
            PeerFailed: If only other ranks raised an exception.
            NotPutBack: If the other ranks cannot be told, or the state of the wrappers cannot be restored.
        """
        with self.replicas.in_step(), self.shards.mended():
            yield

    def meet(self) -> None:
        """Makes sure that all ranks have reached this call.

        Raises:
            PeerFailed: If a rank failed before.
        """
        self.replicas.meet()

    def check_pending(self) -> None:
        """Raises a RuntimeError if the training loop left something unfinished that a measurement would disturb."""
        if pending := self.replicas.pending() or self.shards.pending():
            raise RuntimeError(f"A step can be measured only when its gradients are complete. Found {pending}.")
