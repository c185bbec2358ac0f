"""Shapes of smoothness over the points of a scan, fitted in logarithms by least squares.

A scan has some forty points on some twenty lines, too few for a quantile line at .95. So the fit takes the shape
and the height apart: log smoothness = level + shape + rest, where the rest has the same distribution at all gradient
norms. The shape comes from all points, and the height of a quantile from the rests alone (a scale model).

A shape is log(1 - share + share z^exponent), where z is the gradient norm (or the distance, or the loss gap) in units
of its middle value. It covers the constant (share 0), the line (exponent 1), the power with and without intercept. The
fit tries all shapes of a grid: the sums of squares of all shapes in all resamples are two matrix products.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from smoothdiag.fits.base import Array
from smoothdiag.fits.scans.lines import Codes

TINY = 1e-30
_SHARES = np.concatenate([[0.0], 1 / (1 + np.exp(-np.arange(-7.0, 7.01, 0.2))), [1.0]])
FINE_SHARES = np.concatenate([[0.0], 1 / (1 + np.exp(-np.arange(-9.0, 9.001, 0.02))), [1.0]])
EXPONENTS = np.concatenate([np.arange(2, 33) / 20, np.arange(17, 31) / 10])  # .1 to 1.6, and on to 3 in wider steps


class Found(NamedTuple):
    """The best shape of each resample.

    Attributes:
        best: its number in the grid.
        level: log smoothness at z = 1.
    """

    best: Codes
    level: Array


class Shapes:
    """A grid of shapes at the points.

    Args:
        z: explaining quantities, one row each (several for the loss gap, one for each f*); zero or above.
        exponents: the exponents to try.
        shares: the shares of the power in the smoothness at z = 1.
    """

    def __init__(self, z: Array, exponents: Array, shares: Array = _SHARES) -> None:
        z = np.atleast_2d(z)
        # The starting point has the distance 0. Replaced by a small distance, it would tie the fit to the unit of x.
        self.unit = np.exp([np.median(np.log(row[row > 0])) if (row > 0).any() else 0.0 for row in z])
        which, power, part = np.meshgrid(np.arange(len(z)), exponents, shares, indexing="ij")
        self.source, self.exponent, self.share = which.ravel(), power.ravel(), part.ravel()
        raised = (z / self.unit[:, None])[:, None, :] ** exponents[:, None]
        mixed = (1 - shares)[:, None] + shares[:, None] * raised[:, :, None, :]
        self.table = np.log(np.maximum(mixed, TINY)).reshape(-1, z.shape[1])

    def fit(self, target: Array, counts: Array) -> Found:
        """The shape with the least sum of squares in each resample; of equal ones the first, which is the flattest."""
        rest = target - self.table
        size = counts.sum(axis=1, keepdims=True)
        first, second = counts @ rest.T, counts @ (rest**2).T
        squares = second - first**2 / size
        tied = squares <= squares.min(axis=1, keepdims=True) * (1 + 1e-9) + 1e-12 * second.min(axis=1, keepdims=True)
        best = np.argmax(tied, axis=1)
        return Found(best, np.take_along_axis(first / size, best[:, None], axis=1)[:, 0])

    def heights(self, found: Found) -> Array:
        """Log smoothness of each resample's shape at all points; shape (resamples, points)."""
        return np.asarray(self.table[found.best] + found.level[:, None])

    def constants(self, found: Found) -> tuple[Array, Array, Array]:
        """Intercept, coefficient and exponent of each resample; an exponent of zero for a constant."""
        share, exponent = self.share[found.best], np.where(self.share[found.best] > 0, self.exponent[found.best], 0.0)
        scale = np.exp(found.level)
        return scale * (1 - share), scale * share / self.unit[self.source[found.best]] ** exponent, exponent

    def rise(self, found: Found, low: float, high: float) -> Array:
        """Factor by which each resample's shape rises from one value of the explaining quantity to another."""
        intercept, coefficient, exponent = self.constants(found)
        power = coefficient * np.array([[low], [high]]) ** exponent
        return np.asarray((intercept + power[1]) / (intercept + power[0]))


def left_out(shapes: Shapes, target: Array, line: Codes, without: Array) -> Array:
    """Log smoothness at each point of a line, as the shape fitted without this line predicts it.

    Args:
        shapes: the grid.
        target: log smoothness of the points.
        line: number of each point's line, -1 for the starting point.
        without: from `Lines.all_but_one`.

    Returns:
        Array: one value for each point on a line.
    """
    on_line = np.flatnonzero(line >= 0)
    return shapes.heights(shapes.fit(target, without))[line[on_line], on_line]


def lift(rest: Array, counts: Array, quantile: float) -> Array:
    """The quantile of the rests in each resample: a share `quantile` of the points lies at or below it."""
    order = np.argsort(rest, axis=1)
    share = np.cumsum(np.take_along_axis(counts, order, axis=1), axis=1)
    place = np.argmax(share >= quantile * share[:, -1:] * (1 - 1e-12), axis=1)
    return np.take_along_axis(np.take_along_axis(rest, order, axis=1), place[:, None], axis=1)[:, 0]
