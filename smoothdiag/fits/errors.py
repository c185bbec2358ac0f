"""Errors of the gradient norm: their effect on a line, taken out by simulation and extrapolation.

Errors scatter the rows sideways. At the median this flattens the line: L1 comes out too small and L0 too large. An
upper line rests on rows whose gradient norm came out too small, so it gets steeper instead: L1 comes out too large.
"""

from __future__ import annotations

import numpy as np

from smoothdiag.fits.affine import Line, quantile_line, relative_weights
from smoothdiag.fits.base import Array, Correction
from smoothdiag.fits.rows import Rows

ADDED = (0.5, 1.0, 1.5, 2.0)  # Variance of the added errors, in units of the variance of the recorded errors.
NUM_SIMULATIONS = 10  # For each added variance; the mean of their lines is extrapolated.
MOST_SIMULATED = 500_000  # Rows of all simulations of one variance: more rows need fewer simulations for the same mean.
MIN_KNOWN = 0.9  # Share of the rows whose error must be known.
MAX_DEVIATION = 0.5  # Median error beyond which a parabola cannot be extrapolated back to no error.
MIN_DEVIATION = 1e-3  # Median error below which there is nothing to correct.


LARGEST_ERROR = 3.0
"""Deviation above which a gradient norm is nothing but error, so a simulation with more error tells nothing."""


def relative_errors(rows: Rows) -> Array:
    """Natural-log deviation of each gradient norm; NaN if not known.

    The variance of a norm is at most `grad_variance`, the variance of the gradient summed over all coordinates. It
    reaches this value if all noise lies along the gradient. So the result is the largest error that the norm can have,
    to first order.
    """
    with np.errstate(invalid="ignore"):
        return np.asarray(np.sqrt(np.where(rows.grad_variance >= 0, rows.grad_variance, np.nan)) / rows.x)


def correct(rows: Rows, line: Line, quantile: float, seed: int = 0) -> Correction | None:
    """The line without the largest errors that the gradient norms may have.

    Args:
        rows: the rows of the fit.
        line: the line fitted to these rows.
        quantile: level of the line.
        seed: seed of the simulated errors.

    Returns:
        Correction | None: None if the errors are unknown, negligible or too large to correct.
    """
    deviation = relative_errors(rows)
    known = deviation < LARGEST_ERROR  # False for NaN too
    if np.mean(known) < MIN_KNOWN or not MIN_DEVIATION <= np.median(deviation[known]) <= MAX_DEVIATION:
        return None
    found = extrapolate(rows.x[known], rows.y[known], deviation[known], line, quantile, seed)
    return Correction(found.intercept, found.slope, float(np.median(deviation[known])))


def extrapolate(x: Array, y: Array, deviation: Array, line: Line, quantile: float, seed: int = 0) -> Line:
    """The quantile line without errors, extrapolated on a parabola through the lines of rows with added errors.

    The parabola is taken where the added variance is -1 times the variance of the errors, so that nothing is left.

    Args:
        x: gradient norms with errors.
        y: smoothness.
        deviation: natural-log deviation of the error of each gradient norm.
        line: the line of these rows, from which the search for the other lines starts.
        quantile: level of the line.
        seed: seed of the simulated errors.

    Units: as `Line`.

    Source: Cook and Stefanski, 1994, simulation-extrapolation.
    """
    simulations = max(1, min(NUM_SIMULATIONS, MOST_SIMULATED // len(x)))
    noise = np.random.default_rng(seed).standard_normal((simulations, len(x)))
    lines = [quantile_line(x, y, quantile, relative_weights(x, y), start=line)]
    for added in ADDED:
        spread = (x * np.exp(np.sqrt(added) * deviation * one) for one in noise)
        found = np.array([quantile_line(z, y, quantile, relative_weights(z, y), start=line) for z in spread])
        lines.append(Line(*np.mean(found, axis=0).tolist()))
    variance = np.array([0.0, *ADDED])
    intercept, slope = (float(np.polyval(np.polyfit(variance, part, 2), -1.0)) for part in np.array(lines).T)
    return Line(max(intercept, 0.0), max(slope, 0.0))
