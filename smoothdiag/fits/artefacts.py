"""Null tests of the measurement: do the rows tell how they were measured, rather than how smooth the loss is?"""

from __future__ import annotations

import numpy as np

from smoothdiag.fits.affine import Line
from smoothdiag.fits.base import Array, Flag
from smoothdiag.fits.rows import Rows

SATURATED = 0.5  # Above it the gradient changes by as much as its own size, so the step length sets the ratio.
MIN_KNOWN = 0.5  # Share of the rows that must carry a saturation before their median means anything.
MIN_PART = 5  # Rows that a part of the cloud needs before its own median counts.
NOISY_SHARE = (0.1, 0.5)  # Share of rows below the noise floor that sets the flag, and share that makes it fatal.
NOISE_FACTOR = (3.0, 1.5)  # Median of smoothness over noise floor that sets the flag, and that makes it fatal.
NOISE_CAUSES = ("below_noise_floor", "rounding_limited", "zero_smoothness")
MIN_POINTS = 20
MIN_STEP_SPREAD = 0.1  # With less natural-log spread of step lengths at equal gradient norm, nothing can be compared.
MANY = 0.5  # Share of the rows with a doubtful status above which these rows carry the fit.
MIN_RATE_SPREAD = 0.2  # Natural-log deviation of the learning rates: one change by half is enough.
NEAR_EDGE = 0.25  # Distance from -1 of the exponent with which smoothness follows the rate.
MAX_EXPONENT = 0.1  # Exponent of the gradient norm at equal rate, below which the rate alone explains smoothness.
ON_THE_LINE = 1e-9  # Relative distance from the line below which a row lies on it.


def saturation(rows: Rows, line: Line) -> Flag | None:
    """Whether the probed distance set the ratio: in all rows, at large gradients, or in rows that carry the line."""
    known = ~np.isnan(rows.saturation)
    if known.mean() < MIN_KNOWN:
        return Flag(
            "saturation unknown",
            "too few rows have a saturation, so nothing shows whether curvature or the step length sets the smoothness",
            f"{known.mean():.0%} of the rows have one, should be at least {MIN_KNOWN:.0%}",
            "record the trace with a Probe, or add the column `saturation`: smoothness * step_norm / (sum of the "
            "gradient norms at both points)",
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
            "over the probed distance the gradient changes by as much as its own size, so the measured smoothness "
            "tells the distance and not the curvature. In rows of a Probe the distance is too long. In rows measured "
            "by hand, other batches or random masks (dropout) at the second point do the same",
            f"median saturation {np.median(values):.2f} {name}, should be at most {SATURATED}",
            "measure over a shorter distance: sd.LocalSmoothness(radius=...) with a tenth of the distance that was "
            "used (`step_norm` over the norm of x). By hand, also measure both points on the same data with the same "
            "random numbers",
            fatal=True,
        )
    return None


def noise_floor(rows: Rows) -> Flag | None:
    """Whether the change of the gradient is mostly noise or rounding; a change of exactly zero counts as rounding."""
    below = sum(rows.dropped.get(cause, 0) for cause in NOISE_CAUSES)
    share = below / (below + len(rows.x))
    floor_known = rows.noise_floor > 0
    ratios = rows.y[floor_known] / rows.noise_floor[floor_known]
    ratio = float(np.median(ratios)) if len(ratios) else np.inf
    if share <= NOISY_SHARE[0] and ratio >= NOISE_FACTOR[0]:
        return None
    return Flag(
        "noise floor",
        "much of the measured smoothness is noise of the gradient. Rows below the noise floor are left out of the fit, "
        "and without them the line lies too high",
        f"{share:.0%} of the rows are below the floor or at zero"
        + (f"; the median of the other rows is {ratio:.1f} times the floor" if len(ratios) else ""),
        "probe at a larger radius, in higher precision, or with deterministic kernels",
        fatal=share > NOISY_SHARE[1] or ratio < NOISE_FACTOR[1],
    )


def step_length(rows: Rows) -> Flag | None:
    """Whether smoothness falls like one over the step length at equal gradient norm, as pure noise does.

    Two gradients on different batches differ by the same amount however short the step is. A smooth drift of step
    length and smoothness over the run is taken out first: the radius of local rows is a share of ||x||, which grows
    while the curvature changes.

    Local rows also shorten their radius where the gradient changes by more than a fifth. So their smoothness falls as
    the radius grows by design, and the pattern says nothing while the change is small. For them the flag needs a
    change as large as the gradient.
    """
    known = np.isfinite(rows.step_norm) & (rows.step_norm > 0)
    if known.sum() < MIN_POINTS:
        return None
    x, y, d = np.log(rows.x[known]), np.log(rows.y[known]), np.log(rows.step_norm[known])
    time = rows.step[known] - np.mean(rows.step[known])
    time = time / max(float(np.max(np.abs(time))), 1.0)
    design = np.stack([np.ones_like(x), x, time, time**2], axis=1)
    d_rest = d - design @ np.linalg.lstsq(design, d, rcond=None)[0]
    y_rest = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
    if np.std(d_rest) < MIN_STEP_SPREAD:
        return None
    slope = float(d_rest @ y_rest / (d_rest @ d_rest))
    error = float(np.std(y_rest - slope * d_rest) / (np.std(d_rest) * np.sqrt(len(d_rest))))
    if slope + 2 * error > -0.5:
        return None
    change = float(np.median(rows.y[known] * rows.step_norm[known] / rows.x[known]))
    # Near the edge of stability path rows show this pattern for a true reason. Noise alone gives a slope of -1 and
    # changes as large as the gradient.
    fatal = abs(slope + 1) < max(0.15, 2 * error) and change > SATURATED
    if rows.estimator.startswith("local") and not fatal:
        return None
    return Flag(
        "step length",
        "at equal gradient norm and time, smoothness falls as the probed distance grows. Noise gives this pattern "
        "without any curvature: the two gradients differ because their batches or masks differ",
        f"smoothness ~ distance^{slope:.2f} +- {error:.2f}; the gradient changes by {change:.2g} times its norm",
        "measure both points on the same data with the same random numbers. If these are path rows, repeat with "
        "LocalSmoothness: a learning rate that follows the curvature (training at the edge of stability) gives the "
        "same pattern",
        fatal=fatal,
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
        "smoothness falls as the learning rate rises, and their product stays the same. This happens at the edge of "
        "stability, where curvature adapts to the optimizer",
        f"at equal gradient norm smoothness ~ rate^{exponent:.2f} +- {error:.2f}, and at equal rate smoothness ~ "
        f"gradient norm^{of_norm:.2f}; rate times smoothness rises {product[1] / product[0]:.3g}-fold from its 10% to "
        "its 90% quantile",
        "fit steps of one rate at a time, or train at smaller rates, where curvature does not adapt",
        blocking=bool(abs(of_norm) < MAX_EXPONENT),
    )


def _tied_to_rate(rate: Array, x: Array, y: Array) -> Flag | None:
    """As `learning_rate`, for rows whose rate and gradient norm cannot be told apart."""
    exponent = float(rate @ y) / float(rate @ rate)
    error = _error(y - exponent * rate, rate)
    if abs(exponent + 1) > NEAR_EDGE or 2 * error > NEAR_EDGE:
        return None
    return Flag(
        "learning rate",
        "smoothness falls as the learning rate rises, and their product stays the same, as at the edge of stability. "
        "The gradient norm moves with the rate, so either of the two could explain the smoothness",
        f"smoothness ~ rate^{exponent:.2f} +- {error:.2f}; the logarithms of rate and gradient norm have a correlation "
        f"of {float(rate @ x) / float(np.sqrt((rate @ rate) * (x @ x))):.2f}",
        "fit steps of one rate at a time, or train at smaller rates, where curvature does not adapt",
        blocking=True,
    )


def _error(residual: Array, variable: Array) -> float:
    """Standard error of a coefficient, from the residual and the part of its variable that no other one explains."""
    spread = float(np.std(variable)) * np.sqrt(len(variable))
    return float(np.std(residual) / spread) if spread > 0 else np.inf


def kinks(rows: Rows) -> Flag | None:
    """Whether most values depend on the radius at which they were measured."""
    share = float(np.mean(rows.status == "kink_limited"))
    if share <= MANY:
        return None
    return Flag(
        "kinks",
        "most values change with the probing radius, as they do on a loss with kinks (ReLU, max-pooling), so the "
        "constants hold only for the radius that was used",
        f"{share:.0%} of the rows are kink_limited",
        "compare fits at two radii, and quote the radius with the constants",
    )


def not_reproduced(rows: Rows) -> Flag | None:
    """Whether the measured gradients are the gradients that the run trained on."""
    share = float(np.mean(rows.status == "not_reproduced"))
    if share == 0:
        return None
    return Flag(
        "not reproduced",
        "some measured gradients differ in direction or length from the gradients that the run trained on, so these "
        "rows may belong to another loss",
        f"{share:.1%} of the rows are not_reproduced",
        "give the probe the loss that is trained: move everything that changes the loss into loss_fn",
        blocking=share > MANY,
    )
