"""The verdict of a scan: what flags, intervals and rivals say about these lines from this point."""

from __future__ import annotations

import math

import numpy as np

from smoothdiag.console import counted
from smoothdiag.fits import lossgap
from smoothdiag.fits.base import Array, Flag, Interval, Verdict
from smoothdiag.fits.scans.lines import Lines
from smoothdiag.fits.scans.rivals import Fitted
from smoothdiag.fits.verdict import CONSTANT_RISE, FLAT, MIN_EXPONENT_GAP, MIN_GAIN, MIN_SKILL, STRAIGHT

PRECISE = 0.05
"""Mean error of log smoothness on lines left out below which a law serves, whatever else explains the points, too."""

LEAST_DECADES = 0.3
"""Decades of gradient norms, a factor of two, from which a constant can be seen to be one."""

EXCUSED = (
    "distance",
    "within lines",
)  # They say that the gradient norm does not explain smoothness, as the loss gap does.


def decide(
    flags: tuple[Flag, ...],
    fitted: Fitted,
    bounds: Interval,
    rise: Interval,
    exponent: Interval,
    departure: float,
    rising: bool,
    where: str,
) -> tuple[Verdict, str]:
    """The verdict and its reason. The first rule that applies decides:

    1. The loss gap wins on lines left out, and the only blocking flags are those in `EXCUSED`: LOSS_GAP. It wins if it
       removes more than `MIN_GAIN` of the errors of constant, line, power and distance, with intervals above zero, if a
       further line in the gradient norm adds nothing, and if the line errs by more than `PRECISE`.
    2. A blocking flag: NOT_IDENTIFIED.
    3. The line does not rise for sure: CONSTANT if smoothness at most doubles at the upper end of the interval, for
       line and power, else NOT_IDENTIFIED. Over less than a decade, at most two to the power of the decades. For this
       rule alone `LEAST_DECADES` are enough, because no constants have to be told apart.
    4. The loss gap may explain smoothness better than the gradient norm does, by more than `MIN_GAIN` at the upper end
       of the interval, and the gradient norm errs by more than `PRECISE`: NOT_IDENTIFIED.
    5. The line (the power, if the interval of the exponent lies below 1 or above it by more than `MIN_EXPONENT_GAP`)
       hardly beats the constant on lines left out, or errs there by more than a factor of `CONSTANT_RISE` on average:
       NOT_IDENTIFIED. At equal gradient norm smoothness then differs as much as it may where it counts as constant.
    6. The interval of the exponent excludes 1 as in rule 5, and the power leaves a smaller error than the line: POWER.
    7. The interval of the exponent contains 1 and lies within `STRAIGHT`, and the line errs by a factor of at most the
       root of `CONSTANT_RISE` if the power is the truth (as far as a constant may err): L0L1.
    8. Otherwise: NOT_IDENTIFIED.

    Args:
        flags: from `check`.
        fitted: from `fit_all`.
        bounds: 2.5% and 97.5% quantiles of the gradient norm.
        rise: interval of the factor by which smoothness rises between them.
        exponent: interval of the exponent of the power.
        departure: upper end of the interval of `departures`.
        rising: whether the interval of L1 excludes zero and the line rises by more than `FLAT`.
        where: which points these are, in a sentence.
    """  # noqa: D415 (the rules are the docstring)
    scores = {score.name: score for score in fitted.scores}
    gap = scores.get(lossgap.NAME)
    grows = (
        f"smoothness rises along these lines, by a factor of {rise[0]:.3g} to {rise[1]:.3g} while the gradient norm "
        f"grows by {bounds[1] / bounds[0]:.3g}, with an exponent between {exponent[0]:.2f} and {exponent[1]:.2f}"
    )
    if not any(flag.blocking and flag.name not in EXCUSED for flag in flags) and _gap_wins(fitted):
        assert gap is not None
        return Verdict.LOSS_GAP, (
            f"on lines left out, a model of the distance of the loss from its minimum removes {gap.skill:.0%} of a "
            f"constant's error and {gap.gain:.0%} of the line's (interval {gap.gain_interval[0]:.0%} to "
            f"{gap.gain_interval[1]:.0%}). Of the error that remains, the gradient norm removes "
            f"{max(fitted.beyond[0], 0.0):.0%}. {where}"
        )
    decades = math.log10(bounds[1] / bounds[0])
    flat = not rising and decades >= LEAST_DECADES and rise[1] <= CONSTANT_RISE ** min(decades, 1.0)
    for flag in flags:
        if flag.blocking and not (flag.name == "range" and flat):
            also = f" What can be said: {grows}." if rising else ""
            return Verdict.NOT_IDENTIFIED, f"{flag.cause} ({flag.evidence}).{also} {where}"
    if not rising:
        if flat:
            return Verdict.CONSTANT, (
                f"while the gradient norm grows by a factor of {bounds[1] / bounds[0]:.3g}, smoothness rises by a "
                f"factor of {rise[1]:.3g} at most within its interval. {where}"
            )
        return Verdict.NOT_IDENTIFIED, (
            f"while the gradient norm grows by a factor of {bounds[1] / bounds[0]:.3g}, smoothness may rise by a "
            f"factor anywhere from {rise[0]:.3g} to {rise[1]:.3g}. {where}"
        )
    low, high = exponent
    bent = high < 1 - MIN_EXPONENT_GAP or low > 1 + MIN_EXPONENT_GAP
    straight = STRAIGHT[0] <= low <= 1 <= high <= STRAIGHT[1] and departure <= CONSTANT_RISE**0.5
    name = "power" if bent else "affine"
    best = scores[name]
    if name in fitted.gap_over and fitted.gap_over[name][1][1] > MIN_GAIN and best.later_loss > PRECISE:
        gain, ends = fitted.gap_over[name]
        return Verdict.NOT_IDENTIFIED, (
            "these points do not tell the gradient norm from the loss. On lines left out, a model of the distance of "
            f"the loss from its minimum removes {gain:.0%} of the error that the gradient norm leaves (interval "
            f"{ends[0]:.0%} to {ends[1]:.0%}; should not reach {MIN_GAIN:.0%}). What can be said: {grows}. {where}"
        )
    share, ends = best.skill, best.skill_interval
    shares = f"{share:.0%} of a constant's error (interval {ends[0]:.0%} to {ends[1]:.0%})"
    if not (share > MIN_SKILL and ends[0] > 0):
        return Verdict.NOT_IDENTIFIED, (
            f"on lines left out, the gradient norm hardly predicts smoothness: it removes {shares}; should be above "
            f"{MIN_SKILL:.0%}, with an interval above zero. What can be said: {grows}. {where}"
        )
    if best.later_loss > math.log(CONSTANT_RISE):
        return Verdict.NOT_IDENTIFIED, (
            "on lines left out, smoothness at equal gradient norm differs from the best law by a factor of "
            f"{math.exp(best.later_loss):.3g} on average; should be at most {CONSTANT_RISE:g}. What can be said: "
            f"{grows}. {where}"
        )
    if bent and best.gain > 0:
        return Verdict.POWER, (
            f"the interval of the exponent, {low:.2f} to {high:.2f}, excludes the line. On lines left out the power "
            f"removes {shares} and {best.gain:.0%} of the line's error. {where}"
        )
    if straight:
        return Verdict.L0L1, (
            f"on lines left out, the line removes {shares} and {fitted.over_distance[0]:.0%} of what the distance from "
            f"the starting point leaves. A free exponent lies between {low:.2f} and {high:.2f}, and with any of these "
            f"the line errs by a factor of {departure:.2f} at most. {where}"
        )
    return Verdict.NOT_IDENTIFIED, (
        f"{grows}. This leaves open whether a line or another power is the law; the line may err by a factor of "
        f"{departure:.2f} between the smallest and the largest gradient norms. {where}"
    )


def _gap_wins(fitted: Fitted) -> bool:
    scores = {score.name: score for score in fitted.scores}
    gap = scores.get(lossgap.NAME)
    if gap is None or math.isnan(gap.skill) or scores["affine"].later_loss <= PRECISE:
        return False
    ahead = [(gap.skill, gap.skill_interval), *fitted.gap_over.values()]
    wins = all(share > MIN_GAIN and ends[0] > 0 for share, ends in ahead)
    rivals = [score.later_loss for name, score in scores.items() if name not in ("constant", lossgap.NAME)]
    adds = fitted.beyond[0] > MIN_GAIN and fitted.beyond[1][0] > 0
    return wins and gap.later_loss < (1 - MIN_GAIN) * min(rivals) and not adds


def departures(fitted: Fitted, bounds: Interval) -> Array:
    """Factor by which the line errs in each resample, were its power the truth and the line at the best height.

    The range is that of all points, also where the resample has none: if only one or two lines go to one end of it,
    they alone decide the law there.
    """
    at = np.geomspace(*bounds, 30)
    heights = []
    for grid, found in ((fitted.line, fitted.line_again), (fitted.power, fitted.power_again)):
        intercept, coefficient, exponent = (part[:, None] for part in grid.constants(found))
        heights.append(np.log(intercept + coefficient * at**exponent))
    return np.asarray(np.exp(np.ptp(heights[1] - heights[0], axis=1) / 2))


def rises(fitted: Fitted, slopes: Interval, bounds: Interval) -> bool:
    """Whether the interval of the slope excludes zero and the line rises by more than `FLAT` over the points."""
    return slopes[0] > 0 and float(fitted.line.rise(fitted.line_at, *bounds)[0]) >= FLAT


def farthest(lines: Lines) -> str:
    """The sentence that says what the verdict is about."""
    last = int(np.argmax(lines.distance))
    distance, relative = float(lines.distance[last]), float(lines.relative[last])
    losses = float(np.min(lines.rows.loss)), float(np.max(lines.rows.loss))
    share = f", {relative:.2g} times the norm of the parameters" if not math.isnan(relative) else ""
    loss = "" if np.isnan(losses).any() else f", and where the loss is {losses[0]:.3g} to {losses[1]:.3g}"
    return (
        f"This is about {counted(lines.num_lines, 'line')} out of one point, up to a distance of {distance:.3g}{share}"
        f"{loss}; it says nothing about other points."
    )
