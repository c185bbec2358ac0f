"""Processes that work on one problem together, each as one rank."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

LOADED = ["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "smoothdiag"]
"""Modules; an optimizer loads the first one when it is made."""


def run_ranks(
    work: Callable[..., None], folder: Path, world: int, *args: Any, timeout: float = 900, weights_only: bool = True
) -> list[dict[Any, Any]]:
    """Runs ``work(rank, folder, *args)`` in processes of their own, and returns what they left in ``rank<n>.pt``.

    A server that has loaded torch and the package once forks them. They know nothing else that this process has done.
    """
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LOADED)
    ranks = [context.Process(target=work, args=(rank, str(folder), *args)) for rank in range(world)]
    try:
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(timeout=timeout)
        assert [rank.exitcode for rank in ranks] == [0] * world
    finally:
        for rank in ranks:
            rank.kill()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=weights_only) for rank in range(world)]


def parted(tensors: Iterable[Tensor], rank: int | None, world: int) -> tuple[Tensor, ...]:
    """Returns a rank's part of a batch; for one process all parts, in an order in which halves are those of all ranks.

    Measurements of noise cut a batch in halves, and every rank cuts its own part.
    """
    parts = [t.chunk(world) for t in tensors]
    if rank is not None:
        return tuple(part[rank] for part in parts)
    return tuple(torch.cat([part.chunk(2)[half] for half in range(2) for part in found]) for found in parts)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Makes this process a group of one, for as long as it lasts."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
