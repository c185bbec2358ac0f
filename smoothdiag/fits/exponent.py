"""Interval of the exponent of the power model: which powers of the gradient norm the rows cannot tell apart."""

from __future__ import annotations

import math

import numpy as np

from smoothdiag.fits.affine import Line, pinball
from smoothdiag.fits.base import Array, Interval
from smoothdiag.fits.intervals import percentile_interval
from smoothdiag.fits.models import EXACT, EXPONENT_RANGE, EXPONENT_STEPS, power_line
from smoothdiag.fits.resamples import Counts, sums

COARSE = 0.1  # Above this exponent of the grid its steps are twice as wide, because powers there differ less.
WIDE_FROM = 1.3
NOT_FOUND = (math.nan, math.nan)


def exponent_interval(
    x: Array, y: Array, weights: Array, quantile: float, counts: Counts, estimate: float, freedom: float = math.inf
) -> Interval:
    """Interval of rho in smoothness = intercept + coefficient * grad_norm ** rho, from resampled blocks of steps.

    For every exponent of a grid the best line in grad_norm ** rho is fitted once, to all rows. A resample takes the
    exponent whose line has the smallest loss on it. The lines are not fitted again: along the best lines of all
    exponents intercept and coefficient already move with the exponent, so what a new fit would change is of second
    order. An end of `EXPONENT_RANGE` means "this or beyond".

    Args:
        x: gradient norms.
        y: smoothness.
        weights: weight of each row.
        quantile: level of the model.
        counts: from `resamples.stationary_counts`.
        estimate: exponent of the best power for all rows; the interval holds it.
        freedom: from `intervals.degrees_of_freedom`.

    Returns:
        Interval: NaN if the gradient norms are equal.

    Source: Murphy and van der Vaart, 2000, On profile likelihood, for the curve of best lines.
    """
    if not np.ptp(x) > EXACT * float(np.max(x)):
        return NOT_FOUND
    grid = _grid(estimate)
    z = x / float(np.median(x))
    lines: dict[float, Line] = {}
    for rho in grid.tolist():
        power_line(z, y, quantile, weights, rho, lines)
    # Losses within rounding are ties; the exponent nearest to the estimate takes them.
    nearest = np.argsort(np.abs(grid - estimate), kind="stable")

    def losses(rows: slice) -> Array:
        """Loss of each row under the lines of all exponents, and its weighted smoothness."""
        at, height, weight = z[rows], y[rows], weights[rows]
        under = [weight * pinball(height - lines[rho](at**rho), quantile) for rho in grid[nearest].tolist()]
        return np.stack([*under, weight * height], axis=1)

    found = sums(counts, losses)
    total, scale = found[:, :-1], EXACT * found[:, -1:]
    found = grid[nearest][np.argmin(np.where(total <= np.min(total, axis=1, keepdims=True) + scale, 0, 1), axis=1)]
    return percentile_interval(found, estimate, freedom)


def _grid(estimate: float) -> Array:
    """Exponents to try: coarse over the whole range, fine around the estimate."""
    low, high = EXPONENT_RANGE
    step, fine = EXPONENT_STEPS[1:]
    parts = [
        np.arange(round(low / step), round(WIDE_FROM / step)) * step,
        np.arange(round(WIDE_FROM / COARSE), round(high / COARSE) + 1) * COARSE,
        estimate + np.arange(-5, 6) * fine,
    ]
    return np.unique(np.clip(np.round(np.concatenate(parts), 6), low, high))
