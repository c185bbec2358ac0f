"""Null tests: what else could have produced these rows? They set flags; flags, intervals and rivals set the verdict."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from smoothdiag.fits.affine import Line
from smoothdiag.fits.base import Array, Flag, Interval, ModelScore, Verdict

SATURATED = 0.5  # Above it the change of the gradient is as large as the gradient: the step sets the ratio.
NOISY_SHARE = (0.1, 0.5)  # Share of rows below the noise floor that is worth a word, and that is fatal.
NOISE_FACTOR = (3.0, 1.5)  # The same for the median of smoothness over noise floor.
MIN_DECADES = 1.0
MIN_POINTS = 20
MIN_EFFECTIVE = 10.0
TIED_TO_TIME = 0.98  # Rank correlation with the step above which time cannot be held fixed.
MIN_STEP_SPREAD = 0.1  # Natural-log spread of step lengths at a given gradient norm that makes them comparable.
FLAT = 1.25  # A line that rises by less than this factor over the data is a constant in practice.
MIN_EXPONENT_GAP = 0.15
MIN_GAIN = 0.05


@dataclass(frozen=True)
class Rows:
    """The usable rows of one fit in order of steps, as arrays, and the count of the others by cause."""

    x: Array
    y: Array
    step: Array
    saturation: Array
    noise_floor: Array
    step_norm: Array
    lr: Array
    recorded: Array
    estimator: str
    group: str
    data: str
    dropped: dict[str, int]


def rank_correlations(x: Array, y: Array, time: Array) -> tuple[float, float]:
    """Rank correlation of x and y, as it is and given time.

    Returns:
        tuple[float, float]: NaN where x or y is constant, and given time also where x or y follows time so closely
        that nothing is left to correlate.
    """
    xy, xt, yt = _correlation(x, y), _correlation(x, time), _correlation(y, time)
    if np.isnan(xy) or np.isnan(xt):
        return xy, xy
    if max(abs(xt), abs(yt)) > TIED_TO_TIME:
        return xy, np.nan
    return xy, float((xy - xt * yt) / np.sqrt((1 - xt**2) * (1 - yt**2)))


def _correlation(a: Array, b: Array) -> float:
    u, v = rankdata(a) - (len(a) + 1) / 2, rankdata(b) - (len(b) + 1) / 2
    size = np.sqrt(float(u @ u) * float(v @ v))
    return float(u @ v / size) if size > 0 else np.nan


def decades(x: Array) -> float:
    """Powers of ten between the 2.5% and the 97.5% quantile."""
    low, high = np.quantile(x, [0.025, 0.975])
    return float(np.log10(high / low))


def loglog_slope(x: Array, y: Array) -> float:
    """Least-squares slope of log y on log x; NaN where x is constant."""
    u, v = np.log(x), np.log(y)
    u, v = u - np.mean(u), v - np.mean(v)
    spread = float(u @ u)
    return float(u @ v / spread) if spread > 1e-20 * len(x) else np.nan


def check(rows: Rows, num_effective: float, correlations: tuple[float, float]) -> tuple[Flag, ...]:
    """All null tests that the rows allow, fatal flags first."""
    found = [
        _saturation(rows),
        _noise_floor(rows),
        _step_length(rows),
        _range(rows),
        _few(rows, num_effective),
        _time(rows, correlations),
    ]
    return tuple(sorted((flag for flag in found if flag is not None), key=lambda flag: not flag.fatal))


def _saturation(rows: Rows) -> Flag | None:
    known = rows.saturation[~np.isnan(rows.saturation)]
    if len(known) == 0:
        return Flag(
            "saturation unknown",
            "the rows carry no saturation, so a ratio set by the step length cannot be told from curvature",
            "no column `saturation`",
            "record the trace with a Probe, or add the column: smoothness * step_norm / (sum of both gradient norms)",
        )
    middle = float(np.median(known))
    if middle <= SATURATED:
        return None
    return Flag(
        "saturation",
        "the gradient changes by as much as its own size over the probed distance, so the ratio follows the distance: "
        "different batches at the two points, fresh random masks, or a distance far beyond the local region",
        f"median saturation {middle:.2f}, should be at most {SATURATED}",
        "measure both points on the same data and random state, and use LocalSmoothness with a smaller radius",
        fatal=True,
    )


def _noise_floor(rows: Rows) -> Flag | None:
    below = rows.dropped.get("below_noise_floor", 0)
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
        f"{share:.0%} of the rows below the floor"
        + (f", the others at a median of {ratio:.1f} times it" if len(ratios) else ""),
        "probe at a larger radius, in higher precision, or with deterministic kernels",
        fatal=share > NOISY_SHARE[1] or ratio < NOISE_FACTOR[1],
    )


def _step_length(rows: Rows) -> Flag | None:
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


def _range(rows: Rows) -> Flag | None:
    found = decades(rows.x)
    if found >= MIN_DECADES:
        return None
    return Flag(
        "range",
        "the gradient norms cover too little range to tell L0 from L1",
        f"{found:.2f} decades between their 2.5% and 97.5% quantiles, should be at least {MIN_DECADES:g}",
        "record from the first step on, or include warm-up and rate changes",
    )


def _few(rows: Rows, num_effective: float) -> Flag | None:
    if len(rows.x) >= MIN_POINTS and num_effective >= MIN_EFFECTIVE:
        return None
    return Flag(
        "few points",
        "there are too few independent rows for an upper line with an interval",
        f"{len(rows.x)} rows, worth {num_effective:.1f} independent ones; should be at least {MIN_POINTS} "
        f"and {MIN_EFFECTIVE:g}",
        "probe more often, or for longer",
    )


def _time(rows: Rows, correlations: tuple[float, float]) -> Flag | None:
    raw, partial = correlations
    if np.isnan(raw) or raw < 0.2 or len(rows.x) < MIN_POINTS:
        return None
    if np.isnan(partial):
        return Flag(
            "tied to time",
            "the gradient norm or the smoothness moves with the step almost without exception, so a law in the "
            "gradient norm and a drift in time explain the rows equally well",
            f"rank correlation {raw:.2f}; given the step it is undefined",
            "repeat with other learning rates or seeds, so that equal gradient norms occur at different steps",
        )
    if partial >= 0.1:
        return None
    return Flag(
        "time trend",
        "gradient norm and smoothness move together only because both drift during the run",
        f"rank correlation {raw:.2f}, given the step {partial:.2f}",
        "repeat with other learning rates or seeds, so that equal gradient norms occur at different steps",
    )


def decide(
    flags: tuple[Flag, ...],
    line: Line,
    L1_interval: Interval,
    comparison: tuple[ModelScore, ...],
    bounds: tuple[float, float],
    top_slope: float,
) -> tuple[Verdict, str]:
    """The verdict and its reason. The first rule that applies decides:

    1. a fatal flag: ARTEFACT;
    2. the flags "few points", "range" or "time trend": NOT_IDENTIFIED;
    3. the slope's interval reaches zero, or the line rises over the data by less than a factor `FLAT`: CONSTANT where
       even the upper end of the interval would at most double it, else NOT_IDENTIFIED;
    4. the power beats the line on later steps, with its interval, and its exponent is not close to 1: POWER; an
       exponent above 1 counts only where the rows themselves rise faster than in proportion at large gradient norms,
       since a curve that bends from flat to proportional is still bounded by a line;
    5. the line does not beat the constant on later steps, with its interval: NOT_IDENTIFIED;
    6. else: L0L1.

    Args:
        flags: from `check`.
        line: the fitted line.
        L1_interval: interval of its slope.
        comparison: from `models.compare`.
        bounds: 2.5% and 97.5% quantiles of the gradient norm.
        top_slope: log-log slope of the rows in the upper half of the range.
    """  # noqa: D415 (the rules are the docstring)
    fatal = [flag for flag in flags if flag.fatal]
    if fatal:
        return Verdict.ARTEFACT, f"{fatal[0].cause} ({fatal[0].evidence})."
    blocking = [flag for flag in flags if flag.name in {"few points", "range", "time trend"}]
    if blocking:
        return Verdict.NOT_IDENTIFIED, f"{blocking[0].cause} ({blocking[0].evidence})."
    scores = {score.name: score for score in comparison}
    low, high = bounds
    rise = _ratio(line(np.array(high)), line(np.array(low)))
    if L1_interval[0] <= 0 or rise < FLAT:
        # The widest rise the interval allows, at the height the line has in the middle of the data.
        middle = float(line(np.array(np.sqrt(low * high))))
        widest = _ratio(middle + L1_interval[1] * (high - low) / 2, middle - L1_interval[1] * (high - low) / 2)
        if widest <= 2:
            return Verdict.CONSTANT, (
                f"over {high / low:.3g}-fold gradient norms the line rises {rise:.3g}-fold, and {widest:.3g}-fold at "
                "most within the interval of L1."
            )
        return Verdict.NOT_IDENTIFIED, (
            f"the interval of L1 reaches from {L1_interval[0]:.3g} to {L1_interval[1]:.3g}: it holds no slope as "
            "well as a real one."
        )
    power, affine = scores["power"], scores["affine"]
    bends = power.exponent < 1 - MIN_EXPONENT_GAP or min(power.exponent, top_slope) > 1 + MIN_EXPONENT_GAP
    if bends and power.gain_interval[0] > 0 and power.gain > MIN_GAIN:
        return Verdict.POWER, (
            f"on later steps an exponent of {power.exponent:.2f} removes {power.gain:.0%} of the line's loss "
            f"(interval {power.gain_interval[0]:.0%} to {power.gain_interval[1]:.0%})."
        )
    if not affine.skill_interval[0] > 0:
        return Verdict.NOT_IDENTIFIED, (
            f"on later steps the line is not reliably better than a constant (it removes {affine.skill:.0%} of its "
            f"loss, interval {affine.skill_interval[0]:.0%} to {affine.skill_interval[1]:.0%})."
        )
    return Verdict.L0L1, (
        f"the line removes {affine.skill:.0%} of a constant's loss on later steps (interval "
        f"{affine.skill_interval[0]:.0%} to {affine.skill_interval[1]:.0%}), and the interval of L1 excludes zero."
    )


def _ratio(upper: float | Array, lower: float | Array) -> float:
    return float(upper / lower) if lower > 0 else float("inf")
