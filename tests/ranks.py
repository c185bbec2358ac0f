"""Processes that work on one problem together, each as one rank."""

import torch


def run_ranks(work, folder, world: int) -> list:
    """Runs ``work(rank, folder)`` in processes of their own, and returns what they left in ``rank<n>.pt``."""
    context = torch.multiprocessing.get_context("spawn")
    ranks = [context.Process(target=work, args=(rank, str(folder))) for rank in range(world)]
    try:
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(timeout=300)
        assert [rank.exitcode for rank in ranks] == [0] * world
    finally:
        for rank in ranks:
            rank.kill()
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(world)]
