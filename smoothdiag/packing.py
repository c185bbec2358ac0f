"""Packing: vectors in a few large pieces, so that thousands of small tensors cost a few operations and one wait."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from smoothdiag import vectors
from smoothdiag.vectors import Vector

if TYPE_CHECKING:
    import torch.distributed as dist

SMALL, JOINED = 2**14, 2**18
"""Tensors with fewer entries than ``SMALL`` are joined, up to ``JOINED`` entries in one piece."""


@dataclass(frozen=True)
class Piece:
    """One large tensor of a vector, or several small ones that are joined.

    Attributes:
        indices: Which tensors of the vector.
        sizes: Number of entries of each on this rank.
        is_joined: Whether the piece is a flat tensor with the entries of all of them.
        is_sharded: Whether other ranks hold other parts of the tensors.
        lengths: ``sizes`` on the device, if they are joined.
    """

    indices: tuple[int, ...]
    sizes: list[int]
    is_joined: bool
    is_sharded: bool
    lengths: Tensor | None = None
    _buffers: dict[torch.dtype, tuple[Tensor, tuple[Tensor, ...]]] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def ends(self) -> list[int]:
        """Where the tensors begin and end in the piece: one number more than there are tensors."""
        return [0, *itertools.accumulate(self.sizes)]

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """Returns the piece from its tensors, local parts in their own dtype; a single one shares its memory."""
        if not self.is_joined:
            return vectors.local(tensors[0])
        if self.is_sharded:
            tensors = [vectors.local(x) for x in tensors]
        with torch.no_grad():
            return vectors.joined(tensors)

    def scatter(self, piece: Tensor, targets: Sequence[Tensor]) -> None:
        """Copies the piece into its tensors, hidden from autograd."""
        with self.writing(targets) as into:
            if into.data_ptr() != piece.data_ptr():
                into.copy_(piece, non_blocking=True)

    @contextmanager
    def writing(self, targets: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yields the piece to write to; at the end of the block its tensors have these values, hidden from autograd."""
        into = [(vectors.local(x) if self.is_sharded else x).data for x in targets]
        if not self.is_joined:
            yield into[0]
            return
        flat, parts = self._buffer(into)
        yield flat
        torch._foreach_copy_(into, parts)

    def _buffer(self, like: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Returns a flat tensor and its parts, which are made once: that takes longer than to copy them."""
        dtype = like[0].dtype
        if dtype not in self._buffers:
            flat = torch.empty(sum(self.sizes), dtype=dtype, device=like[0].device)
            self._buffers[dtype] = flat, _unflatten_dense_tensors(flat, like)  # type: ignore[no-untyped-call]
        return self._buffers[dtype]

    def release(self) -> None:
        """Lets go of the memory that writing has left."""
        self._buffers.clear()

    def squares(self, made: Callable[..., Sequence[Tensor]], *pieces: Tensor) -> list[Tensor]:
        """Returns squared norms, in float64, one for each tensor, of every result that ``made`` has for the piece.

        Args:
            made: Function of pieces, applied entry by entry: on a CPU it is called on chunks of a large tensor. It may
                write to them.
            pieces: The pieces.
        """
        if self.lengths is not None:
            found = [x.double().square() for x in made(*pieces)]
            return [torch.segment_reduce(x, "sum", lengths=self.lengths, unsafe=True) for x in found]
        if not vectors.has_rows(pieces[0]):
            return [total.reshape(1) for total in vectors.squares(list(made(*pieces)))]
        sums = [[vectors.square(x) for x in made(*chunk)] for chunk in vectors.chunks(*pieces)]
        return [torch.tensor([sum(column)], dtype=torch.float64) for column in zip(*sums, strict=True)]


class Packing:
    """How the tensors of a vector lie in pieces.

    Args:
        like: The parameters. Dtypes may change later, in all tensors alike.

    Attributes:
        like: The same parameters.
        pieces: The pieces.
        place: For each tensor, its piece and its place in the piece.
        shared: For each piece, the places of the tensors whose other parts lie on a group of ranks.
    """

    def __init__(self, like: Sequence[Tensor]) -> None:
        self.like = list(like)
        self.pieces: list[Piece] = []
        joined: dict[tuple[torch.device, torch.dtype, bool], list[int]] = {}
        sizes = [vectors.local(x).numel() for x in like]
        for i, (x, size) in enumerate(zip(like, sizes, strict=True)):
            is_sharded = vectors.is_sharded(x)
            if size < SMALL:
                joined.setdefault((x.device, x.dtype, is_sharded), []).append(i)
            else:
                self.pieces.append(Piece((i,), [size], is_joined=False, is_sharded=is_sharded))
        for (_, _, is_sharded), indices in joined.items():
            ends = itertools.accumulate(sizes[i] for i in indices)
            for _, run in itertools.groupby(zip(indices, ends, strict=True), key=lambda found: found[1] // JOINED):
                held = tuple(i for i, _ in run)
                lengths = torch.tensor([sizes[i] for i in held], device=like[held[0]].device)
                part = [sizes[i] for i in held]
                self.pieces.append(Piece(held, part, is_joined=True, is_sharded=is_sharded, lengths=lengths))
        self.shared = [_shared([like[i] for i in piece.indices]) for piece in self.pieces]
        self._kinds = _kinds(like)
        self.place = {i: (k, j) for k, piece in enumerate(self.pieces) for j, i in enumerate(piece.indices)}

    def fits(self, like: Sequence[Tensor]) -> bool:
        """Returns whether parameters are those of this packing, with the dtypes and devices that they had."""
        return len(like) == len(self.like) and all(map(operator.is_, like, self.like)) and _kinds(like) == self._kinds

    def take(self, k: int, vector: Vector) -> list[Tensor]:
        """Returns the tensors of a vector that belong to piece ``k``."""
        return [vector[i] for i in self.pieces[k].indices]

    def put(self, k: int, vector: list[Tensor], tensors: Sequence[Tensor]) -> None:
        """Replaces the tensors of a vector that belong to piece ``k``."""
        for i, x in zip(self.pieces[k].indices, tensors, strict=True):
            vector[i] = x

    def keep(
        self, vector: Vector, *, host: Sequence[Tensor] | None = None, lends: Callable[[Tensor], bool] | None = None
    ) -> Kept:
        """Returns a copy of a vector.

        Args:
            vector: The vector.
            host: Tensors in host memory to copy into, as ``host_memory`` returns them; ``None`` copies on the device.
            lends: Which large tensors are kept as they are, because nobody will write to their memory; default: none.
        """
        kept = []
        for k, piece in enumerate(self.pieces):
            tensors = self.take(k, vector)
            found = piece.of(tensors)
            if lends is not None and not piece.is_joined and lends(tensors[0]):
                kept.append(found)
            elif host is not None:
                kept.append(host[k].copy_(found, non_blocking=True))
            else:
                kept.append(found if piece.is_joined else found.clone())
        return Kept(self, kept)

    def piece(self, k: int, vector: Vector) -> Tensor:
        """Returns piece ``k`` of a vector; a large tensor shares its memory."""
        if isinstance(vector, Kept) and vector.packing is self:
            return vector.piece(k)
        return self.pieces[k].of(self.take(k, vector))

    def release(self) -> None:
        """Lets go of the memory that writing has left: one copy of all small tensors in each of their dtypes."""
        for piece in self.pieces:
            piece.release()

    def host_memory(self) -> list[Tensor]:
        """Returns a tensor in host memory for each piece, pinned where there is an accelerator."""
        found = []
        for piece in self.pieces:
            like = vectors.local(self.like[piece.indices[0]])
            shape = (sum(piece.sizes),) if piece.is_joined else tuple(like.shape)
            is_pinned = like.device.type in ("cuda", "xpu")
            found.append(torch.empty(shape, dtype=like.dtype, device="cpu", pin_memory=is_pinned))
        return found


class Kept(Sequence[Tensor]):
    """A vector at rest, perhaps in host memory or a narrow dtype; an entry comes to its device when it is read.

    Entries that are read have the dtypes of measurements: float32 in place of float16 and bfloat16, unless sharded.

    Args:
        packing: How the tensors lie in pieces.
        pieces: The pieces.
        copies: Whether entries that are read are copies, so that writing to them does not change the vector.
    """

    def __init__(self, packing: Packing, pieces: list[Tensor], *, copies: bool = False) -> None:
        self.packing, self._pieces, self._copies = packing, pieces, copies

    def guarded(self) -> Kept:
        """Returns the same vector, of which entries that are read are copies."""
        return Kept(self.packing, self._pieces, copies=True)

    def __len__(self) -> int:
        return len(self.packing.like)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        like = self.packing.like[range(len(self))[index]]
        k, j = self.packing.place[range(len(self))[index]]
        piece, found = self.packing.pieces[k], self._pieces[k]
        if piece.is_joined:
            begin, end = piece.ends[j : j + 2]
            found = found[begin:end].view(vectors.local(like).shape)
        found = found.to(like.device, non_blocking=True, copy=self._copies)
        return vectors.as_part_of(found, like) if vectors.is_sharded(like) else vectors.widened(found)

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.__getitem__, range(len(self)))

    @property
    def dtypes(self) -> set[torch.dtype]:
        """The dtypes that entries have when they are read."""
        firsts = (self.packing.like[piece.indices[0]] for piece in self.packing.pieces)
        pairs = zip(self._pieces, firsts, strict=True)
        return {x.dtype if vectors.is_sharded(like) else vectors.wide(x[:0]).dtype for x, like in pairs}

    def piece(self, k: int) -> Tensor:
        """Returns a piece on its device, in float32 or wider."""
        device = self.packing.like[self.packing.pieces[k].indices[0]].device
        return vectors.wide(self._pieces[k].to(device, non_blocking=True))

    def restore(self, targets: Sequence[Tensor]) -> None:
        """Copies the vector back into tensors, in the dtype in which it was kept."""
        for k, piece in enumerate(self.packing.pieces):
            piece.scatter(self._pieces[k], self.packing.take(k, targets))


def dtypes_of(vector: Vector) -> set[torch.dtype]:
    """Returns the dtypes of a vector's tensors."""
    return vector.dtypes if isinstance(vector, Kept) else {x.dtype for x in vector}


def _kinds(like: Sequence[Tensor]) -> list[tuple[torch.dtype, torch.device, torch.Size]]:
    return [(x.dtype, x.device, x.shape) for x in like]


def _shared(tensors: Sequence[Tensor]) -> dict[dist.ProcessGroup, list[int]]:
    found: dict[dist.ProcessGroup, list[int]] = {}
    for j, x in enumerate(tensors):
        for group in vectors.shard_groups(x):
            found.setdefault(group, []).append(j)
    return found
