"""Algebra of parameter lists: the only place that loops over parameters.

A vector is a non-empty sequence of tensors, one per parameter. Scalars come back as 0-dim float64 tensors on the device
of the first tensor, so that nothing here waits for a device; call ``float`` where you need a number. A sharded tensor
(DTensor) counts as the whole tensor: sums go over all ranks, so every rank must make the same calls.
"""

import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Vector = Sequence[Tensor]

CHUNK = 2**16
"""Entries that are worked on at once on a CPU, where they stay in its cache."""

ROW = 128
"""Entries whose squares are added up in float32 on a CPU, before the sums are added up in float64: a third of the time,
at a relative error below 1e-7, and mostly of 1e-9."""

NO_ROWS, SAFE = 2**16, (1e-15, 1e17)
"""Entries from which on it is worth while, and lengths of rows whose squares are sure to fit into float32."""


def norms(a: Vector) -> Tensor:
    """Returns ||a_i|| for every tensor of the vector, shape (len(a),), accumulated in float64."""
    lengths = _stack(squares([local(x) for x in a])).sqrt()
    return lengths if not any(map(is_sharded, a)) else _sum_over_ranks(lengths.square(), a).sqrt()


def squares(parts: Sequence[Tensor]) -> list[Tensor]:
    """Returns the sum of squares of each local tensor, a 0-dim float64 tensor."""
    found = {i: _on_host(x) for i, x in enumerate(parts) if has_rows(x)}
    others = [x for i, x in enumerate(parts) if i not in found]
    lengths = iter(torch._foreach_norm(others, 2, dtype=torch.float64) if others else ())
    return [found[i] if i in found else next(lengths).square() for i in range(len(parts))]


def has_rows(x: Tensor) -> bool:
    """Returns whether a tensor is one that `square` takes."""
    return type(x) is Tensor and x.device.type == "cpu" and x.numel() >= NO_ROWS


def square(x: Tensor) -> float:
    """Returns the sum of squares of a chunk on a CPU, as a number of the host, which need not wait for it."""
    if x.dtype == torch.float32 and x.is_contiguous() and x.numel() >= ROW:
        flat = x.view(-1)
        rest = len(flat) % ROW
        whole = flat[:-rest] if rest else flat
        rows: npt.NDArray[np.float64] = torch.linalg.vector_norm(whole.view(-1, ROW), dim=1).numpy().astype(float)
        if SAFE[0] < rows.max() < SAFE[1]:
            found = float(rows @ rows)
            return found + float(np.square(flat[-rest:].numpy(), dtype=float).sum()) if rest else found
    return float(torch._foreach_norm([x], 2, dtype=torch.float64)[0].numpy()) ** 2


def _on_host(x: Tensor) -> Tensor:
    return torch.tensor(sum(square(piece) for (piece,) in chunks(x)), dtype=torch.float64)


def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yields tensors of one shape piece by piece on a CPU, and whole elsewhere."""
    first = tensors[0]
    if first.device.type != "cpu" or first.numel() <= CHUNK:
        yield tensors
        return
    rows = max(1, CHUNK * len(first) // first.numel())
    yield from zip(*(torch.split(x, rows) for x in tensors), strict=True)


def norm(a: Vector) -> Tensor:
    """Returns the Euclidean norm ||a||, a 0-dim float64 tensor."""
    return norms(a).square().sum().sqrt()


def dot(a: Vector, b: Vector) -> Tensor:
    """Returns <a, b>, a 0-dim float64 tensor."""
    products = [(wide(local(x)) * wide(local(y))).sum(dtype=torch.float64) for x, y in zip(a, b, strict=True)]
    return _sum_over_ranks(_stack(products), a).sum()


def sub(a: Vector, b: Vector) -> list[Tensor]:
    """Returns a - b in float32 or wider, so that differences of bfloat16 numbers are not rounded to bfloat16."""
    return [wide(x) - wide(y) for x, y in zip(a, b, strict=True)]


def distance(a: Vector, b: Vector, *, over: tuple[float | Tensor, float | Tensor] = (1.0, 1.0)) -> Tensor:
    """Returns ||a / over[0] - b / over[1]||, a 0-dim float64 tensor, without memory for the difference."""
    sums = []
    for x, y in zip(a, b, strict=True):
        s, t = (n.to(x.device) if isinstance(n, Tensor) else n for n in over)
        pairs = chunks(local(x), local(y))
        parts = [wide(u) / s - wide(v) / t for u, v in pairs]
        sums.append(torch.stack(squares(parts)).sum())
    return _sum_over_ranks(_stack(sums), a).sum().sqrt()


def add_scaled(a: Vector, b: Vector, alpha: float | Tensor) -> list[Tensor]:
    """Returns a + alpha b in the dtypes of ``a``."""
    return [(wide(x) + alpha * wide(y)).to(x.dtype) for x, y in zip(a, b, strict=True)]


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


def unique(*lists: Iterable[Tensor]) -> list[Any]:
    """Returns the tensors of several lists, each object once; by identity, because hashing tensors is slow."""
    return list({id(x): x for x in itertools.chain(*lists)}.values())


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
    if type(x) is Tensor or type(x) is nn.Parameter:
        return False
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


def wide(x: Tensor) -> Tensor:
    """Returns the tensor in float32 or wider, sharded or not."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def shard_groups(x: Tensor) -> "tuple[dist.ProcessGroup, ...]":
    """Returns the groups of ranks that hold the other parts of ``x``."""
    if not is_sharded(x):
        return ()
    # Replicated dimensions of a mesh hold equal copies, so only sharded dimensions add up.
    found = [x.device_mesh.get_group(d) for d, placement in enumerate(x.placements) if not placement.is_replicate()]
    # One name for the group of all ranks lets sums of several kinds share a collective.
    return tuple(world() if group.size() == dist.get_world_size() else group for group in found)


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


def world() -> "dist.ProcessGroup":
    """Returns the group of all ranks; it must exist."""
    assert dist.group.WORLD is not None
    return dist.group.WORLD


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


def _stack(scalars: Sequence[Tensor]) -> Tensor:
    return torch.stack([s.to(scalars[0].device) for s in scalars])
