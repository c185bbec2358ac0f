"""The verdict: flags, interval and rivals in one word, with the reason."""

from __future__ import annotations

import math

import numpy as np

from smoothdiag.fits.affine import Line
from smoothdiag.fits.base import Array, Flag, Interval, ModelScore, Verdict
from smoothdiag.fits.lossgap import LossGap

FLAT = 1.25  # A line that rises by less than this factor over the data is a constant in practice.
CONSTANT_RISE = 2.0  # A constant is claimed where even the upper end of the interval at most doubles it.
MIN_EXPONENT_GAP = 0.15
MIN_GAIN = 0.05
# The line of a true law with lognormal noise of deviation .8 over two decades removes .44; in the valley of
# (1 - x y)^2 / 2, where curvature has no bound at a vanishing gradient, a line removes up to .16.
MIN_SKILL = 0.2
# What only says that the gradient norm does not do, which is what the loss gap claims too.
EXCUSED = ("coverage", "time trend", "tied to time", "surrogates")


def rises(line: Line, bounds: Interval) -> float:
    """Factor by which the line rises from the lower to the upper bound of the gradient norm."""
    return _ratio(line(np.array(bounds[1])), line(np.array(bounds[0])))


def has_slope(line: Line, L1_interval: Interval, bounds: Interval) -> bool:
    """Whether the interval of the slope excludes zero and the line rises by more than `FLAT` over the data."""
    return L1_interval[0] > 0 and rises(line, bounds) >= FLAT


def widest_rise(line: Line, L1_interval: Interval, bounds: Interval) -> float:
    """The widest rise that the interval of the slope allows, at the height the line has in the middle of the data."""
    low, high = bounds
    middle = float(line(np.array(math.sqrt(low * high))))
    half = L1_interval[1] * (high - low) / 2
    return _ratio(middle + half, middle - half)


def decide(
    flags: tuple[Flag, ...],
    line: Line,
    L1_interval: Interval,
    comparison: tuple[ModelScore, ...],
    bounds: Interval,
    top_slope: float,
    *,
    estimator: str = "",
    L1_unit: float = 1.0,
    gap: LossGap | None = None,
) -> tuple[Verdict, str]:
    """The verdict and its reason. The first rule that applies decides:

    1. a fatal flag: ARTEFACT;
    2. the loss gap beats constant and line on later steps, with its intervals, by more than `MIN_GAIN`, has a later
       loss less than that of the power and of any monotone function by the same share, is not a drift in time, and a
       line in the gradient norm adds nothing to it: LOSS_GAP, if no flag is blocking but those in `EXCUSED`;
    3. a blocking flag: NOT_IDENTIFIED, except "coverage" where rule 5 holds: a power explains why the line misses;
    4. the slope's interval reaches zero, or the line rises over the data by less than a factor `FLAT`: CONSTANT where
       even the upper end of the interval would at most double it, else NOT_IDENTIFIED;
    5. the power beats the line on later steps, with its interval, and its exponent is not close to 1: POWER; an
       exponent above 1 counts only where the rows themselves rise faster than in proportion at large gradient norms,
       since a curve that bends from flat to proportional is still bounded by a line;
    6. the line does not beat the constant on later steps, with its interval and by `MIN_SKILL`: NOT_IDENTIFIED;
    7. else: L0L1.

    Args:
        flags: from `check`.
        line: the fitted line.
        L1_interval: interval of its slope.
        comparison: from `models.compare`.
        bounds: 2.5% and 97.5% quantiles of the gradient norm.
        top_slope: log-log slope of the rows in the upper half of the range.
        estimator: whose rows they are.
        L1_unit: what a slope of one is in the units of the caller.
        gap: the loss gap on the rows that have a loss.
    """  # noqa: D415 (the rules are the docstring)
    for flag in flags:
        if flag.fatal:
            return Verdict.ARTEFACT, f"{flag.cause} ({flag.evidence})."
    scores = {score.name: score for score in comparison}
    blocked = any(flag.blocking and flag.name not in EXCUSED for flag in flags)
    if gap is not None and not blocked and _beats_all(gap):
        return Verdict.LOSS_GAP, (
            f"on later steps the distance of the loss from its minimum removes {gap.score.skill:.0%} of a constant's "
            f"loss and {gap.score.gain:.0%} of the line's (interval {gap.score.gain_interval[0]:.0%} to "
            f"{gap.score.gain_interval[1]:.0%}), and the gradient norm {max(gap.beyond, 0.0):.0%} of what it leaves. "
            f"{_scan(gap)}"
        )
    slope = has_slope(line, L1_interval, bounds)
    is_power = slope and _beats_line(scores["power"], top_slope)
    for flag in flags:
        if flag.blocking and not (flag.name == "coverage" and is_power):
            return Verdict.NOT_IDENTIFIED, f"{flag.cause} ({flag.evidence})."
    if not slope:
        widest = widest_rise(line, L1_interval, bounds)
        if widest <= CONSTANT_RISE:
            return Verdict.CONSTANT, (
                f"over {bounds[1] / bounds[0]:.3g}-fold gradient norms the line rises {rises(line, bounds):.3g}-fold, "
                f"and {widest:.3g}-fold at most within the interval of L1."
            )
        return Verdict.NOT_IDENTIFIED, (
            f"the interval of L1 reaches from {L1_interval[0] * L1_unit:.3g} to {L1_interval[1] * L1_unit:.3g}: it "
            "holds no slope as well as a real one."
        )
    if is_power:
        power = scores["power"]
        return Verdict.POWER, (
            f"on later steps an exponent of {power.exponent:.2f} removes {power.gain:.0%} of the line's loss "
            f"(interval {power.gain_interval[0]:.0%} to {power.gain_interval[1]:.0%})."
        )
    affine = scores["affine"]
    if math.isnan(affine.skill):
        return Verdict.NOT_IDENTIFIED, "there are too few rows to test the line on later steps."
    shares = f"{affine.skill_interval[0]:.0%} to {affine.skill_interval[1]:.0%}"
    if not (affine.skill_interval[0] > 0 and affine.skill > MIN_SKILL):
        return Verdict.NOT_IDENTIFIED, (
            f"on later steps the line is not reliably better than a constant, or hardly (it removes {affine.skill:.0%} "
            f"of its loss, interval {shares}; should be above {MIN_SKILL:.0%})."
        )
    return Verdict.L0L1, (
        f"the line removes {affine.skill:.0%} of a constant's loss on later steps (interval {shares}), and the "
        f"interval of L1 excludes zero.{_caveats(flags, estimator)}"
    )


def _beats_line(power: ModelScore, top_slope: float) -> bool:
    bends = power.exponent < 1 - MIN_EXPONENT_GAP or min(power.exponent, top_slope) > 1 + MIN_EXPONENT_GAP
    return bends and power.gain_interval[0] > 0 and power.gain > MIN_GAIN


def _beats_all(gap: LossGap) -> bool:
    score = gap.score
    wins = min(score.skill_interval[0], score.gain_interval[0]) > 0 and min(score.skill, score.gain) > MIN_GAIN
    ahead = score.later_loss < (1 - MIN_GAIN) * gap.best_curve
    adds = gap.beyond > MIN_GAIN and gap.beyond_interval[0] > 0
    return wins and ahead and gap.time is None and not adds


def _scan(gap: LossGap) -> str:
    columns = zip(*((score.floor, score.exponent, score.skill) for score in gap.floors), strict=True)
    (low, high), (least, most), (worst, best) = [(min(column), max(column)) for column in columns]
    return (
        f"With the smallest loss anywhere from {low:.3g} to {high:.3g} the exponent is {least:g} to {most:g}, and the "
        f"share {worst:.0%} to {best:.0%}."
    )


def _caveats(flags: tuple[Flag, ...], estimator: str) -> str:
    said = ""
    if estimator.startswith(("local", "path")):
        said += (
            " The law holds along the probed direction; a largest curvature that does not depend on the gradient norm "
            "can give it where the direction of the gradient turns."
        )
    if any(flag.name == "saturation unknown" for flag in flags):
        said += " Whether the step length set the ratio was not checked, for want of a saturation."
    return said


def _ratio(upper: float | Array, lower: float | Array) -> float:
    return float(upper / lower) if lower > 0 else float("inf")
