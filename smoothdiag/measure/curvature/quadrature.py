"""The spectrum as a whole: its density by stochastic Lanczos quadrature, its trace by Hutch++."""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from smoothdiag import vectors
from smoothdiag.measure.curvature.frame import Array, Frame
from smoothdiag.measure.curvature.krylov import Matvec, Subspace
from smoothdiag.measure.curvature.operator import BLOCK, Hessian
from smoothdiag.vectors import Vector


@dataclass(frozen=True)
class SpectralDensity:
    """A density of eigenvalues as weighted points; each random vector gives one row, a quadrature rule of its own.

    Attributes:
        points: Ritz values, shape (num_vectors, num_products).
        weights: Share of all eigenvalues at each point, in the same shape; each row adds up to 1.
        dimension: Number of eigenvalues.
    """

    points: Array
    weights: Array
    dimension: int

    def at(self, grid: Array, width: float) -> Array:
        """Returns the density on ``grid``, with every point widened to a Gaussian of standard deviation ``width``.

        Units: grid and width have the units of the eigenvalues, the density the inverse units; its integral is 1.
        """
        shape = np.exp(-(((grid[:, None] - self.points.ravel()) / width) ** 2) / 2) / (width * math.sqrt(2 * math.pi))
        density: Array = shape @ self.weights.ravel() / len(self.points)
        return density

    def share_above(self, value: float) -> float:
        """Returns the share of eigenvalues above ``value``."""
        return float((self.weights * (self.points > value)).sum() / len(self.points))


@dataclass(frozen=True)
class Trace:
    """A trace, estimated without bias.

    Attributes:
        value: The estimate.
        standard_error: Its standard error; 0 if nothing was left to chance, NaN with a single random vector.
        num_products: Number of products with the operator.
    """

    value: float
    standard_error: float
    num_products: int


def spectral_density(
    matvec: Matvec, like: Vector, *, num_vectors: int = 4, num_products: int = 30, seed: int = 0
) -> SpectralDensity:
    """Returns the density of the eigenvalues of a symmetric operator.

    Args:
        matvec: v -> H v.
        like: A vector of the shapes that H takes.
        num_vectors: Number of random vectors. The relative error of a share falls like 1 / sqrt(num_vectors x number of
            eigenvalues in the share).
        num_products: Number of products for each vector, which is also the number of points.
        seed: Seed of the vectors.

    Raises:
        ValueError: If a count is below 1.

    Source: Ghorbani, Krishnan, Xiao 2019 (ICML); Golub, Meurant 2010 for the quadrature.
    """
    _check("num_vectors", num_vectors)
    _check("num_products", num_products)
    points, weights = np.zeros((2, num_vectors, num_products))
    for i in range(num_vectors):
        space = Subspace(matvec, like, seed, expected=num_products + 1)
        assert space.grow(vectors.random_like(like, seed=seed + 10_007 * i))
        # If H does not lead out of the subspace, the vector has no share in other eigenvectors, so they have no weight.
        while space.num_products < num_products and not space.ritz.is_closed:
            space.follow(int(space.ritz.outside.argmax()))
        ritz = space.ritz
        points[i, : len(ritz.values)], weights[i, : len(ritz.values)] = ritz.values, ritz.coordinates[0] ** 2
    return SpectralDensity(points, weights, sum(x.numel() for x in like))


def trace(matvec: Matvec, like: Vector, *, num_products: int = 30, block: int = BLOCK, seed: int = 0) -> Trace:
    """Returns the trace of a symmetric operator: exact on a subspace that holds most of it, sampled on the rest.

    Args:
        matvec: v -> H v.
        like: A vector of the shapes that H takes.
        num_products: Number of products, at least 3; a third of them finds the subspace.
        block: Number of vectors that ``Hessian.each`` takes at once where they share work; the result is the same.
        seed: Seed of the random vectors.

    Raises:
        ValueError: If ``num_products`` is below 3 or ``block`` below 1.

    Source: Meyer, Musco, Musco, Woodruff 2021 (SOSA), *Hutch++*.
    """
    if num_products < 3:
        raise ValueError(f"Parameter `num_products` should be at least 3. Found `num_products = {num_products!r}`.")
    _check("block", block)
    third, dimension = num_products // 3, sum(x.numel() for x in like)
    frame, done = Frame(like, third + 1), min(third, dimension)
    drawn = (vectors.random_like(like, seed=seed + i) for i in range(num_products))

    def times(vs: Iterable[Vector]) -> Iterator[list[Tensor]]:
        return iter(matvec.each(vs, block=block)) if isinstance(matvec, Hessian) else map(matvec, vs)

    def written(v: Vector) -> tuple[float, float]:
        """Writes a vector behind the frame; returns its length and the length of its part outside the frame."""
        flat = frame.write(v)
        before = frame.layout.norm(flat)
        return float(before), float(frame.outside(flat)[-2])

    for image in times([x.sign_() for x in next(drawn)] for _ in range(done)):
        before, rest = written(image)
        # Less would add nothing but rounding to the span.
        if rest > 1e3 * torch.finfo(frame.layout.dtype).eps * before:
            frame.accept()
        del image
    basis = [frame.row(i) for i in range(len(frame))]
    total = sum(float(vectors.dot(q, image)) for q, image in zip(basis, times(basis), strict=True))
    done += len(basis)
    if len(basis) == dimension:
        return Trace(total, 0.0, done)

    waiting = deque[tuple[float, list[Tensor]]]()

    def rests() -> Iterator[list[Tensor]]:
        for _ in range(num_products - done):
            _, rest = written([x.sign_() for x in next(drawn)])
            v = frame.row(len(frame))
            # Several products at once need their vectors at once, and there is one place behind the frame.
            waiting.append((rest, vectors.clone(v) if isinstance(matvec, Hessian) else v))
            yield waiting[-1][1]

    samples = []
    for image in times(rests()):
        rest, v = waiting.popleft()
        samples.append(rest**2 * float(vectors.dot(v, image)))
        del v, image  # not to be held during the next product
    done += len(samples)
    spread = float(np.std(samples, ddof=1)) / math.sqrt(len(samples)) if len(samples) > 1 else math.nan
    return Trace(total + float(np.mean(samples)), spread, done)


def _check(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"Parameter `{name}` should be at least 1. Found `{name} = {value!r}`.")
