"""Collectives: what processes of a run tell each other, and what the host reads from a device."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from smoothdiag.vectors import local


def mean_over_ranks(value: float, like: Tensor) -> float:
    """Returns the mean of a number over all ranks; every rank must call it. ``like`` gives the device to use."""
    total = torch.tensor(value, dtype=torch.float64, device=local(like).device)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def max_over_ranks(value: int, like: Tensor, group: "dist.ProcessGroup | None" = None) -> int:
    """Returns the largest of a number over all ranks; every rank must call it. ``like`` gives the device to use."""
    largest = torch.tensor(int(value), dtype=torch.int64, device=local(like).device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return int(largest)


def of_first_rank(value: int, like: Tensor, group: "dist.ProcessGroup | None" = None) -> int:
    """Returns the number of the first rank; every rank must call it. ``like`` gives the device to use."""
    sent = torch.tensor(value, dtype=torch.int64, device=local(like).device)
    dist.broadcast(sent, group_src=0, group=group)
    return int(sent)


def read(parts: Sequence[Tensor], over: "Mapping[dist.ProcessGroup, Sequence[int]]") -> npt.NDArray[np.float64]:
    """Returns numbers of the device on the host; what a measurement reads, it reads here, and waits for the device.

    Args:
        parts: Tensors of one dimension.
        over: Groups of ranks, and the indices of the numbers to sum over them. Every rank must call this alike.
    """
    device = parts[0].device
    values = torch.cat([x.to(device, torch.float64) for x in parts])
    for group, summed in over.items():
        if len(summed) == len(values):
            dist.all_reduce(values, group=group)
            continue
        where = torch.tensor(summed, device=device)
        part = values[where]
        dist.all_reduce(part, group=group)
        values = values.index_copy(0, where, part)
    found: npt.NDArray[np.float64] = values.cpu().numpy()
    return found


def num_ranks() -> int:
    """Returns the number of all ranks."""
    return dist.get_world_size()
