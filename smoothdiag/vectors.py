"""Algebra of parameter lists: the only place that loops over parameters.

A vector is a non-empty sequence of tensors, one per parameter. Scalars come back as 0-dim float64 tensors on the device
of the first tensor, so that nothing here waits for a device; call ``float`` where you need a number. A sharded tensor
(DTensor) counts as the whole tensor: sums go over all ranks, so every rank must make the same calls.
"""

import functools
import itertools
import math
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
    # On a CPU foreach_norm with a float64 accumulator is 3 times as fast as (x * x).sum(dtype=float64).
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
    """Returns a - b in float32 or wider, so that differences of bfloat16 numbers are not rounded to bfloat16."""
    return [_wide(x) - _wide(y) for x, y in zip(a, b, strict=True)]


def add_scaled(a: Vector, b: Vector, alpha: float) -> list[Tensor]:
    """Returns a + alpha b in the dtypes of ``a``."""
    return [(_wide(x) + alpha * _wide(y)).to(x.dtype) for x, y in zip(a, b, strict=True)]


def clone(a: Vector) -> list[Tensor]:
    """Returns copies that share no memory with ``a`` and belong to no graph."""
    return [x.detach().clone() for x in a]


def assign_(a: Vector, b: Vector) -> None:
    """Copies ``b`` into ``a`` in place and hidden from autograd, so graphs that hold ``a`` stay valid."""
    for x, y in zip(a, b, strict=True):
        # Local parts are copied, because lists of parameters may hold both sharded and plain tensors.
        local(x).data.copy_(local(y))


def random_like(a: Vector, *, seed: int) -> list[Tensor]:
    """Returns standard normal numbers in the shapes and dtypes of ``a``, drawn by a private generator on the CPU."""
    generators: dict[int, torch.Generator] = {}
    result = []
    for x in a:
        # Different parts need different numbers, but copies of one part on several ranks need the same.
        part = _part_index(x)
        if part not in generators:
            generators[part] = torch.Generator().manual_seed(seed + 7919 * part)
        drawn = torch.empty_like(x, requires_grad=False)
        local(drawn).copy_(torch.randn(local(x).shape, generator=generators[part]))
        result.append(drawn)
    return result


def mixed(direction: Vector, *, seed: int) -> list[Tensor]:
    """Returns a vector of length about 1, half of which is the given direction and half random."""
    drawn = random_like(direction, seed=seed)
    length, size = float(norm(direction)), float(norm(drawn))
    noise = [x * (0.7 / size) for x in drawn]
    if not (length and math.isfinite(0.7 / length) and math.isfinite(length)):
        return noise
    both = add_scaled(noise, direction, 0.7 / length)
    # In few dimensions the two parts may cancel; in one dimension they cancel half the time.
    return both if float(norm(both)) > 0.5 else add_scaled(noise, direction, -0.7 / length)


def synchronize(a: Vector) -> None:
    """Waits until the devices that hold ``a`` have finished their work."""
    for device in {x.device for x in a if x.device.type == "cuda"}:
        torch.cuda.synchronize(device)


def joined(parts: Vector) -> Tensor:
    """Returns the numbers of local tensors of one dtype and device, one tensor after another, as a new flat tensor."""
    # To flatten small tensors takes six times as long as to join them, and most small tensors are flat.
    are_flat = set(map(Tensor.dim, parts)) == {1}
    return torch.cat(list(parts) if are_flat else [x.reshape(-1) for x in parts])


def local(x: Tensor) -> Tensor:
    """Returns the part of ``x`` that this rank holds, sharing its memory; ``x`` itself unless it is sharded."""
    part: Tensor = x.to_local() if is_sharded(x) else x
    return part.detach()


def as_part_of(part: Tensor, owner: Tensor) -> Tensor:
    """Returns a local tensor as this rank's part of a DTensor if its owner is sharded, else unchanged."""
    if not is_sharded(owner):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, owner.device_mesh, owner.placements, run_check=False, shape=owner.shape, stride=owner.stride()
    )


def is_sharded(x: Tensor) -> "TypeGuard[DTensor]":
    """Returns whether ``x`` is a DTensor, whatever its placement."""
    # Loading the module takes half as long as loading torch, and not every build of torch has it. As long as nobody
    # has loaded it, nothing is a DTensor.
    module = sys.modules.get("torch.distributed.tensor")
    return isinstance(x, getattr(module, "DTensor", ()))


def is_half(tensor: Tensor) -> bool:
    """Returns whether ``tensor`` is float16 or bfloat16 and can be widened in place, which shards cannot."""
    return tensor.dtype in (torch.float16, torch.bfloat16) and not is_sharded(tensor)


def widened(tensor: Tensor) -> Tensor:
    """Returns float16 and bfloat16 tensors in float32, others as they are."""
    return tensor.float() if is_half(tensor) else tensor


def shard_groups(x: Tensor) -> "tuple[dist.ProcessGroup, ...]":
    """Returns the groups of ranks that hold the other parts of ``x``."""
    if not is_sharded(x):
        return ()
    # Replicated dimensions of a mesh hold equal copies, so only sharded dimensions add up.
    return tuple(x.device_mesh.get_group(d) for d, placement in enumerate(x.placements) if not placement.is_replicate())


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


def total(parts: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> Tensor:
    """Returns the sum of numbers that belong to parameters, over all ranks that hold parts of the parameters.

    Args:
        parts: Pairs of equally long lists: 0-dim values of the local parts on one device, and the parameters of these
            parts. Every rank must pass the same parameters in the same order.

    Returns:
        A 0-dim tensor in float64 (float32 if the device has no float64) on the device of the first value.
    """
    first = parts[0][0][0]
    sums: dict[tuple[dist.ProcessGroup, ...], Tensor] = {}
    for values, owners in parts:
        by_ranks: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
        for value, owner in zip(values, owners, strict=True):
            by_ranks.setdefault(shard_groups(owner), []).append(value)
        for ranks, found in by_ranks.items():
            part = torch.stack(found).to(first.device).to(widest(first.device)).sum()
            sums[ranks] = sums[ranks] + part if ranks in sums else part
    for ranks, part in sums.items():
        for group in ranks:
            dist.all_reduce(part, group=group)
    return torch.stack(list(sums.values())).sum()


def widest(device: torch.device) -> torch.dtype:
    """Returns the widest floating-point type that a device has."""
    return torch.float32 if device.type == "mps" else torch.float64


class Layout:
    """Vectors of one layout as flat tensors, for algorithms that combine many vectors.

    A flat tensor holds the local parts of this rank, one after another, in float32 or wider, on the device of the first
    tensor. ``flat.numel()`` is the same for all vectors, but may differ from rank to rank.

    Args:
        like: A vector with the shapes, dtypes, devices and shards of all others.
    """

    def __init__(self, like: Vector) -> None:
        self._like = list(like)
        self._dtype = functools.reduce(torch.promote_types, [x.dtype for x in like], torch.float32)
        sizes = [local(x).numel() for x in like]
        # Tensors that are spread over the same ranks lie side by side, so that one sum over ranks serves all of them.
        groups = [shard_groups(x) for x in like]
        self._order = sorted(range(len(like)), key=lambda i: [id(g) for g in groups[i]])
        self._segments: list[tuple[tuple[dist.ProcessGroup, ...], slice]] = []
        end = 0
        for ranks, members in itertools.groupby(self._order, key=lambda i: groups[i]):
            begin, end = end, end + sum(sizes[i] for i in members)
            self._segments.append((ranks, slice(begin, end)))
        self._sizes = [sizes[i] for i in self._order]

    def flatten(self, a: Vector) -> Tensor:
        """Returns the vector as a new flat tensor."""
        device = local(self._like[0]).device
        return torch.cat([local(a[i]).reshape(-1).to(device, self._dtype) for i in self._order])

    def unflatten(self, flat: Tensor) -> list[Tensor]:
        """Returns a flat tensor as a vector, as views into it wherever dtype and device allow."""
        result = list(self._like)
        for i, part in zip(self._order, torch.split(flat, self._sizes), strict=True):
            like = local(self._like[i])
            part = part.view(like.shape).to(like.device)
            if is_sharded(self._like[i]):
                result[i] = torch.empty_like(self._like[i], dtype=self._dtype, requires_grad=False)
                local(result[i]).copy_(part)
            else:
                result[i] = part
        return result

    def products(self, rows: Tensor, flat: Tensor) -> Tensor:
        """Returns the inner product of every row (k, n) with a flat tensor (n,), a float64 tensor (k,)."""
        total = torch.zeros(len(rows), dtype=torch.float64, device=flat.device)
        for groups, part in self._segments:
            found = (rows[:, part] @ flat[part]).double()
            for group in groups:
                dist.all_reduce(found, group=group)
            total += found
        return total

    def norm(self, flat: Tensor) -> Tensor:
        """Returns the Euclidean norm of a flat tensor, a 0-dim float64 tensor."""
        total = torch.zeros((), dtype=torch.float64, device=flat.device)
        for groups, part in self._segments:
            found = torch.linalg.vector_norm(flat[part], dtype=torch.float64).square()
            for group in groups:
                dist.all_reduce(found, group=group)
            total += found
        return total.sqrt()


def _sum_over_ranks(values: Tensor, owners: Vector) -> Tensor:
    """Adds up per-tensor sums of local parts over the ranks that hold the other parts."""
    groups: dict[dist.ProcessGroup, list[int]] = {}
    for index, owner in enumerate(owners):
        for group in shard_groups(owner):
            groups.setdefault(group, []).append(index)
    for group, indices in groups.items():
        part = values[indices]
        dist.all_reduce(part, group=group)
        values = values.index_copy(0, torch.tensor(indices, device=values.device), part)
    return values


def _part_index(x: Tensor) -> int:
    """Returns which part of ``x`` this rank holds, counted from 1; 0 if it holds the whole."""
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
