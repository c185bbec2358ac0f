"""Krylov: an orthonormal basis that grows by one product at a time, and what it shows of the spectrum."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from smoothdiag import vectors
from smoothdiag.vectors import Layout, Vector

Matvec = Callable[[Vector], list[Tensor]]
Array = npt.NDArray[np.float64]

BLOCK = 8
"""Basis vectors that memory is taken for at a time."""

NEGLIGIBLE = 1e-2
"""Share of the largest magnitude below which the error of an eigenvalue is no longer counted relative to itself."""


WIDEST_GAP = 0.1
"""Gap, relative to an eigenvalue, that is believed at most."""


@dataclass(frozen=True)
class Ritz:
    """Eigenvalues and eigenvectors of an operator restricted to the span of a basis.

    Attributes:
        values: Ritz values, rising, shape (k,).
        coordinates: Ritz vectors in the basis, one a column, shape (k, k).
        distances: ||H y - value y|| of each Ritz vector y, and at least the rounding of one product, shape (k,).
        start: Place of the first basis vector that was drawn after the space before it turned out to be closed under
            H; 0 before that happens.
        is_closed: Whether the space spanned is closed under H.
    """

    values: Array
    coordinates: Array
    distances: Array
    start: int
    is_closed: bool

    @property
    def is_new(self) -> npt.NDArray[np.bool_]:
        """Which Ritz vectors lie outside the last closed space, shape (k,)."""
        new: npt.NDArray[np.bool_] = (self.coordinates[self.start :] ** 2).sum(axis=0) > 0.5
        return new if self.start else np.zeros(len(new), dtype=bool)

    def residual(self, j: int) -> float:
        """Returns ||H y - value y|| / |value|; 0 where both are zero."""
        distance, size = float(self.distances[j]), abs(float(self.values[j]))
        return distance / size if size else math.inf if distance else 0.0

    def error(self, j: int) -> float:
        """Returns the estimated relative distance of a Ritz value from the next eigenvalue.

        Of the two bounds of a Rayleigh quotient, the residual and its square over the gap to the rest of the spectrum,
        the second takes the other Ritz values for the rest, and a tenth of the value for the gap where it looks wider:
        what seems to stand alone may be a cluster. Relative to the value, or to a hundredth of the largest
        magnitude if that is more.

        Source: Parlett 1998, *The symmetric eigenvalue problem*, theorem 11.7.1.
        """
        distance, value = float(self.distances[j]), abs(float(self.values[j]))
        if distance == 0:
            return 0.0
        gap = float(np.abs(np.delete(self.values, j) - self.values[j]).min(initial=math.inf))
        gap = min(gap, WIDEST_GAP * value) if math.isfinite(gap) else 0.0  # alone, it says nothing about a gap
        bound = distance**2 / gap if gap else distance
        return min(distance, bound) / max(value, NEGLIGIBLE * float(np.abs(self.values).max()))


class Krylov:
    """Spans the space of start, H start, H^2 start, ..., with full reorthogonalisation.

    Args:
        matvec: v -> H v.
        start: First vector.
        seed: Seed of the vectors that go on where the space is closed under H.

    Attributes:
        num_products: Products so far.
        is_whole: Whether the basis spans the whole space.

    Raises:
        ValueError: If ``start`` is zero or not finite.
    """

    def __init__(self, matvec: Matvec, start: Vector, seed: int = 0) -> None:
        self.num_products, self.is_whole = 0, False
        self._matvec, self._start, self._seed = matvec, start, seed
        self._layout = Layout(start)
        self._blocks: list[Tensor] = []
        flat = self._layout.flatten(start)
        length = float(self._layout.norm(flat))
        if not 0 < length < math.inf:
            raise ValueError(f"Parameter `start` should be finite and not zero. Found a vector of length {length}.")
        self._next = flat / length
        self._eps = torch.finfo(flat.dtype).eps

    def steps(self) -> Iterator[Ritz]:
        """Yields what is known after each further product; ends where the whole space is spanned or H is not finite."""
        measured, start = np.zeros((1, 0)), 0
        while not self.is_whole:
            k = self.num_products
            self._append(self._next)
            w = self._layout.flatten(self._matvec(self._layout.unflatten(self._next)))
            self.num_products += 1
            column, length = self._orthogonalise(w)
            measured = np.pad(measured, ((0, 0), (0, 1)))
            measured[: k + 1, k] = column
            # Exact products would be symmetric in the basis; what they are not is part of the distance.
            symmetric = np.triu(measured) + np.triu(measured, 1).T
            if not np.isfinite(symmetric).all():
                unknown = np.full(k + 1, math.nan)
                yield Ritz(unknown, np.eye(k + 1), unknown, start, is_closed=False)
                return
            values, coordinates = np.linalg.eigh(symmetric)
            rounding = self._eps * np.abs(symmetric).max()
            is_closed = length <= 100 * rounding
            if is_closed:
                length = 0.0
                self._continue()
            else:
                self._next = w / length
            inside = np.linalg.norm(measured @ coordinates - values * coordinates, axis=0)
            outside = length * np.abs(coordinates[-1])
            yield Ritz(values, coordinates, np.hypot(np.hypot(inside, outside), rounding), start, is_closed)
            measured = np.pad(measured, ((0, 1), (0, 0)))
            measured[k + 1, k] = length
            start = k + 1 if is_closed else start

    def combine(self, coordinates: Array) -> list[Tensor]:
        """Returns the combination of the basis vectors, scaled to length 1."""
        flat = self._combined(torch.from_numpy(coordinates.copy()))
        return self._layout.unflatten(flat / self._layout.norm(flat))

    def _append(self, flat: Tensor) -> None:
        if self.num_products % BLOCK == 0:
            self._blocks.append(flat.new_empty(BLOCK, flat.numel()))
        self._blocks[-1][self.num_products % BLOCK] = flat

    def _rows(self) -> Iterator[Tensor]:
        for i, block in enumerate(self._blocks):
            yield block[: min(BLOCK, self.num_products - i * BLOCK)]

    def _orthogonalise(self, w: Tensor) -> tuple[Array, float]:
        """Takes the basis out of ``w``, in place; returns the coefficients and the length that is left."""
        total: Tensor | None = None
        for _ in range(2):  # twice is enough (Parlett 1998, section 6.9, after Kahan)
            found = torch.cat([self._layout.products(rows, w) for rows in self._rows()])
            w -= self._combined(found)
            total = found if total is None else total + found
        assert total is not None
        # The one place that waits for the device.
        *column, length = torch.cat([total, self._layout.norm(w)[None]]).tolist()
        return np.array(column), length

    def _combined(self, coefficients: Tensor) -> Tensor:
        parts = torch.split(coefficients.to(self._blocks[0]), BLOCK)
        return sum((c @ rows for c, rows in zip(parts, self._rows(), strict=True)), torch.zeros(()))

    def _continue(self) -> None:
        """Goes on with a random vector outside the basis."""
        drawn = self._layout.flatten(vectors.random_like(self._start, seed=self._seed + self.num_products))
        before = float(self._layout.norm(drawn))
        _, length = self._orthogonalise(drawn)
        self.is_whole = length <= 100 * self._eps * before
        self._next = drawn / (length or 1.0)
