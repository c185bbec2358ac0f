"""Ends of the spectrum of a symmetric operator: Lanczos with full reorthogonalisation, and power iteration."""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from torch import Tensor

from smoothdiag import arguments, vectors
from smoothdiag.measure.curvature.krylov import Matvec, Ritz, Subspace
from smoothdiag.vectors import Vector

Target = Literal["norm", "largest", "smallest", "both"]

MIN_PRODUCTS = 4
"""Fewest products of a search from nothing, enough to bring up eigenvectors with a tiny share in the start."""


@dataclass(frozen=True)
class Eigenpair:
    """An approximate eigenvalue and its vector.

    Attributes:
        value: Rayleigh quotient v'Hv of the vector.
        vector: v, of length 1.
        residual: ||Hv - value v|| / |value| of the products as computed; 0 if both are zero. An eigenvalue lies within
            this relative distance.
        error: Estimated relative distance to that eigenvalue, never more than the residual.
        converged: Whether the error is within the tolerance.
    """

    value: float
    vector: list[Tensor] = field(repr=False)
    residual: float
    error: float
    converged: bool


@dataclass(frozen=True)
class Spectrum:
    """What a solver found about the ends of a spectrum.

    Attributes:
        pairs: The wanted eigenpairs: for "norm" by falling magnitude, for "largest" by falling value, for "smallest" by
            rising value, for "both" first the largest, then the smallest.
        largest: The largest eigenvalue met, converged or not.
        smallest: The smallest eigenvalue met, converged or not.
        num_products: Number of products with the operator.
        converged: Whether all ``pairs`` have converged and no other value could, within its residual, take their place.
        challenger: Second vector to start the next search with; ``None`` if there is none.
        largest_error: Relative distance within which ``largest`` is known to have an eigenvalue; infinite if unknown.
            Only at the end that ``target`` names did the search look for values further out.
        smallest_error: The same for ``smallest``.
    """

    pairs: tuple[Eigenpair, ...]
    largest: float
    smallest: float
    num_products: int
    converged: bool
    challenger: list[Tensor] | None = field(default=None, repr=False)
    largest_error: float = math.inf
    smallest_error: float = math.inf

    @property
    def norm(self) -> float:
        """The largest magnitude of an eigenvalue met."""
        return max(abs(self.largest), abs(self.smallest))


def lanczos(
    matvec: Matvec,
    start: Vector,
    *,
    challenger: Vector | None = None,
    target: Target = "norm",
    num_pairs: int = 1,
    tol: float = 1e-3,
    min_products: int = MIN_PRODUCTS,
    max_products: int = 40,
    most_vectors: int | None = None,
    seed: int = 0,
) -> Spectrum:
    """Returns eigenpairs at the ends of the spectrum of a symmetric operator.

    The basis is reorthogonalised in full, so that no eigenvalue is found twice and residuals belong to the products as
    computed. The basis takes one vector for each product, or ``most_vectors``: then it restarts from its best vectors
    when it is full. Restarts hardly cost products where the wanted end stands apart, but many inside a cluster.

    A vector that lies along some eigenvectors shows no others. Therefore half of the first vector is noise, or there is
    a second vector, the challenger. The search follows it until nothing that it shows could, within its residual, be
    ahead of the eigenpairs found.

    Args:
        matvec: v -> H v, for vectors shaped like ``start``.
        start: First vector, of any length but zero, such as the gradient or an earlier eigenvector.
        challenger: Second vector, such as ``Spectrum.challenger`` of an earlier search; ``None`` mixes noise into
            ``start``.
        target: ``"norm"`` for the largest magnitude, ``"largest"``, ``"smallest"``, or ``"both"`` ends.
        num_pairs: Number of eigenpairs wanted; with ``"both"`` at each end.
        tol: Estimated relative error of the eigenvalues at which the search stops.
        min_products: Fewest products.
        max_products: Most products; if they are not enough, the result says ``converged=False``.
        most_vectors: Most vectors held at once, at least six more than two for each pair; ``None`` for no limit.
        seed: Seed of random vectors.

    Raises:
        ValueError: If ``start`` is zero or not finite, or if an argument is out of range.

    Source: Parlett 1998, *The symmetric eigenvalue problem*, chapter 13.
    """
    check_limits(tol, max_products)
    arguments.choice("target", target, get_args(Target))
    arguments.whole("num_pairs", num_pairs, 1)
    wanted = num_pairs * (1 + (target == "both"))
    if most_vectors is not None:
        arguments.whole("most_vectors", most_vectors, 2 * wanted + 6)
    length = float(vectors.norm(start))
    if not 0 < length < math.inf:
        raise ValueError(f"Parameter `start` should be finite and not zero. Found a vector of length {length}.")
    waiting = [] if challenger is None else [challenger]
    space = Subspace(matvec, start, seed, most=most_vectors, expected=max_products + 1 + len(waiting))
    # In one dimension noise may cancel the start.
    assert space.grow(start if waiting else vectors.mixed(start, seed=seed)) or space.grow(start)
    del start, challenger
    converged = drawn = False
    while True:
        ritz = space.ritz
        chosen, others = _ranked(ritz, target, num_pairs)
        if np.isnan(ritz.values).any():
            break
        unfinished = [j for j in chosen if ritz.error(j) > tol]
        rivals = [j for j in others if ritz.outdoes(j, chosen, target)]
        # A subspace that is closed under H shows a repeated eigenvalue only once; a direction outside shows it again.
        doubtful = len(chosen) < wanted or (
            wanted > 1 and ritz.is_closed and not (drawn and (ritz.coordinates[-1, others] ** 2).sum() > 0.5)
        )
        settled = space.is_whole or not (unfinished or waiting or rivals or doubtful)
        converged = settled and not unfinished
        if space.is_whole or space.num_products >= (min(min_products, max_products) if settled else max_products):
            break
        # First the wanted values, then values that could take their place; a random direction if H leads nowhere else.
        followed = [j for j in unfinished if ritz.leads_out(j)]
        followed = followed or [j for j in others if ritz.leads_out(j) and not waiting]
        drawn = not (followed or waiting)
        # Both ends are reported, so a restart keeps them.
        order = list(dict.fromkeys([*chosen, 0, len(ritz.values) - 1, *others]))
        if followed:
            space.follow(followed[0], order)
        else:
            space.grow(waiting.pop() if waiting else space.random(), order)
    ends = float(ritz.values[-1]), float(ritz.values[0])
    doubts = ritz.doubt(len(ritz.values) - 1), ritz.doubt(0)
    pairs = tuple(
        Eigenpair(float(ritz.values[j]), space.combine(j), ritz.residual(j), e, e <= tol)
        for j, e in ((j, ritz.error(j)) for j in chosen)
    )
    next_challenger = space.last(others[0]) if others else None
    return Spectrum(pairs, *ends, space.num_products, converged, next_challenger, *doubts)


def power_iteration(matvec: Matvec, start: Vector, *, tol: float = 1e-3, max_products: int = 100) -> Spectrum:
    """Returns the eigenpair of largest magnitude by repeated multiplication, in the memory of two vectors.

    It is slower than ``lanczos``, and never finds an eigenvector that has no share in ``start``. It stops at a residual
    of ``tol``, because it knows no gap that would let it stop earlier.

    Args:
        matvec: v -> H v, for vectors shaped like ``start``.
        start: First vector, of any length but zero.
        tol: Residual at which the iteration stops.
        max_products: Most products; if they are not enough, the result says ``converged=False``.

    Raises:
        ValueError: If ``start`` is zero or not finite, or if an argument is out of range.
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
    return Spectrum((pair,), value, value, done, pair.converged)


def _ranked(ritz: Ritz, target: Target, num_pairs: int) -> tuple[list[int], list[int]]:
    """Returns the indices of the wanted Ritz values, and the indices of the others, the most promising first."""
    rising = range(len(ritz.values))
    up = sorted(rising, key=lambda j: -ritz.values[j])
    if target == "norm":
        chosen = sorted(rising, key=lambda j: -abs(ritz.values[j]))[:num_pairs]
    elif target == "both":
        chosen = list(dict.fromkeys([*up[:num_pairs], *up[::-1][:num_pairs]]))
    else:
        chosen = (up if target == "largest" else up[::-1])[:num_pairs]
    promise = {"largest": ritz.values, "smallest": -ritz.values}.get(target, np.abs(ritz.values)) + ritz.distances
    return chosen, sorted(set(rising).difference(chosen), key=lambda j: -promise[j])


def check_limits(tol: float, max_products: int) -> None:
    """Refuses limits that make no sense.

    Raises:
        ValueError: If ``tol`` is not in (0, 1) or ``max_products`` is below 1.
    """
    arguments.number("tol", tol, "in (0, 1)", lambda v: 0 < v < 1)
    arguments.whole("max_products", max_products, 1)
