"""Algebra of parameter lists: the only place that loops over parameters.

A vector is a non-empty sequence of tensors, one per parameter. Scalars come back as 0-dim float64 tensors on
the device of the first tensor, so that nothing here waits for a device; call ``float`` where a number is due.
Sharded tensors (DTensor) are taken for the whole they are part of: sums go over all ranks, so every rank must
make the same calls.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Shard

Vector = Sequence[Tensor]


def norms(a: Vector) -> Tensor:
    """Returns ||a_i|| for every tensor of the vector, shape (len(a),), accumulated in float64."""
    # foreach_norm with a float64 accumulator is 3x faster than (x * x).sum(dtype=float64) on a CPU.
    lengths = _stack(torch._foreach_norm([local(x) for x in a], 2, dtype=torch.float64))
    if not any(map(is_sharded, a)):
        return lengths
    return _sum_over_ranks(lengths.square(), a).sqrt()


def norm(a: Vector) -> Tensor:
    """Returns the Euclidean norm ||a||, a 0-dim float64 tensor."""
    return norms(a).square().sum().sqrt()


def dot(a: Vector, b: Vector) -> Tensor:
    """Returns <a, b>, a 0-dim float64 tensor."""
    products = [(_wide(local(x)) * _wide(local(y))).sum(dtype=torch.float64) for x, y in zip(a, b, strict=True)]
    return _sum_over_ranks(_stack(products), a).sum()


def sub(a: Vector, b: Vector) -> list[Tensor]:
    """Returns a - b in float32 or wider, so that bfloat16 differences are exact before they are rounded."""
    return [_wide(x) - _wide(y) for x, y in zip(a, b, strict=True)]


def add_scaled(a: Vector, b: Vector, alpha: float) -> list[Tensor]:
    """Returns a + alpha b in the dtypes of ``a``."""
    return [(_wide(x) + alpha * _wide(y)).to(x.dtype) for x, y in zip(a, b, strict=True)]


def clone(a: Vector) -> list[Tensor]:
    """Returns copies that share no memory with ``a`` and belong to no graph."""
    return [x.detach().clone() for x in a]


def assign_(a: Vector, b: Vector) -> None:
    """Copies ``b`` into ``a`` in place, unseen by autograd: graphs that hold ``a`` stay valid."""
    for x, y in zip(a, b, strict=True):
        x.data.copy_(y)


def random_like(a: Vector, *, seed: int) -> list[Tensor]:
    """Returns standard normal numbers in the shapes and dtypes of ``a`` from a private generator on the CPU."""
    generators: dict[int, torch.Generator] = {}
    result = []
    for x in a:
        # Shards on different ranks must differ; equal copies on different ranks must not.
        rank = dist.get_rank() + 1 if isinstance(x, DTensor) and any(map(_is_shard, x.placements)) else 0
        if rank not in generators:
            generators[rank] = torch.Generator().manual_seed(seed + 7919 * rank)
        drawn = torch.empty_like(x, requires_grad=False)
        local(drawn).copy_(torch.randn(local(x).shape, generator=generators[rank]))
        result.append(drawn)
    return result


def synchronize(a: Vector) -> None:
    """Waits until the devices that hold ``a`` have done all they were given."""
    for device in {x.device for x in a if x.device.type == "cuda"}:
        torch.cuda.synchronize(device)


def local(x: Tensor) -> Tensor:
    """Returns the part of ``x`` that this rank holds, sharing its memory; ``x`` itself unless it is sharded."""
    part: Tensor = x.to_local() if isinstance(x, DTensor) else x
    return part.detach()


def is_sharded(x: Tensor) -> bool:
    """Returns whether ``x`` is a DTensor, whatever its placement."""
    return isinstance(x, DTensor)


def mean_over_ranks(value: float, like: Tensor) -> float:
    """Returns the mean of a number over all ranks; every rank must call it. ``like`` gives the device to use."""
    total = torch.tensor(value, dtype=torch.float64, device=local(like).device)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def of_first_rank(value: int, like: Tensor) -> int:
    """Returns the first rank's number; every rank must call it. ``like`` gives the device to use."""
    sent = torch.tensor(value, dtype=torch.int64, device=local(like).device)
    dist.broadcast(sent, src=0)
    return int(sent)


def _sum_over_ranks(values: Tensor, owners: Vector) -> Tensor:
    """Adds up per-tensor sums of local parts over the ranks that hold the other parts."""
    groups: dict[dist.ProcessGroup, list[int]] = {}
    for index, owner in enumerate(owners):
        if isinstance(owner, DTensor):
            for dim, placement in enumerate(owner.placements):
                # Replicated dimensions of a mesh hold equal copies: only sharded ones add up.
                if _is_shard(placement):
                    groups.setdefault(owner.device_mesh.get_group(dim), []).append(index)
    for group, indices in groups.items():
        part = values[indices]
        dist.all_reduce(part, group=group)
        values = values.index_copy(0, torch.tensor(indices, device=values.device), part)
    return values


def _is_shard(placement: Placement) -> bool:
    return isinstance(placement, Shard)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _stack(scalars: Sequence[Tensor]) -> Tensor:
    return torch.stack([s.to(scalars[0].device) for s in scalars])
