"""How many rows, how wide a range and how little noise a line needs to show; from formulas, without simulation."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from smoothdiag.fits.parts import Array

MIN_SKILL = 0.2  # The verdict asks that a line removes as much of a constant's loss on later steps.
# What the plan asks for: at .21 the formulas miss, and as many rows as they said gave the verdict 4 to 7 times in 10.
ENOUGH_SKILL = 0.25
EXPONENT_REACH = 0.25  # Exponents half a unit apart are told apart if the interval reaches this far to either side.
MIN_DECADES = 1.0  # The flag "range" asks for as much.
NUM_NOISE = 101  # Points of the normal distribution that stand for the noise.
IN_TAIL, FEWEST = 4.0, 20.0  # The flag "few points" asks for as many independent rows beyond the line and in all.
# A fit estimates how many rows are independent, and the estimate scatters: of ten fits of 120 independent rows, one
# counts 76 or fewer. So the plan asks for more than the flag.
MARGIN = 1.5
# In nine of ten repetitions an estimate is above its value less ERRORS_BELOW standard errors, and a 90% interval
# excludes zero if the value is ERRORS_AWAY standard errors.
ERRORS_BELOW = NormalDist().inv_cdf(0.9)
ERRORS_AWAY = NormalDist().inv_cdf(0.95) + ERRORS_BELOW
# Two thirds of the rows are scored, by lines that are fitted to the earlier ones, to 7/12 of all on average.
ALL_OVER_SCORED, ALL_OVER_FITTED = 3 / 2, 12 / 7


class Law(NamedTuple):
    """A line with lognormal noise: the share `quantile` of the rows lies below L0 + L1 * gradient norm."""

    L0: float
    L1: float
    spread: float
    quantile: float

    def terms(self, norms: Array) -> tuple[Array, Array]:
        """The two terms of the line; equal at the median norm where the line does not rise, or goes through zero."""
        unit = float(np.median(norms))
        a, b = (self.L0, self.L1 * unit) if self.L0 > 0 and self.L1 > 0 else (1.0, 1.0)
        return np.full(len(norms), a), b * norms / unit


def rows_for_line(norms: Array, law: Law) -> float:
    """Independent rows with which a line gets its verdict in about nine of ten repetitions.

    Infinite if no number is certainly enough, NaN if the noise is unknown. The condition for a prediction leaves out
    that the fitted line errs, but for the share of the rows that it is fitted to.
    """
    slope_error = relative_errors(norms, law)[0]
    skill, deviation = skill_of_line(norms, law)
    if not math.isfinite(slope_error) or math.isnan(skill):
        return math.nan
    if skill < ENOUGH_SKILL:
        return math.inf
    scored = max((ERRORS_BELOW * deviation / (skill - MIN_SKILL)) ** 2, (ERRORS_AWAY * deviation / skill) ** 2)
    predicted = ALL_OVER_SCORED * ALL_OVER_FITTED * scored
    return max(fewest_rows(law), math.ceil((ERRORS_AWAY * slope_error) ** 2), math.ceil(predicted))


def rows_for_exponent(norms: Array, law: Law) -> float:
    """Independent rows with which the 90% interval of a free exponent reaches `EXPONENT_REACH` to either side."""
    error = relative_errors(norms, law)[1]
    if not math.isfinite(error):
        return math.nan
    return max(fewest_rows(law), math.ceil((error * NormalDist().inv_cdf(0.95) / EXPONENT_REACH) ** 2))


def skill_of_line(norms: Array, law: Law) -> tuple[float, float]:
    """Share of a constant's loss that the line removes with rows without end, and the deviation of it for one row."""
    if len(norms) < 3 or not law.spread > 0 or norms.min() == norms.max():
        return math.nan, math.nan
    level = NormalDist()
    noise = np.array([level.inv_cdf((k + 0.5) / NUM_NOISE) for k in range(NUM_NOISE)])
    height = sum(law.terms(norms))
    middle = height / math.exp(law.spread * level.inv_cdf(law.quantile))
    y = np.outer(middle, np.exp(law.spread * noise)).ravel()
    weights = np.repeat(1 / middle, NUM_NOISE)
    order = np.argsort(y)
    share = np.cumsum(weights[order])
    constant = y[order][np.searchsorted(share, law.quantile * share[-1])]
    losses = []
    for model in (np.repeat(height, NUM_NOISE), constant):
        residual = y - model
        losses.append(weights * np.maximum(law.quantile * residual, (law.quantile - 1) * residual))
    kept = float(losses[0].mean() / losses[1].mean())
    return 1 - kept, float(np.std(losses[0] - kept * losses[1]) / losses[1].mean())


def relative_errors(norms: Array, law: Law) -> tuple[float, float]:
    """Standard errors, from a single row, of L1 as a share of L1, and of the exponent of a constant plus a power.

    A fit of n independent rows has these over the square root of n.
    """
    if len(norms) < 3 or not law.spread > 0 or norms.min() == norms.max():
        return math.nan, math.nan
    constant, rising = law.terms(norms)
    height = constant + rising
    level = NormalDist()
    # Variance of a quantile of normal noise, in units of the variance of the noise.
    inflation = law.quantile * (1 - law.quantile) / level.pdf(level.inv_cdf(law.quantile)) ** 2
    by_slope = np.stack([constant / height, rising / height])
    by_exponent = np.concatenate([by_slope, [rising * np.log(norms / np.median(norms)) / height]])
    if not np.isfinite(by_exponent).all():
        return math.nan, math.nan
    errors = []
    for derivatives in (by_slope, by_exponent):
        information = derivatives @ derivatives.T / len(norms)
        if np.linalg.cond(information) > 1e12:
            errors.append(math.nan)
        else:
            errors.append(law.spread * math.sqrt(inflation * float(np.linalg.inv(information)[-1, -1])))
    return errors[0], errors[1]


def fewest_rows(law: Law) -> float:
    """Independent rows with which the flag "few points" is rare."""
    return math.ceil(MARGIN * max(FEWEST, IN_TAIL / min(law.quantile, 1 - law.quantile)) - 1e-9)


def over(norms: Array, decades: float) -> Array:
    """Gradient norms spread evenly, in logarithms, over this many decades around the recorded ones."""
    middle = math.log10(float(np.median(norms))) if len(norms) else 0.0
    half = decades / 0.95 / 2  # The range counts the middle 95%.
    return np.logspace(middle - half, middle + half, 101)


def decades_needed(norms: Array, law: Law) -> float:
    """Fewest decades, in tenths, over which the noise leaves the line visible; NaN if five are too few."""
    if not len(norms) or not law.spread > 0:
        return MIN_DECADES
    wide = (
        decades for decades in np.arange(10, 51) / 10 if skill_of_line(over(norms, decades), law)[0] >= ENOUGH_SKILL
    )
    return float(next(wide, math.nan))


def spread_allowed(norms: Array, law: Law) -> float:
    """Largest noise that leaves the line visible over these gradient norms; NaN if nothing would."""
    low, high = 0.01, 5.0
    if not skill_of_line(norms, law._replace(spread=low))[0] >= ENOUGH_SKILL:
        return math.nan
    for _ in range(12):
        middle = math.sqrt(low * high)
        visible = skill_of_line(norms, law._replace(spread=middle))[0] >= ENOUGH_SKILL
        low, high = (middle, high) if visible else (low, middle)
    return low
