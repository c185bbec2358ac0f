"""Processes that work on one problem together, each as one rank."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(
    work: Callable[..., None], folder: Path, world: int, *args: Any, timeout: float = 900, weights_only: bool = True
) -> list[dict[Any, Any]]:
    """Runs ``work(rank, folder, *args)`` in processes of their own, and returns what they left in ``rank<n>.pt``."""
    context = torch.multiprocessing.get_context("spawn")
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


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Makes this process a group of one, for as long as it lasts."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
