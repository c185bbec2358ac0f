"""Ranks: measuring together with the other processes of a run, and going on together after a fault."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist
from torch import nn

from smoothdiag.measure.loss.replicas import Replicas
from smoothdiag.measure.probe.sharded import Shards


class Ranks:
    """What keeps the processes of a run in step; nothing at all where there is one.

    Args:
        model: The model.
        parameters: The coordinates x.

    Attributes:
        replicas: Its modules under DistributedDataParallel.
        shards: Its modules under FSDP2.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        self.replicas, self.shards = Replicas(model, parameters), Shards(model)

    @property
    def group(self) -> "dist.ProcessGroup | None":
        """The ranks that measure together; ``None`` for all."""
        return self.replicas.group if self.replicas else None

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Ends alike on all ranks, and leaves the wrappers of the model as they were if an exception is raised inside.

        It goes around whatever may fail and be survived, and may be nested; ``meet`` comes before each inner one.

        Raises:
            PeerFailed: If only others raised an exception.
            NotPutBack: If the others cannot be told, or the state of the wrappers cannot be restored.
        """
        with self.replicas.in_step(), self.shards.mended():
            yield

    def meet(self) -> None:
        """Makes sure that all ranks have come here.

        Raises:
            PeerFailed: If one failed before.
        """
        self.replicas.meet()

    def check_pending(self) -> None:
        """Raises a RuntimeError if the training loop has left something unfinished that a measurement would mix up."""
        if pending := self.replicas.pending() or self.shards.pending():
            raise RuntimeError(f"A step can be measured when its gradients are complete. Found {pending}.")
