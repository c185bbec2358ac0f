"""Subspace: an orthonormal basis that grows by one product at a time, and the eigenvalues that it shows."""

import math
from collections.abc import Callable
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
"""Basis vectors for which memory is allocated at once."""

NEGLIGIBLE = 1e-2
"""Share of the largest magnitude below which an eigenvalue's error is no longer taken relative to the eigenvalue."""


WIDEST_GAP, KNOWN_GAP = 0.1, 0.3
"""Largest gap to the next eigenvalue that the error estimate believes, relative to the eigenvalue. The second number
counts if the next eigenvalue is known to within half the gap."""


NOISE = 1e-3
"""Length of the noise that is added to the start of the next search, so that it has a share in every eigenvector."""

AHEAD = 0.02
"""The search pursues a Ritz value if, within its distance, it could be ahead by more than this share of the largest
magnitude."""


@dataclass(frozen=True)
class Ritz:
    """Eigenvalues and eigenvectors of an operator restricted to a subspace.

    Attributes:
        values: Ritz values in rising order, shape (k,).
        coordinates: Ritz vectors in the basis, one per column, shape (k, k).
        outside: Length of the part of H y that lies outside the subspace, shape (k,).
        distances: ||H y - value y||, and at least the rounding of one product, shape (k,).
    """

    values: Array
    coordinates: Array
    outside: Array
    distances: Array

    @property
    def is_closed(self) -> bool:
        """Whether H does not lead out of the subspace."""
        return not self.outside.any()

    def leads_out(self, j: int) -> bool:
        """Whether a Ritz vector leads out of the subspace by more than rounding."""
        return bool(self.outside[j] > 1e-3 * self.distances[j])

    def outdoes(self, j: int, chosen: list[int], target: str) -> bool:
        """Returns whether a Ritz value could, within its distance, be ahead of a chosen one by more than `AHEAD`."""
        values, reach, little = self.values, float(self.distances[j]), AHEAD * float(np.abs(self.values).max())
        if target == "norm":
            return bool(abs(values[j]) + reach > min(abs(values[chosen])) + little)
        above = [values[k] for k in chosen if k > j]
        below = [values[k] for k in chosen if k < j]
        return bool(values[j] + reach > min(above, default=math.inf) + little) or bool(
            values[j] - reach < max(below, default=-math.inf) - little
        )

    def residual(self, j: int) -> float:
        """Returns ||H y - value y|| / |value|; 0 if both are zero."""
        distance, size = float(self.distances[j]), abs(float(self.values[j]))
        return distance / size if size else math.inf if distance else 0.0

    def error(self, j: int) -> float:
        """Returns the estimated relative distance of a Ritz value from the next eigenvalue.

        A Rayleigh quotient has two bounds: the residual, and its square over the gap to the rest of the spectrum. The
        second bound takes the other Ritz values for the rest of the spectrum. It counts no gap as wider than a share of
        the value, because a value that seems to stand alone may belong to a cluster. The error is relative to the
        value, or to a hundredth of the largest magnitude if that is more.

        Source: Parlett 1998, *The symmetric eigenvalue problem*, theorem 11.7.1.
        """
        distance, value = float(self.distances[j]), abs(float(self.values[j]))
        if distance == 0:
            return 0.0
        gap = 0.0  # a single value shows no gap
        if len(self.values) > 1:
            gaps = np.abs(self.values - self.values[j])
            gaps[j] = math.inf
            nearest = int(np.argmin(gaps))
            known = self.distances[nearest] < gaps[nearest] / 2
            gap = min(float(gaps[nearest]), (KNOWN_GAP if known else WIDEST_GAP) * value)
        bound = distance**2 / gap if gap else distance
        return min(distance, bound) / max(value, NEGLIGIBLE * float(np.abs(self.values).max()))

    def doubt(self, j: int) -> float:
        """Returns how far the Ritz value at an end may be from an eigenvalue, relative to the value and to the spread.

        The residual alone would be small anywhere inside a cluster, whose eigenvalues lie side by side.
        """
        distance, spread = float(self.distances[j]), float(self.values[-1] - self.values[0])
        return max(self.residual(j), distance / spread if spread and self.leads_out(j) else 0.0)


class Subspace:
    """An orthonormal basis Q, the matrix of H in it, and the parts of products that lie outside it.

    The part of a product outside the basis is kept until the basis grows into it. If the basis always grows by what is
    left of the last product, this is Lanczos with full reorthogonalisation.

    Args:
        matvec: v -> H v.
        like: A vector of the shapes that H takes.
        seed: Seed of random directions.

    Attributes:
        num_products: Products so far, which is also the number of basis vectors.
        is_whole: Whether the basis spans the whole space.
        dimension: Dimension of the whole space.
    """

    def __init__(self, matvec: Matvec, like: Vector, seed: int = 0) -> None:
        self.num_products, self.is_whole = 0, False
        self.dimension = sum(x.numel() for x in like)
        self._matvec, self._like, self._seed = matvec, like, seed
        self._layout = Layout(like)
        self._blocks: list[Tensor] = []
        self._inside = np.zeros((0, 0))
        self._ends: dict[int, Tensor] = {}
        self._eps = torch.finfo(self._layout.flatten(like).dtype).eps

    def flatten(self, v: Vector) -> Tensor:
        """Returns a vector as a flat tensor of the kind that ``grow`` takes."""
        return self._layout.flatten(v)

    def random(self) -> Tensor:
        """Returns a random direction."""
        return self.flatten(vectors.random_like(self._like, seed=self._seed + self.num_products))

    def residual(self, ritz: Ritz, j: int) -> Tensor:
        """Returns the part of H times a Ritz vector that lies outside the subspace; zero if there is none."""
        parts = [float(ritz.coordinates[k, j]) * end for k, end in self._ends.items()]
        return sum(parts, torch.zeros_like(self._blocks[0][0]))

    def combine(self, ritz: Ritz, j: int) -> list[Tensor]:
        """Returns a Ritz vector, of length 1."""
        return self._layout.unflatten(self._unit(self._ritz_vector(ritz, j)))

    def image(self, ritz: Ritz, j: int) -> list[Tensor]:
        """Returns H times a Ritz vector, scaled to length 1, with a little noise; only noise if the product is zero."""
        flat = float(ritz.values[j]) * self._ritz_vector(ritz, j) + self.residual(ritz, j)
        noise = self._unit(self.random())
        return self._layout.unflatten(self._unit(flat) + NOISE * noise if ritz.distances[j] > 0 else noise)

    def _ritz_vector(self, ritz: Ritz, j: int) -> Tensor:
        return self._combined(torch.from_numpy(ritz.coordinates[:, j].copy()))

    def _unit(self, flat: Tensor) -> Tensor:
        return flat / self._layout.norm(flat).clamp(min=torch.finfo(flat.dtype).tiny).to(flat.dtype)

    def grow(self, direction: Tensor, *, leads_out: bool = False) -> Ritz | None:
        """Returns the Ritz values after one more product; ``None`` if the direction lies in the subspace already.

        Args:
            direction: Flat tensor to grow into.
            leads_out: Whether the direction is known to lie outside the subspace, as residuals do; then only the result
                waits for the device.
        """
        before, k = self._layout.norm(direction), self.num_products
        direction = direction.clone()
        length = self._orthogonalise(direction)[-1]
        if not leads_out and not float(length) > 1e3 * self._eps * float(before):
            return None
        q = (direction / length).to(direction.dtype)
        shares = [self._layout.products(end[None], q) for end in self._ends.values()]
        if k % BLOCK == 0:
            self._blocks.append(q.new_empty(BLOCK, q.numel()))
        self._blocks[-1][k % BLOCK] = q
        self.num_products += 1
        w = self.flatten(self._matvec(self._layout.unflatten(q)))
        column = self._orthogonalise(w)[:-1]
        places = [*self._ends, k]
        ends = [end - share.to(q.dtype) * q for end, share in zip(self._ends.values(), shares, strict=True)] + [w]
        lengths = torch.stack([self._layout.norm(end) for end in ends])
        rows = torch.stack([self._unit(end) for end in ends])  # squares may be beyond what float32 holds
        angles = torch.stack([self._layout.products(rows, row) for row in rows])
        # The one place that waits for the device.
        known = torch.cat([column, *shares, lengths, angles.flatten()]).cpu().numpy()
        self._inside = np.pad(self._inside, (0, 1))
        self._inside[:, k], self._inside[k, places[:-1]] = known[: k + 1], known[k + 1 : k + len(places)]
        sizes, cosines = np.split(known[k + len(places) :], [len(places)])
        return self._ritz(places, ends, sizes, cosines.reshape(len(places), -1))

    def _ritz(self, places: list[int], ends: list[Tensor], lengths: Array, angles: Array) -> Ritz:
        # Exact products would be symmetric in the basis; the asymmetric part counts as distance.
        symmetric = np.triu(self._inside) + np.triu(self._inside, 1).T
        if not (np.isfinite(symmetric).all() and np.isfinite(lengths).all()):
            unknown = np.full(len(symmetric), math.nan)
            return Ritz(unknown, np.eye(len(symmetric)), unknown, unknown)
        values, coordinates = np.linalg.eigh(symmetric)
        rounding = self._eps * np.abs(symmetric).max()
        open_ = lengths > 100 * rounding
        self._ends = {j: end for j, end, is_open in zip(places, ends, open_, strict=True) if is_open}
        self.is_whole = self.num_products == self.dimension
        within = np.linalg.norm(self._inside @ coordinates - values * coordinates, axis=0)
        leading = coordinates[list(self._ends)] * lengths[open_, None]
        outside = np.sqrt(np.einsum("ij,ik,kj->j", leading, angles[np.ix_(open_, open_)], leading).clip(min=0))
        return Ritz(values, coordinates, outside, np.hypot(np.hypot(within, outside), rounding))

    def _rows(self) -> list[Tensor]:
        return [block[: self.num_products - i * BLOCK] for i, block in enumerate(self._blocks)]

    def _orthogonalise(self, w: Tensor) -> Tensor:
        """Removes the basis from ``w`` in place; returns the coefficients and the remaining length."""
        total = torch.zeros(self.num_products, dtype=torch.float64, device=w.device)
        for _ in range(2 if self.num_products else 0):  # twice is enough (Parlett 1998, section 6.9, after Kahan)
            found = torch.cat([self._layout.products(rows, w) for rows in self._rows()])
            w -= self._combined(found)
            total += found
        return torch.cat([total, self._layout.norm(w)[None]])

    def _combined(self, coefficients: Tensor) -> Tensor:
        parts = torch.split(coefficients.to(self._blocks[0]), BLOCK)
        return sum((c @ rows for c, rows in zip(parts, self._rows(), strict=True)), torch.zeros(()))
