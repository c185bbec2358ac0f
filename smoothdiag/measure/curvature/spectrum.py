"""Ends of the spectrum of a symmetric operator: Lanczos with full reorthogonalisation, and power iteration."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from torch import Tensor

from smoothdiag import vectors
from smoothdiag.measure.curvature.krylov import Krylov, Matvec, Ritz
from smoothdiag.vectors import Vector

Target = Literal["norm", "largest", "smallest", "both"]


@dataclass(frozen=True)
class Eigenpair:
    """An eigenvalue as far as it is known, and its vector.

    Attributes:
        value: Rayleigh quotient v'Hv of the vector.
        vector: v, of length 1.
        residual: ||Hv - value v|| / |value|, of the products as they were made; 0 where both are zero. There is an
            eigenvalue within this relative distance.
        error: Estimated relative distance to that eigenvalue, never more than the residual.
        converged: Whether the error is within the tolerance.
    """

    value: float
    vector: list[Tensor]
    residual: float
    error: float
    converged: bool


@dataclass(frozen=True)
class Spectrum:
    """What a solver found out about the ends of a spectrum.

    Attributes:
        pairs: The eigenpairs asked for: for "norm" by falling magnitude, for "largest" by falling value, for
            "smallest" by rising value, for "both" first the largest, then the smallest.
        largest: The largest eigenvalue met, converged or not.
        smallest: The smallest eigenvalue met, converged or not.
        num_products: Products with the operator.
        converged: Whether all of ``pairs`` are, and no other value met could, within its residual, take their place.
    """

    pairs: tuple[Eigenpair, ...]
    largest: float
    smallest: float
    num_products: int
    converged: bool

    @property
    def norm(self) -> float:
        """The largest magnitude of an eigenvalue met."""
        return max(abs(self.largest), abs(self.smallest))


def lanczos(
    matvec: Matvec,
    start: Vector,
    *,
    target: Target = "norm",
    num_pairs: int = 1,
    tol: float = 1e-3,
    max_products: int = 40,
    seed: int = 0,
) -> Spectrum:
    """Returns eigenpairs at the ends of the spectrum of a symmetric operator.

    The basis is kept, and reorthogonalised in full, so no eigenvalue is found twice and residuals are those of the
    products as they were made. Memory: one vector for each product. At least two products are made, because one
    cannot tell an eigenvector at the end of the spectrum from any other.

    Args:
        matvec: v -> H v, for vectors shaped like ``start``.
        start: First vector, of any length but zero: an earlier eigenvector, or else a mixture of gradient and noise.
        target: ``"norm"`` for the largest magnitude, ``"largest"``, ``"smallest"``, or ``"both"`` ends.
        num_pairs: Eigenpairs wanted, for ``"both"`` at each end.
        tol: Relative error of the eigenvalues to stop at.
        max_products: Products to give up after; the result then says ``converged=False``.
        seed: Seed of the vectors to go on with where the space spanned so far is closed under H.

    Raises:
        ValueError: If ``start`` is zero or not finite, or an argument is out of range.

    Source: Parlett 1998, *The symmetric eigenvalue problem*, chapter 13.
    """
    check_limits(tol, max_products)
    if target not in get_args(Target):
        raise ValueError(f"Parameter `target` should be one of {get_args(Target)}. Found `target = {target!r}`.")
    if num_pairs < 1:
        raise ValueError(f"Parameter `num_pairs` should be at least 1. Found `num_pairs = {num_pairs!r}`.")
    krylov = Krylov(matvec, start, seed)
    converged = False
    wanted = num_pairs * (1 + (target == "both"))
    for ritz in krylov.steps():
        chosen = _chosen(ritz, target, num_pairs, known=True)
        if len(chosen) < wanted or _challenged(ritz, chosen, target, tol):
            chosen = _chosen(ritz, target, num_pairs, known=False)
        errors = [ritz.error(j) for j in chosen]
        # A closed space says nothing of what lies outside, which may be more of the same.
        unknown = ritz.is_closed and (not ritz.start or (wanted > 1 and ritz.is_new[chosen].any()))
        settled = len(ritz.values) > 1 and len(chosen) == wanted and not unknown
        converged = all(e <= tol for e in errors) and (
            krylov.is_whole or (settled and not _challenged(ritz, chosen, target, tol))
        )
        if converged or krylov.num_products >= max_products:
            break
    pairs = tuple(
        Eigenpair(float(ritz.values[j]), krylov.combine(ritz.coordinates[:, j]), ritz.residual(j), e, e <= tol)
        for j, e in zip(chosen, errors, strict=True)
    )
    return Spectrum(pairs, float(ritz.values[-1]), float(ritz.values[0]), krylov.num_products, converged)


def power_iteration(matvec: Matvec, start: Vector, *, tol: float = 1e-3, max_products: int = 100) -> Spectrum:
    """Returns the eigenpair of largest magnitude by repeated multiplication, in the memory of two vectors.

    Slower than ``lanczos`` and blind to a second eigenvalue of nearly the same magnitude. It stops at a residual of
    ``tol``, because it knows no gap that would let it stop earlier.

    Args:
        matvec: v -> H v, for vectors shaped like ``start``.
        start: First vector, of any length but zero.
        tol: Residual to stop at.
        max_products: Products to give up after; the result then says ``converged=False``.

    Raises:
        ValueError: If ``start`` is zero or not finite, or an argument is out of range.
    """
    check_limits(tol, max_products)
    length = float(vectors.norm(start))
    if not 0 < length < math.inf:
        raise ValueError(f"Parameter `start` should be finite and not zero. Found a vector of length {length}.")
    v, w, done = list(start), list(start), 0
    for _ in range(max_products):
        v = [x / length for x in w]
        w, done = matvec(v), done + 1
        value, length = float(vectors.dot(v, w)), float(vectors.norm(w))
        distance = float(vectors.norm(vectors.add_scaled(w, v, -value)))
        residual = distance / abs(value) if value else math.inf if distance else 0.0
        if residual <= tol or not 0 < length < math.inf:
            break
    pair = Eigenpair(value, v, residual, residual, residual <= tol)
    return Spectrum((pair,), max(value, 0.0), min(value, 0.0), done, pair.converged)


def _chosen(ritz: Ritz, target: Target, num_pairs: int, *, known: bool) -> list[int]:
    """Returns the places of the wanted Ritz values; ``known`` leaves out those outside the last closed space."""
    rising = [j for j in range(len(ritz.values)) if not (known and ritz.is_new[j])]
    if target == "norm":
        return sorted(rising, key=lambda j: -abs(ritz.values[j]))[:num_pairs]
    smallest, largest = rising[:num_pairs], rising[::-1][:num_pairs]
    if target == "both":
        return [*largest, *(j for j in smallest if j not in largest)]
    return largest if target == "largest" else smallest


def _challenged(ritz: Ritz, chosen: list[int], target: Target, tol: float) -> bool:
    """Returns whether another Ritz value may, within its distance, take the place of a chosen one.

    For the largest magnitude that may be the other end of the spectrum, if that has the other sign; else only what lies
    outside a closed space.
    """
    values, distances = ritz.values, ritz.distances
    others = set(np.flatnonzero(ritz.is_new).tolist())
    if target == "norm":
        others |= {j for j in (0, len(values) - 1) if values[j] * values[chosen[0]] < 0}
    others = others.difference(chosen)
    slack = tol * float(np.abs(ritz.values).max())
    if target == "norm":
        weakest = min(abs(values[j]) for j in chosen)
        return any(abs(values[j]) + distances[j] > weakest + slack for j in others)
    above = target != "smallest" and any(values[j] + distances[j] > min(values[chosen]) + slack for j in others)
    below = target != "largest" and any(values[j] - distances[j] < max(values[chosen]) - slack for j in others)
    return above or below


def check_limits(tol: float, max_products: int) -> None:
    """Refuses limits that no solver can keep.

    Raises:
        ValueError: If ``tol`` is not in (0, 1) or ``max_products`` is below 1.
    """
    if not 0 < tol < 1:
        raise ValueError(f"Parameter `tol` should be in (0, 1). Found `tol = {tol!r}`.")
    if max_products < 1:
        raise ValueError(f"Parameter `max_products` should be at least 1. Found `max_products = {max_products!r}`.")
