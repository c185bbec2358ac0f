"""Algebra of parameter lists: the only place that loops over parameters.

A vector is a non-empty sequence of tensors, one per parameter. Scalars come back as 0-dim float64 tensors on
the device of the first tensor, so that nothing here waits for a device; call ``float`` where a number is due.
Sharded tensors (DTensor) are taken for the whole they are part of: sums go over all ranks, so every rank must
make the same calls.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

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
        # The local parts, because lists of parameters may hold sharded tensors beside plain ones.
        local(x).data.copy_(local(y))


def random_like(a: Vector, *, seed: int) -> list[Tensor]:
    """Returns standard normal numbers in the shapes and dtypes of ``a`` from a private generator on the CPU."""
    generators: dict[int, torch.Generator] = {}
    result = []
    for x in a:
        # Different parts must differ; equal copies on different ranks must not.
        part = _part_index(x)
        if part not in generators:
            generators[part] = torch.Generator().manual_seed(seed + 7919 * part)
        drawn = torch.empty_like(x, requires_grad=False)
        local(drawn).copy_(torch.randn(local(x).shape, generator=generators[part]))
        result.append(drawn)
    return result


def synchronize(a: Vector) -> None:
    """Waits until the devices that hold ``a`` have done all they were given."""
    for device in {x.device for x in a if x.device.type == "cuda"}:
        torch.cuda.synchronize(device)


def local(x: Tensor) -> Tensor:
    """Returns the part of ``x`` that this rank holds, sharing its memory; ``x`` itself unless it is sharded."""
    part: Tensor = x.to_local() if is_sharded(x) else x
    return part.detach()


def is_sharded(x: Tensor) -> "TypeGuard[DTensor]":
    """Returns whether ``x`` is a DTensor, whatever its placement."""
    # Loading the module takes as long as half of torch, and not every build of torch has it. Where nobody has
    # loaded it, nothing is a DTensor.
    module = sys.modules.get("torch.distributed.tensor")
    return isinstance(x, getattr(module, "DTensor", ()))


def mean_over_ranks(value: float, like: Tensor) -> float:
    """Returns the mean of a number over all ranks; every rank must call it. ``like`` gives the device to use."""
    total = torch.tensor(value, dtype=torch.float64, device=local(like).device)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def any_rank(value: bool, like: Tensor) -> bool:
    """Returns whether the value is true on any rank; every rank must call it. ``like`` gives the device to use."""
    return mean_over_ranks(float(value), like) > 0


def of_first_rank(value: int, like: Tensor) -> int:
    """Returns the first rank's number; every rank must call it. ``like`` gives the device to use."""
    sent = torch.tensor(value, dtype=torch.int64, device=local(like).device)
    dist.broadcast(sent, src=0)
    return int(sent)


def _sum_over_ranks(values: Tensor, owners: Vector) -> Tensor:
    """Adds up per-tensor sums of local parts over the ranks that hold the other parts."""
    groups: dict[dist.ProcessGroup, list[int]] = {}
    for index, owner in enumerate(owners):
        if is_sharded(owner):
            for dim, placement in enumerate(owner.placements):
                # Replicated dimensions of a mesh hold equal copies: only sharded ones add up.
                if not placement.is_replicate():
                    groups.setdefault(owner.device_mesh.get_group(dim), []).append(index)
    for group, indices in groups.items():
        part = values[indices]
        dist.all_reduce(part, group=group)
        values = values.index_copy(0, torch.tensor(indices, device=values.device), part)
    return values


def _part_index(x: Tensor) -> int:
    """Returns which part of ``x`` this rank holds, counted from 1; 0 where it holds the whole."""
    if not is_sharded(x) or all(placement.is_replicate() for placement in x.placements):
        return 0
    index = 0
    for dim, placement in enumerate(x.placements):
        if not placement.is_replicate():
            index = index * x.device_mesh.size(dim) + x.device_mesh.get_local_rank(dim)
    return 1 + index


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _stack(scalars: Sequence[Tensor]) -> Tensor:
    return torch.stack([s.to(scalars[0].device) for s in scalars])
