"""Tally: sums over the pieces of vectors, all of which are read at once, so that the host waits once for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from torch import Tensor

from smoothdiag import collectives, vectors
from smoothdiag.packing import Packing

if TYPE_CHECKING:
    import torch.distributed as dist

Sums = npt.NDArray[np.float64]


class Tally:
    """Sums that belong to tensors, under names, and single numbers; all are read at once.

    Args:
        packing: How the tensors lie in pieces.
    """

    def __init__(self, packing: Packing) -> None:
        self.packing = packing
        self._sums: dict[str, dict[int, Tensor]] = {}
        self._numbers: dict[str, tuple[Tensor, bool]] = {}
        self._read: dict[str, Sums] | None = None

    def add(self, name: str, k: int, sums: Tensor) -> None:
        """Adds sums over the local parts of the tensors of piece ``k``, in float64."""
        assert self._read is None
        held = self._sums.setdefault(name, {})
        held[k] = held[k] + sums if k in held else sums

    def squares(self, k: int, names: Sequence[str], made: Callable[..., Sequence[Tensor]], *pieces: Tensor) -> None:
        """Adds, under each name, the squared norms of what ``made`` returns for pieces of x; see `Piece.squares`."""
        for name, sums in zip(names, self.packing.pieces[k].squares(made, *pieces), strict=True):
            self.add(name, k, sums)

    def number(self, name: str, value: Tensor, *, is_mean: bool = False) -> None:
        """Adds a number: a 0-dim tensor; with ``is_mean`` its mean over all ranks is read."""
        assert self._read is None
        self._numbers[name] = value, is_mean

    def read(self) -> dict[str, Sums]:
        """Returns the sums of each name, one for each tensor, over all ranks; numbers as arrays of one entry.

        It waits for the device once, and calls one collective for each set of ranks that shares tensors.
        """
        if self._read is None:
            self._read = self._gathered()
        return self._read

    def total(self, name: str, block: Iterable[int] | None = None) -> float:
        """Returns the sum of one name over the tensors with the given indices, or over all."""
        found = self.read()[name]
        return float(found.sum() if block is None else found[list(block)].sum())

    def _gathered(self) -> dict[str, Sums]:
        pieces = self.packing.pieces
        parts = [value.detach().reshape(1) for value, _ in self._numbers.values()]
        over: dict[dist.ProcessGroup, list[int]] = {}
        for index, (_, is_mean) in enumerate(self._numbers.values()):
            if is_mean:
                over.setdefault(vectors.world(), []).append(index)
        where: dict[str, list[tuple[Sequence[int], slice]]] = {}
        end = len(parts)
        for name, sums in self._sums.items():
            for k, found in sums.items():
                begin, end = end, end + len(pieces[k].indices)
                where.setdefault(name, []).append((pieces[k].indices, slice(begin, end)))
                parts.append(found)
                for group, members in self.packing.shared[k].items():
                    over.setdefault(group, []).extend(begin + j for j in members)
        values = collectives.read(parts, over)
        read = {}
        for index, (name, (_, is_mean)) in enumerate(self._numbers.items()):
            read[name] = values[index : index + 1] / (collectives.num_ranks() if is_mean else 1)
        for name, places in where.items():
            read[name] = np.zeros(len(self.packing.like))
            for indices, part in places:
                read[name][list(indices)] = values[part]
        return read
