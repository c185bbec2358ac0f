"""Frame: orthonormal vectors as flat tensors, few at a time, that are projected on, turned and combined in place."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from smoothdiag import vectors
from smoothdiag.layout import Layout
from smoothdiag.vectors import Vector

Array = npt.NDArray[np.float64]

BLOCK = 2
"""Vectors for which memory is allocated at once."""

CHUNK, NUM_CHUNKS = 2**14, 256
"""Vectors are turned in this many chunks, so that turning takes little memory; a chunk is not shorter than this."""


class Frame:
    """Orthonormal rows.

    Args:
        like: A vector with the shapes of all others.
        capacity: Most rows for which memory is taken ahead of need; more rows are possible.
    """

    def __init__(self, like: Vector, capacity: int) -> None:
        self.layout, self._capacity = Layout(like), capacity
        self._blocks: list[Tensor] = []
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def write(self, v: Vector) -> Tensor:
        """Copies a vector into the place behind the last row, and returns it as a flat tensor."""
        last = self._size // BLOCK
        if last == len(self._blocks):
            rows = max(1, min(BLOCK, self._capacity - self._size))
            self._blocks.append(self.layout.empty(rows))
        elif self._size % BLOCK == len(self._blocks[last]):  # beyond the capacity
            self._blocks[last] = torch.cat([self._blocks[last], self.layout.empty(BLOCK - len(self._blocks[last]))])
        place = self._blocks[last][self._size % BLOCK]
        self.layout.flatten_into(place, v)
        return place

    def accept(self) -> None:
        """Makes a row of what was written last, which should be of length 1 and orthogonal to all other rows."""
        self._size += 1

    def row(self, i: int) -> list[Tensor]:
        """Returns a row as a vector, as views wherever dtype and device allow."""
        return self.layout.unflatten(self._flat(i))

    def outside(self, w: Tensor, guess: Array | None = None) -> Tensor:
        """Takes the span of the rows out of ``w`` in place, and scales the rest to length 1.

        Twice is enough (Parlett 1998, section 6.9, after Kahan), and the first time may go by a guess.

        Args:
            w: Flat tensor, the one written last.
            guess: Coefficients of the first rows in ``w``, if they are known but for noise.

        Returns:
            The coefficients of the rows in ``w``, the length of the rest, and the length of what the second time took
            out, in float64 on the device.
        """
        rows, guess = self._rows(), np.zeros(0) if guess is None else guess
        total = found = torch.zeros(0, dtype=torch.float64, device=w.device)
        if rows:
            # A block that the guess covers in part is looked at.
            known = len(guess) // BLOCK
            total = self.layout.products(rows[known:], w)
            if known:
                total = torch.cat([_sent(guess[: known * BLOCK], total), total])
            used = [i >= known or bool(guess[i * BLOCK : (i + 1) * BLOCK].any()) for i in range(len(rows))]
            self._add(w, -total, used)
            found = self.layout.products(rows, w)
            self._add(w, -found)
            total = total + found
        length = self.layout.norm(w)
        w /= length.clamp(min=torch.finfo(w.dtype).tiny).to(w.dtype)
        return torch.cat([total, length[None], found.norm()[None]])

    def combined(self, coefficients: Array) -> Tensor:
        """Returns the sum of the rows times coefficients, a new flat tensor."""
        total = torch.zeros_like(self._flat(0))
        self._add(total, _sent(coefficients, total))
        return total

    def turn(self, matrix: Array, first: int = 0) -> None:
        """Replaces the rows from ``first`` on by the rows of ``matrix`` times them; there may be fewer afterwards."""
        whole, number = [self._flat(i) for i in range(first, self._size)], len(matrix)
        if not np.array_equal(matrix, np.eye(number, len(whole))):
            turned = _sent(matrix, whole[0])
            size = max(CHUNK, len(whole[0]) // NUM_CHUNKS)
            for chunks in zip(*(torch.split(row, size) for row in whole), strict=True):
                old = torch.stack(chunks)
                # A product of matrices might be taken in TF32.
                for chunk, coefficients in zip(chunks, turned, strict=False):
                    chunk.copy_(coefficients @ old)
        self._size = first + number

    def last(self, coefficients: Array) -> Tensor:
        """Returns the sum of the rows times coefficients in their memory; all rows are gone afterwards."""
        self.turn(coefficients[None])
        del self._blocks[1:]
        found, self._size, self._blocks = self._flat(0).clone(), 0, []
        return found

    def random(self, seed: int) -> list[Tensor]:
        """Returns a random vector."""
        return vectors.random_like(self.layout.like, seed=seed)

    def _flat(self, i: int) -> Tensor:
        return self._blocks[i // BLOCK][i % BLOCK]

    def _rows(self) -> list[Tensor]:
        return [block[: self._size - i * BLOCK] for i, block in enumerate(self._blocks) if i * BLOCK < self._size]

    def _add(self, w: Tensor, coefficients: Tensor, used: Sequence[bool] | None = None) -> None:
        blocks = self._rows()
        parts = torch.split(coefficients.to(w), BLOCK)
        for c, rows, is_used in zip(parts, blocks, used or [True] * len(blocks), strict=True):
            if is_used:
                w.addmv_(rows.T, c)


def _sent(numbers: Array, like: Tensor) -> Tensor:
    """Returns numbers in the dtype and on the device of ``like``, without waiting for the device."""
    return torch.from_numpy(np.ascontiguousarray(numbers)).to(like, non_blocking=True)
