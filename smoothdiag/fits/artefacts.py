"""Null tests of the measurement: could the rows say more about how they were taken than about the loss?"""

from __future__ import annotations

import numpy as np

from smoothdiag.fits.affine import Line
from smoothdiag.fits.base import Array, Flag
from smoothdiag.fits.rows import Rows

SATURATED = 0.5  # Above it the change of the gradient is as large as the gradient: the step sets the ratio.
MIN_KNOWN = 0.5  # Share of the rows that must carry a saturation before their median means anything.
MIN_PART = 5  # Rows that a part of the cloud needs before its own median counts.
NOISY_SHARE = (0.1, 0.5)  # Share of rows below the noise floor that is worth a word, and that is fatal.
NOISE_FACTOR = (3.0, 1.5)  # The same for the median of smoothness over noise floor.
NOISE_CAUSES = ("below_noise_floor", "rounding_limited", "zero_smoothness")
MIN_POINTS = 20
MIN_STEP_SPREAD = 0.1  # Natural-log spread of step lengths at a given gradient norm that makes them comparable.
MANY = 0.5  # Share of the rows with a doubtful status above which they carry the fit.
MIN_RATE_SPREAD = 0.2  # Natural-log deviation of the learning rates: one change by half is enough.
NEAR_EDGE = 0.25  # Distance from -1 of the exponent with which smoothness follows the rate.
MAX_EXPONENT = 0.1  # Of the gradient norm at equal rate, below which the rate says it all.
ON_THE_LINE = 1e-9  # Relative distance from the line below which a row lies on it.


def saturation(rows: Rows, line: Line) -> Flag | None:
    """Whether the probed distance set the ratio: over all rows, where gradients are large, or where the line rests."""
    known = ~np.isnan(rows.saturation)
    if known.mean() < MIN_KNOWN:
        return Flag(
            "saturation unknown",
            "too few rows carry a saturation, so a ratio set by the step length cannot be told from curvature",
            f"{known.mean():.0%} of the rows have one, should be at least {MIN_KNOWN:.0%}",
            "record the trace with a Probe, or add the column: smoothness * step_norm / (sum of both gradient norms)",
        )
    low, high = np.log(np.min(rows.x)), np.log(np.max(rows.x))
    parts = {
        "of all rows": np.ones(len(rows.x), dtype=bool),
        "of the upper half of the gradient norms": np.log(rows.x) >= (low + high) / 2,
        "of the rows at or above the line": rows.y >= line(rows.x) * (1 - ON_THE_LINE),
    }
    for name, part in parts.items():
        values = rows.saturation[part & known]
        if (len(values) < MIN_PART and not part.all()) or not np.median(values) > SATURATED:
            continue
        return Flag(
            "saturation",
            "the gradient changes by as much as its own size over the probed distance, so the ratio follows the "
            "distance: different batches at the two points, fresh random masks, or a distance far beyond the local "
            "region",
            f"median saturation {np.median(values):.2f} {name}, should be at most {SATURATED}",
            "measure both points on the same data and random state, and use LocalSmoothness with a smaller radius",
            fatal=True,
        )
    return None


def noise_floor(rows: Rows) -> Flag | None:
    """Whether the change of the gradient is mostly its own noise or rounding; a change of exactly zero is too."""
    below = sum(rows.dropped.get(cause, 0) for cause in NOISE_CAUSES)
    share = below / (below + len(rows.x))
    floor_known = rows.noise_floor > 0
    ratios = rows.y[floor_known] / rows.noise_floor[floor_known]
    ratio = float(np.median(ratios)) if len(ratios) else np.inf
    if share <= NOISY_SHARE[0] and ratio >= NOISE_FACTOR[0]:
        return None
    return Flag(
        "noise floor",
        "much of the measured smoothness is the noise of the gradient itself; the rows below the floor are missing "
        "from the fit, which lifts it",
        f"{share:.0%} of the rows below the floor or at zero"
        + (f", the others at a median of {ratio:.1f} times it" if len(ratios) else ""),
        "probe at a larger radius, in higher precision, or with deterministic kernels",
        fatal=share > NOISY_SHARE[1] or ratio < NOISE_FACTOR[1],
    )


def step_length(rows: Rows) -> Flag | None:
    """Whether smoothness falls like one over the step length at a given gradient norm, as pure noise does.

    Two gradients on different batches differ by the same amount however short the step is.
    """
    known = np.isfinite(rows.step_norm) & (rows.step_norm > 0)
    if known.sum() < MIN_POINTS:
        return None
    x, y, d = np.log(rows.x[known]), np.log(rows.y[known]), np.log(rows.step_norm[known])
    design = np.stack([np.ones_like(x), x], axis=1)
    d_rest = d - design @ np.linalg.lstsq(design, d, rcond=None)[0]
    y_rest = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
    if np.std(d_rest) < MIN_STEP_SPREAD:
        return None
    slope = float(d_rest @ y_rest / (d_rest @ d_rest))
    error = float(np.std(y_rest - slope * d_rest) / (np.std(d_rest) * np.sqrt(len(d_rest))))
    if slope + 2 * error > -0.5:
        return None
    change = float(np.median(rows.y[known] * rows.step_norm[known] / rows.x[known]))
    return Flag(
        "step length",
        "at equal gradient norm smoothness falls as the probed distance grows, as it does when the two gradients "
        "differ by noise (different batches or masks) and not by curvature",
        f"smoothness ~ distance^{slope:.2f} +- {error:.2f}; the gradient changes by {change:.2g} of its norm",
        "measure both points on the same data and random state; on path rows a rate that follows the curvature "
        "(training at the edge of stability) does the same, so repeat with LocalSmoothness",
        # Path rows near the edge of stability show it for a true reason; a slope of -1 with a change of the size of
        # the gradient is what noise alone gives.
        fatal=abs(slope + 1) < max(0.15, 2 * error) and change > SATURATED,
    )


def learning_rate(rows: Rows) -> Flag | None:
    """Whether smoothness times the learning rate stays the same across changes of the rate.

    At the edge of stability curvature adapts to the rate until the optimizer is barely stable, whatever the gradient
    norm.
    """
    known = np.isfinite(rows.lr) & (rows.lr > 0)
    if known.sum() < MIN_POINTS:
        return None
    x, y, rate = np.log(rows.x[known]), np.log(rows.y[known]), np.log(rows.lr[known])
    design = np.stack([rate - np.mean(rate), x - np.mean(x)], axis=1)
    a, b = design.T
    if np.std(a) < MIN_RATE_SPREAD:
        return None
    rest = a - b * float(a @ b) / float(b @ b) if float(b @ b) > 0 else a
    exponent, of_norm = np.linalg.lstsq(design, y - np.mean(y), rcond=None)[0]
    error = _error(y - np.mean(y) - design @ (exponent, of_norm), rest)
    if 2 * error > NEAR_EDGE:
        return _tied_to_rate(a, b, y - np.mean(y))
    if abs(exponent + 1) > NEAR_EDGE:
        return None
    product = np.quantile(rows.y[known] * rows.lr[known], [0.1, 0.9])
    return Flag(
        "learning rate",
        "smoothness falls as the learning rate rises and their product stays the same, as at the edge of stability, "
        "where curvature follows the optimizer",
        f"at equal gradient norm smoothness ~ rate^{exponent:.2f} +- {error:.2f}, and at equal rate ~ gradient "
        f"norm^{of_norm:.2f}; their product rises {product[1] / product[0]:.3g}-fold from its 10% to its 90% quantile",
        "fit steps of one rate at a time, or train at smaller rates, where curvature does not adapt",
        blocking=bool(abs(of_norm) < MAX_EXPONENT),
    )


def _tied_to_rate(rate: Array, x: Array, y: Array) -> Flag | None:
    """Whether smoothness follows the rate as at the edge, where rate and gradient norm cannot be told apart."""
    exponent = float(rate @ y) / float(rate @ rate)
    error = _error(y - exponent * rate, rate)
    if abs(exponent + 1) > NEAR_EDGE or 2 * error > NEAR_EDGE:
        return None
    return Flag(
        "learning rate",
        "smoothness falls as the learning rate rises and their product stays the same, as at the edge of stability, "
        "and the gradient norm moves with the rate: either of the two could make the relation",
        f"smoothness ~ rate^{exponent:.2f} +- {error:.2f}; correlation of the logarithms of rate and gradient norm "
        f"{float(rate @ x) / float(np.sqrt((rate @ rate) * (x @ x))):.2f}",
        "fit steps of one rate at a time, or train at smaller rates, where curvature does not adapt",
        blocking=True,
    )


def _error(residual: Array, variable: Array) -> float:
    """Standard error of the coefficient of a variable, from the residual and the part of it nothing else explains."""
    spread = float(np.std(variable)) * np.sqrt(len(variable))
    return float(np.std(residual) / spread) if spread > 0 else np.inf


def kinks(rows: Rows) -> Flag | None:
    """Whether most values depend on the radius they were taken at."""
    share = float(np.mean(rows.status == "kink_limited"))
    if share <= MANY:
        return None
    return Flag(
        "kinks",
        "most values change with the probing radius, as they do on a loss with kinks: the constants belong to the "
        "radius that was used",
        f"{share:.0%} of the rows",
        "compare fits at two radii, and quote the radius with the constants",
    )


def not_reproduced(rows: Rows) -> Flag | None:
    """Whether the gradients of the measurement are those the run trained on."""
    share = float(np.mean(rows.status == "not_reproduced"))
    if share == 0:
        return None
    return Flag(
        "not reproduced",
        "the gradient of the measurement has another direction or length than the one the run trained on, so these "
        "rows may belong to another loss",
        f"{share:.1%} of the rows",
        "give the probe the loss that is trained: everything that changes it belongs inside loss_fn",
        blocking=share > MANY,
    )
