"""Layout: vectors as flat tensors, for algorithms that combine many of them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from smoothdiag.vectors import Vector, as_part_of, is_sharded, local, shard_groups, squares


class Layout:
    """Vectors of one layout as flat tensors, for algorithms that combine many vectors.

    A flat tensor holds the local parts of this rank, one after another, in float32 or wider, on the device of the first
    tensor. ``flat.numel()`` is the same for all vectors, but may differ from rank to rank.

    Args:
        like: A vector with the shapes, dtypes, devices and shards of all others.

    Attributes:
        like: A vector of the same layout that takes hardly any memory.
        dtype: The dtype of flat tensors.
    """

    def __init__(self, like: Vector) -> None:
        self.like = [_stand_in(x) for x in like]
        self.dtype = functools.reduce(torch.promote_types, [x.dtype for x in like], torch.float32)
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

    def empty(self, number: int) -> Tensor:
        """Returns memory for some flat tensors, shape (number, n)."""
        return torch.empty(number, sum(self._sizes), dtype=self.dtype, device=local(self.like[0]).device)

    def flatten(self, a: Vector) -> Tensor:
        """Returns the vector as a new flat tensor."""
        flat = self.empty(1)[0]
        self.flatten_into(flat, a)
        return flat

    def flatten_into(self, flat: Tensor, a: Vector) -> None:
        """Copies the vector into a flat tensor."""
        sources = [local(a[i]) for i in self._order]
        parts = zip(torch.split(flat, self._sizes), sources, strict=True)
        torch._foreach_copy_([part.view(source.shape) for part, source in parts], sources)

    def unflatten(self, flat: Tensor) -> list[Tensor]:
        """Returns a flat tensor as a vector, as views into it wherever dtype and device allow."""
        result = list(self.like)
        for i, part in zip(self._order, torch.split(flat, self._sizes), strict=True):
            like = local(self.like[i])
            part = part.view(like.shape).to(like.device)
            if is_sharded(self.like[i]):
                result[i] = torch.empty_like(self.like[i], dtype=self.dtype, requires_grad=False)
                local(result[i]).copy_(part)
            else:
                result[i] = part
        return result

    def products(self, blocks: Sequence[Tensor], flat: Tensor) -> Tensor:
        """Returns the inner product of every row of the blocks (k_i, n) with a flat tensor (n,), in float64."""
        total = torch.zeros(sum(map(len, blocks)), dtype=torch.float64, device=flat.device)
        for groups, part in self._segments:
            found = torch.cat([rows[:, part] @ flat[part] for rows in blocks]).double()
            for group in groups:
                dist.all_reduce(found, group=group)
            total += found
        return total

    def norm(self, flat: Tensor) -> Tensor:
        """Returns the Euclidean norm of a flat tensor, a 0-dim float64 tensor."""
        total = torch.zeros((), dtype=torch.float64, device=flat.device)
        for groups, part in self._segments:
            # In pieces, because on a CPU each is copied to float64 first: pieces stay in its cache.
            pieces = torch.split(flat[part], max(2**14, flat.numel() // 64))
            found = torch.stack(squares(pieces)).sum()
            for group in groups:
                dist.all_reduce(found, group=group)
            total += found
        return total.sqrt()


def _stand_in(x: Tensor) -> Tensor:
    """Returns a tensor with the shape, dtype, device and shards of ``x``, in the memory of one number."""
    part = local(x)
    return as_part_of(torch.zeros((), dtype=part.dtype, device=part.device).expand(part.shape), x)
