"""Subspace: an orthonormal basis that grows by one product at a time, and the eigenvalues that it shows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from smoothdiag import vectors
from smoothdiag.measure.curvature.frame import Array, Frame
from smoothdiag.vectors import Vector

Matvec = Callable[[Vector], list[Tensor]]

DROPPED = 3
"""Vectors by which a restart shrinks the basis."""

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
    """An orthonormal basis Q, the matrix of H in it, and the directions in which products lead out of it.

    It keeps H Q = Q (S + N) + U C. S is symmetric. N is what asymmetric products add to it. The rows of U, the front,
    are orthonormal and orthogonal to the basis. Every new start adds a direction to the front; growing into the front
    and multiplying leaves as many as there were. If the basis always grows into the front, this is Lanczos with full
    reorthogonalisation.

    With a limit it is Lanczos with a thick restart: before the vectors become too many, the basis keeps the Ritz
    vectors that matter most. Their products still lead out along the front alone.

    Args:
        matvec: v -> H v.
        like: A vector of the shapes that H takes.
        seed: Seed of random directions.
        most: Most vectors that are held, the product in the making included; ``None`` for no limit.
        expected: Vectors beyond which no memory is taken ahead of need.

    Attributes:
        num_products: Products so far.
        ritz: The Ritz values after the last product.

    Source: Wu, Simon 2000, *Thick-restart Lanczos method for large symmetric eigenvalue problems*.
    """

    ritz: Ritz

    def __init__(
        self, matvec: Matvec, like: Vector, seed: int = 0, most: int | None = None, expected: int | None = None
    ) -> None:
        self.num_products = 0
        self.dimension = sum(x.numel() for x in like)
        self._matvec, self._seed = matvec, seed
        # In a small space all vectors together take little memory.
        self._most = most if most is not None and self.dimension > 2 * most else math.inf
        self._frame = Frame(like, min(x for x in (self.dimension + 1, most, expected) if x is not None))
        self._symmetric, self._asymmetric, self._leading = np.zeros((3, 0, 0))
        self._lost = np.zeros((0, 0))
        self._eps = torch.finfo(self._frame.layout.dtype).eps

    @property
    def is_whole(self) -> bool:
        """Whether the basis spans the whole space."""
        return len(self._symmetric) == self.dimension

    def random(self) -> list[Tensor]:
        """Returns a random direction."""
        return self._frame.random(self._seed + self.num_products)

    def follow(self, j: int, order: Sequence[int] = ()) -> None:
        """Grows into the part of H times a Ritz vector that lies outside the subspace, which should not be zero.

        Args:
            j: Index of the Ritz vector.
            order: Indices of Ritz vectors, the most important first: those that a restart keeps.
        """
        along = self._leading @ self.ritz.coordinates[:, j]
        self._make_room(order, 1)
        self._turn_front(along)
        self._multiply()

    def grow(self, direction: Vector, order: Sequence[int] = ()) -> bool:
        """Grows into a direction; returns False, without a product, if the direction lies in the subspace already.

        Args:
            direction: A vector of any length.
            order: As for ``follow``.
        """
        if self._front and not any(map(self.ritz.leads_out, range(len(self.ritz.values)))):
            self._forget()  # the front leads nowhere beyond the noise
        self._make_room(order, 2)
        new = self._frame.write(direction)
        before = self._frame.layout.norm(new)[None]
        # The directions of the basis go first; along the front, the new direction takes its share.
        *known, rest, _, length = torch.cat([self._frame.outside(new), before]).tolist()
        along, negligible = np.array(known[len(self._symmetric) :]), 1e3 * self._eps * length
        share = float(np.linalg.norm(along))
        if not math.hypot(share, rest) > negligible:
            return False
        if rest > negligible:
            self._frame.accept()
            self._leading = np.pad(self._leading, ((0, 1), (0, 0)))
            along = np.append(along, rest)
        self._turn_front(along)
        self._multiply()
        return True

    def combine(self, j: int) -> list[Tensor]:
        """Returns a Ritz vector, of length 1."""
        return self._result(self.ritz.coordinates[:, j])

    def last(self, j: int) -> list[Tensor]:
        """Returns H times a Ritz vector, scaled to length 1, with a little noise; only noise if the product is zero.

        It ends the search: the basis makes room for it.
        """
        y, value = self.ritz.coordinates[:, j], float(self.ritz.values[j])
        along = np.concatenate([value * y, self._leading @ y])
        size = np.linalg.norm(along)
        is_noise = not size > 0
        found = [] if is_noise else self._frame.layout.unflatten(self._frame.last(along / size))
        noise = self.random()
        length = vectors.norm(noise)
        if is_noise:
            return [x / length.to(x) for x in noise]
        for x, drawn in zip(found, noise, strict=True):
            x += drawn.to(x).mul_((NOISE / length).to(x))
        return found

    def keep(self, order: Sequence[int]) -> None:
        """Shrinks the basis to some Ritz vectors."""
        chosen, front = sorted(order), self._front
        y, values = self.ritz.coordinates[:, chosen], self.ritz.values[chosen]
        whole = self._asymmetric @ y
        inside = y.T @ whole
        rest = whole - y @ inside
        self._lost = y.T @ self._lost @ y + rest.T @ rest
        self._symmetric, self._asymmetric, self._leading = np.diag(values), inside, self._leading @ y
        turn = np.zeros((len(chosen) + front, len(self._frame)))
        turn[: len(chosen), : len(y)] = y.T
        turn[len(chosen) :, len(y) :] = np.eye(front)
        self._frame.turn(turn)
        self._update()

    @property
    def _front(self) -> int:
        return len(self._frame) - len(self._symmetric)

    def _result(self, coefficients: Array) -> list[Tensor]:
        flat = self._frame.combined(np.pad(coefficients, (0, len(self._frame) - len(coefficients))))
        flat /= self._frame.layout.norm(flat).clamp(min=torch.finfo(flat.dtype).tiny).to(flat.dtype)
        return self._frame.layout.unflatten(flat)

    def _make_room(self, order: Sequence[int], number: int) -> None:
        """Restarts if ``number`` more vectors would be too many."""
        if len(self._frame) + number > self._most:
            self.keep(order[: max(1, int(self._most) - self._front - number - DROPPED + 1)])

    def _turn_front(self, along: Array) -> None:
        """Turns the front such that its first direction is the given one, and moves that direction to the basis."""
        k, length = len(self._symmetric), np.linalg.norm(along)
        # A reflection that takes the direction to the first axis, up to its sign.
        mirror = along / length
        mirror[0] += math.copysign(1.0, mirror[0])
        turn = np.eye(len(along)) - 2 * np.outer(mirror, mirror) / (mirror @ mirror)
        if len(along) == 1:
            turn = np.ones((1, 1))
        self._frame.turn(turn, first=k)
        leading = turn @ self._leading
        self._symmetric, self._asymmetric, self._lost = (
            np.pad(x, (0, 1)) for x in (self._symmetric, self._asymmetric, self._lost)
        )
        self._asymmetric[k, :k] = leading[0]
        self._leading = np.pad(leading[1:], ((0, 0), (0, 1)))

    def _multiply(self) -> None:
        """Multiplies the last vector of the basis, which the front just gave to it."""
        k = len(self._symmetric) - 1
        self.num_products += 1
        rest = self._frame.write(self._matvec(self._frame.row(k)))
        # If H is symmetric, earlier products have shown the coefficients in the basis. The one place that waits for the
        # device.
        found = self._frame.outside(rest, self._asymmetric[k, :k]).cpu().numpy()
        column, length, corrected = found[:-2], found[-2], found[-1]
        if corrected > length > 0:  # the guess was worse than the rest is long
            again = self._frame.outside(rest).cpu().numpy()
            column, length = column + length * again[:-2], length * again[-2]
        self._symmetric[: k + 1, k] = self._symmetric[k, : k + 1] = column[: k + 1]
        # The columns of a later product count; what the earlier ones said differs by rounding or asymmetry.
        self._asymmetric[k, :k] -= column[:k]
        self._leading[:, k] = column[k + 1 :]
        if not np.isfinite(found).all():
            unknown = np.full(k + 1, math.nan)
            self.ritz = Ritz(unknown, np.eye(k + 1), unknown, unknown)
            return
        if length > self._rounding(100):
            self._frame.accept()
            self._leading = np.pad(self._leading, ((0, 1), (0, 0)))
            self._leading[-1, k] = length
        self._close()
        self._update()

    def _rounding(self, times: float = 1) -> float:
        return float(times * self._eps * np.abs(self._symmetric).max())

    def _forget(self) -> None:
        """Drops the front; what led along it counts as distance."""
        self._lost += self._leading.T @ self._leading
        self._leading = self._leading[:0]
        self._frame.turn(np.zeros((0, self._front)), first=len(self._symmetric))
        self._update()

    def _close(self) -> None:
        """Drops directions of the front along which nothing but rounding leads."""
        if not self._front:
            return
        axes, sizes, _ = np.linalg.svd(self._leading)
        sizes = np.pad(sizes, (0, len(axes) - len(sizes)))
        if sizes[-1] <= self._rounding(100):
            turn = axes.T[sizes > self._rounding(100)]
            self._leading = turn @ self._leading
            self._frame.turn(turn, first=len(self._symmetric))

    def _update(self) -> None:
        values, y = np.linalg.eigh(self._symmetric)
        within, outside = (np.linalg.norm(x @ y, axis=0) for x in (self._asymmetric, self._leading))
        lost = np.sqrt(np.einsum("ij,ik,kj->j", y, self._lost, y).clip(min=0))
        self.ritz = Ritz(values, y, outside, np.hypot(np.hypot(within, lost), np.hypot(outside, self._rounding())))
