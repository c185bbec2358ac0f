"""Lines over the cloud of (gradient norm, smoothness): quantile line, least squares, hard envelope, frontier.

A line is the pair (intercept, slope), which estimates (L0, L1). Both are kept at zero or above, because
neither constant of the law can be negative.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.optimize import linprog, nnls

from smoothdiag.fits.base import Array
from smoothdiag.fits.hull import upper_hull
from smoothdiag.fits.walk import MANY, walk

START_ROWS = 250  # Most rows of the linear programme that finds a start: on more rows the walk is faster.


class Line(NamedTuple):
    """The line smoothness = intercept + slope * grad_norm.

    Units: intercept [f/x^2], slope [1/x].
    """

    intercept: float
    slope: float

    def __call__(self, x: Array) -> Array:
        """Height of the line at the gradient norms `x`."""
        return self.intercept + self.slope * x


def relative_weights(x: Array, y: Array) -> Array:
    """Weight of each row: one over the median smoothness of the rows with a similar gradient norm.

    Smoothness spans decades, so errors have to count relative to its size. The obvious weight 1/y would spoil the fit,
    because it depends on the number being fitted. It favours rows that came out low by chance: it pulls a .95 quantile
    of lognormal noise with deviation 1 down to about .74, and a single row near zero drags the line to zero. With a
    weight that depends on the gradient norm alone, the quantile stays a quantile.

    Args:
        x: gradient norms, positive.
        y: smoothness, positive.

    Returns:
        Array: weights such that `weights * y` has no units and is about 1 in the middle of the cloud.
    """
    num_bins = max(1, int(np.sqrt(len(x))))
    size, larger = divmod(len(x), num_bins)
    order = np.argsort(x, kind="stable")
    weights = np.empty_like(y)
    # Bins are as equal as they can be: the first ones hold one row more.
    for rows, width in ((order[: larger * (size + 1)], size + 1), (order[larger * (size + 1) :], size)):
        bins = rows.reshape(-1, width)
        weights[bins] = 1 / np.median(y[bins], axis=1, keepdims=True)
    return weights


def pinball(residual: Array, quantile: float) -> Array:
    """Pinball loss of residuals y - f: their size times `quantile` above the line, times 1 - `quantile` below it."""
    return np.maximum(quantile * residual, (quantile - 1) * residual)


def quantile_line(
    x: Array,
    y: Array,
    quantile: float,
    weights: Array | None = None,
    start: Line | None = None,
    is_close: bool = False,
) -> Line:
    """Line below which a share `quantile` of the rows lies, with intercept and slope at zero or above.

    Minimises the weighted sum of pinball losses. Without a start, HiGHS solves the linear programme (on evenly spaced
    rows if there are many) in its dual form, which has two constraints instead of one per row, and the walk goes
    from its answer to the exact vertex. With a start (such as the line of a nearby quantile) the walk alone is enough.

    Args:
        x: gradient norms, positive.
        y: smoothness, positive.
        quantile: level in (0, 1).
        weights: weight of each row; None computes `relative_weights`.
        start: a line to begin with.
        is_close: whether the start is as good as found: hardly any row lies between the two lines.

    Returns:
        Line: the exact minimiser; one of them if several lines tie.

    Units: as `Line`.

    Source: Koenker and Bassett, 1978, regression quantiles.
    """
    weights = relative_weights(x, y) if weights is None else weights
    some = slice(None, None, -(-len(x) // MANY))
    x_unit, y_unit = float(np.median(x[some])), float(np.median(y[some]))
    xs, ys = x / x_unit, y / y_unit
    scaled = weights / np.mean(weights)
    if start is None:
        some = slice(None, None, -(-len(x) // START_ROWS))
        begin = _solve_dual(xs[some], ys[some], quantile, scaled[some])
    else:
        begin = Line(start.intercept / y_unit, start.slope * x_unit / y_unit)
    intercept, slope = walk(xs, ys, quantile, scaled, begin, is_close)
    return Line(intercept * y_unit, slope * y_unit / x_unit)


def _solve_dual(x: Array, y: Array, quantile: float, weights: Array) -> Line:
    result = linprog(
        -y,
        A_ub=np.stack([np.ones_like(x), x]),
        b_ub=np.zeros(2),
        bounds=list(zip((quantile - 1) * weights, quantile * weights, strict=True)),
        method="highs",
    )
    if result.status != 0:  # The walk reaches the optimum from anywhere; it only takes longer.
        return Line(float(np.median(y)), 0.0)
    intercept, slope = -result.ineqlin.marginals
    return Line(max(0.0, float(intercept)), max(0.0, float(slope)))


def least_squares(x: Array, y: Array, *, nonnegative: bool = True) -> Line:
    """Least-squares line, for comparison only: it is a mean and not a bound.

    Args:
        x: gradient norms.
        y: smoothness.
        nonnegative: keep both constants at zero or above.

    Units: as `Line`.
    """
    x_unit, y_unit = float(np.median(x)), float(np.median(y))
    design = np.stack([np.ones_like(x), x / x_unit], axis=1)
    solution = nnls(design, y / y_unit)[0] if nonnegative else np.linalg.lstsq(design, y / y_unit, rcond=None)[0]
    return Line(float(solution[0]) * y_unit, float(solution[1]) * y_unit / x_unit)


def frontier(hull: Array, L1: Array | None = None) -> tuple[Array, Array]:
    """The smallest L0 that covers every row, as a function of L1: max(y - L1 x), at zero or above.

    Args:
        hull: corners (x, y) from `upper_hull`.
        L1: values at which to evaluate; None takes the values where the curve changes slope, from 0 to the value
            that needs no L0 at all.

    Returns:
        tuple[Array, Array]: L1 and the matching L0.

    Units: L1 [1/x], L0 [f/x^2].

    Source: Zhang, He, Sra and Jadbabaie, 2020, Definition 1, read as a curve.
    """
    x, y = hull[:, 0], hull[:, 1]
    if L1 is None:
        slopes = (y[:-1] - y[1:]) / (x[:-1] - x[1:])
        last = float(np.max(y / x))
        L1 = np.unique(np.concatenate([[0.0], slopes[slopes < last], [last]]))
    L0 = np.maximum(np.max(y - np.multiply.outer(L1, x), axis=-1), 0.0)
    return L1, L0


def hard_envelope(x: Array, y: Array, weights: Array | None = None, hull: Array | None = None) -> Line:
    """Line above every row with the least weighted mean height; it describes the rows, and rises with their number.

    The hull may come from `upper_hull`, where it is known already.

    Units: as `Line`.
    """
    weights = relative_weights(x, y) if weights is None else weights
    slopes, intercepts = frontier(upper_hull(x, y) if hull is None else hull)
    best = int(np.argmin(intercepts * np.mean(weights) + slopes * np.mean(weights * x)))
    return Line(float(intercepts[best]), float(slopes[best]))
