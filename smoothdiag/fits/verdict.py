"""The verdict: what flags, interval and rival models say together, in one word and a reason."""

from __future__ import annotations

import math

import numpy as np

from smoothdiag.fits.affine import Line
from smoothdiag.fits.base import Array, Flag, HessianCheck, Interval, ModelScore, Verdict
from smoothdiag.fits.lossgap import LossGap
from smoothdiag.fits.models import EXPONENT_RANGE, EXPONENT_STEPS

FLAT = 1.25  # A line that rises by less than this factor over the data is a constant in practice.
CONSTANT_RISE = 2.0  # A constant is claimed if even the upper end of the interval at most doubles it.
MIN_EXPONENT_GAP = 0.15
STRAIGHT = (0.6, 1.5)  # Powers of a line that an interval may hold if the line is to be the law.
MIN_GAIN = 0.05
# For a true law with lognormal noise of deviation .8 over two decades, the line removes .44 of the constant's loss. In
# the valley of (1 - x y)^2 / 2, where curvature has no bound at a vanishing gradient, a line removes up to .16.
MIN_SKILL = 0.2
# These flags say that the gradient norm alone does not explain smoothness, and the loss gap claims just that.
EXCUSED = ("coverage", "time trend", "tied to time", "surrogates", "short lived")


def rises(line: Line, bounds: Interval) -> float:
    """Factor by which the line rises from the lower to the upper bound of the gradient norm."""
    return _ratio(line(np.array(bounds[1])), line(np.array(bounds[0])))


def has_slope(line: Line, L1_interval: Interval, bounds: Interval) -> bool:
    """Whether the interval of the slope excludes zero and the line rises by more than `FLAT` over the data."""
    return L1_interval[0] > 0 and rises(line, bounds) >= FLAT


def widest_rise(line: Line, L1_interval: Interval, bounds: Interval) -> float:
    """The largest rise that the interval of the slope allows, with the height of the line in the middle kept."""
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
    exponents: Interval,
    hessian: HessianCheck | None = None,
    estimator: str = "",
    L1_unit: float = 1.0,
    gap: LossGap | None = None,
) -> tuple[Verdict, str]:
    """The verdict and its reason. The first rule that applies decides:

    1. A fatal flag: ARTEFACT.
    2. The loss gap wins on later steps: LOSS_GAP, if the only blocking flags are those in `EXCUSED`. It wins if it
       beats the constant and the line by more than `MIN_GAIN`, and the intervals exclude zero; if its later loss is
       smaller by the same share than the later loss of the power and of any monotone function; if it is not a drift in
       time; and if a line in the gradient norm adds nothing to it.
    3. A blocking flag: NOT_IDENTIFIED. The flag "coverage" does not count if rule 5 holds, because a power explains
       why the line misses its coverage.
    4. The interval of the slope reaches zero, or the line rises over the data by less than a factor `FLAT`: CONSTANT if
       smoothness at most doubles even at the upper end of the interval, else NOT_IDENTIFIED.
    5. The power beats the line on later steps, the interval of its gain excludes zero, its exponent is not close to 1,
       and the interval of the exponent excludes 1: POWER. An exponent above 1 counts only if the rows rise faster than
       in proportion at large gradient norms, because a line still bounds a curve that bends from flat to proportional.
    6. The line does not beat the constant on later steps by `MIN_SKILL`, or the interval reaches zero: NOT_IDENTIFIED.
    7. The flag "leverage": NOT_IDENTIFIED, because constants that a few rows decide cannot be used.
    8. The interval of the exponent reaches the smallest exponent tried, or it excludes 1 (from above only if the rows
       rise faster than in proportion at large gradient norms): NOT_IDENTIFIED.
    9. Otherwise: L0L1.

    Args:
        flags: from `check`.
        line: the fitted line.
        L1_interval: interval of the slope.
        comparison: from `models.compare`.
        bounds: 2.5% and 97.5% quantiles of the gradient norm.
        top_slope: log-log slope of the rows in the upper half of the range.
        exponents: interval of the exponent of the power; NaN if it is not known.
        hessian: what Hessian norms beside the rows say; None without any.
        estimator: name of the estimator that measured the rows.
        L1_unit: a slope of one, in the units of the caller.
        gap: the loss gap on the rows that have a loss.
    """  # noqa: D415 (the rules are the docstring)
    for flag in flags:
        if flag.fatal:
            return Verdict.ARTEFACT, f"{flag.cause} ({flag.evidence})."
    scores = {score.name: score for score in comparison}
    blocked = any(flag.blocking and flag.name not in EXCUSED for flag in flags)
    if gap is not None and not blocked and _beats_all(gap):
        return Verdict.LOSS_GAP, (
            f"on later steps a model of the distance of the loss from its minimum removes {gap.score.skill:.0%} of a "
            f"constant's prediction error and {gap.score.gain:.0%} of the line's (interval "
            f"{gap.score.gain_interval[0]:.0%} to {gap.score.gain_interval[1]:.0%}). Of the error that remains, the "
            f"gradient norm removes {max(gap.beyond, 0.0):.0%}. {_scan(gap)}"
        )
    slope = has_slope(line, L1_interval, bounds)
    is_power = slope and _beats_line(scores["power"], top_slope) and _excludes_one(exponents, top_slope)
    for flag in flags:
        if flag.blocking and not (flag.name == "coverage" and is_power):
            return Verdict.NOT_IDENTIFIED, f"{flag.cause} ({flag.evidence})."
    if not slope:
        widest = widest_rise(line, L1_interval, bounds)
        if widest <= CONSTANT_RISE:
            return Verdict.CONSTANT, (
                f"while the gradient norm grows by a factor of {bounds[1] / bounds[0]:.3g}, the line rises by a factor "
                f"of {rises(line, bounds):.3g}, and by {widest:.3g} at most within the interval of L1."
            )
        return Verdict.NOT_IDENTIFIED, (
            f"the interval of L1 reaches from {L1_interval[0] * L1_unit:.3g} to {L1_interval[1] * L1_unit:.3g}. Within "
            "it smoothness may hardly grow with the gradient norm, or grow a lot."
        )
    ends = f"exponent {exponents[0]:.2f} to {exponents[1]:.2f}"
    if is_power:
        power = scores["power"]
        return Verdict.POWER, (
            f"on later steps a power of the gradient norm, exponent {power.exponent:.2f} ({ends}), removes "
            f"{power.gain:.0%} of the line's prediction error (interval {power.gain_interval[0]:.0%} to "
            f"{power.gain_interval[1]:.0%}).{_caveats(flags, hessian, estimator)}"
        )
    affine = scores["affine"]
    if math.isnan(affine.skill):
        return Verdict.NOT_IDENTIFIED, "there are too few rows to test the line on later steps."
    shares = f"{affine.skill_interval[0]:.0%} to {affine.skill_interval[1]:.0%}"
    if not (affine.skill_interval[0] > 0 and affine.skill > MIN_SKILL):
        return Verdict.NOT_IDENTIFIED, (
            "on later steps the line predicts smoothness hardly better than a constant, or not reliably so (it removes "
            f"{affine.skill:.0%} of the constant's prediction error, interval {shares}; should be above "
            f"{MIN_SKILL:.0%}, with an interval above zero)."
        )
    for flag in flags:
        if flag.name == "leverage":
            return Verdict.NOT_IDENTIFIED, f"{flag.cause} ({flag.evidence})."
    if not exponents[0] > EXPONENT_RANGE[0]:
        return Verdict.NOT_IDENTIFIED, (
            f"smoothness rises with the gradient norm, but how is not known ({ends}): the rows cannot tell a line from "
            "a curve that hardly rises at large gradient norms."
        )
    if _excludes_one(exponents, top_slope):
        return Verdict.NOT_IDENTIFIED, (
            f"smoothness rises with the gradient norm ({ends}), but not as a line does, and the power that fits the "
            "rows predicts later steps no better than the line."
        )
    bends = ", because the rows bend from flat to proportional, which a line bounds" if exponents[0] > 1 else ""
    return Verdict.L0L1, (
        f"on later steps the line removes {affine.skill:.0%} of a constant's prediction error (interval {shares}), and "
        f"the interval of L1 excludes zero. A free power of the gradient norm has an {ends}{bends}; the rows cannot "
        f"tell these exponents apart.{_caveats(flags, hessian, estimator)}"
    )


def _excludes_one(exponents: Interval, top_slope: float) -> bool:
    """Whether the interval excludes 1 by more than the steps between its exponents; False if it is not known."""
    low, high = exponents
    return high < 1 - EXPONENT_STEPS[1] or (low > 1 + EXPONENT_STEPS[1] and top_slope > 1 + MIN_EXPONENT_GAP)


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
        f"The minimum itself is unknown: with a smallest loss anywhere from {low:.3g} to {high:.3g}, the exponent is "
        f"{least:g} to {most:g}, and the share of the constant's error removed is {worst:.0%} to {best:.0%}."
    )


def _caveats(flags: tuple[Flag, ...], hessian: HessianCheck | None, estimator: str) -> str:
    said = ""
    if hessian is not None and hessian.agrees:
        said += f" {hessian.num_rows} Hessian norms beside the rows follow the same line."
    elif estimator.startswith(("local", "path")):
        said += (
            " This is a statement about the probed direction and not about ||H||: if that direction turns during the "
            "run, the rows can follow a law even if the largest curvature does not depend on the gradient norm."
        )
        if hessian is not None:
            said += (
                f" The {hessian.num_rows} Hessian norms beside them do not contradict it, but they are too few, cover "
                "too little of the gradient norms, or vary too much to confirm it."
            )
    if any(flag.name == "saturation unknown" for flag in flags):
        said += " Too few rows have a saturation, so it was not checked whether the step length set the smoothness."
    return said


def _ratio(upper: float | Array, lower: float | Array) -> float:
    return float(upper / lower) if lower > 0 else float("inf")
