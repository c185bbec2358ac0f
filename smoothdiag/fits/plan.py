"""What to measure next, in numbers: rows, decades, gradients and minutes that a fit lacks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from smoothdiag.fits.parts import Array, Flag, Verdict
from smoothdiag.fits.text import number, wrap

if TYPE_CHECKING:
    from collections.abc import Iterator

EXPONENT_REACH = 0.25  # Exponents half a unit apart are told apart if the interval reaches this far to either side.
MIN_DECADES = 1.0  # The flag "range" asks for as much.
WIDER_DECADES = 1.5  # Range for which the plan states the number of rows where the recorded range is too short.
IN_TAIL, FEWEST = 4.0, 20.0  # The flag "few points" asks for as many independent rows beyond the line and in all.
SCAN_GRADIENTS = 500  # Default budget of `sd.scan`.
# A 90% interval excludes zero in nine of ten repetitions if the value is this many standard errors away from it.
ERRORS_AWAY = NormalDist().inv_cdf(0.95) + NormalDist().inv_cdf(0.9)
OF_TIME = ("learning rate", "surrogates", "tied to time", "time trend")


@dataclass(frozen=True)
class Plan:
    """What a fit lacks, and what it costs to measure it. Print it to read it.

    Attributes:
        verdict: name of the verdict of the fit.
        missing: what is missing: "rows", "decades" of gradient norms, "relation" where there are rows enough and the
            gradient norm explains too little, "directions" where the rows bound one direction only, "remedy" where a
            flag names something else to change; empty if nothing is.
        rows_now: independent rows in the fit.
        rows: independent rows with which the interval of L1 excludes zero in nine of ten repetitions, if the line is
            as steep as it looks; at least what the flag "few points" asks for. NaN if more rows do not help.
        rows_for_exponent: independent rows with which the 90% interval of a free exponent reaches .25 to either side,
            so that exponents of .5, 1 and 1.5 can be told apart. NaN if more rows do not help.
        decades: powers of ten that the gradient norms cover now.
        decades_needed: powers of ten that they should cover.
        spread: standard deviation of log smoothness around the line, the noise.
        exponent_error: standard error of a free exponent with the rows of this fit.
        gradients: gradients that the further rows cost; NaN if unknown.
        minutes: minutes that they take; NaN if unknown.
        scan_minutes: minutes that a scan of `SCAN_GRADIENTS` gradients takes; NaN if unknown.
        advice: what to do, one sentence or two for each thing that is missing.

    Source: standard errors of a quantile curve, Koenker and Bassett, 1978, for noise that is the same in the
        logarithms of all rows; benchmarks/plan.py compares them with simulated fits.
    """

    verdict: str
    missing: tuple[str, ...]
    rows_now: float
    rows: float
    rows_for_exponent: float
    decades: float
    decades_needed: float
    spread: float
    exponent_error: float
    gradients: float
    minutes: float
    scan_minutes: float
    advice: tuple[str, ...]

    def __str__(self) -> str:
        head = f"PLAN after {self.verdict}"
        if not self.missing:
            return "\n".join(wrap(head, " ".join(self.advice)))
        numbers = (
            f"{self.rows_now:.0f} independent rows, {self.decades:.2f} decades of gradient norms, noise "
            f"{number(self.spread)} in log smoothness, standard error of a free exponent {number(self.exponent_error)}"
        )
        lines = [*wrap(head, f"missing: {', '.join(self.missing)}"), *wrap("now", numbers)]
        for place, sentence in enumerate(self.advice, 1):
            lines += wrap(str(place), sentence)
        return "\n".join(lines)


def make_plan(fit: Any) -> Plan:
    """The plan for a SmoothnessFit (this module stands below that class)."""
    norms = np.array(fit.grad_norm_quantiles)
    norms = norms[(norms > 0) & np.isfinite(norms)]
    slope_error, exponent_error = relative_errors(norms, fit.L0, fit.L1, fit.spread, fit.quantile)
    floor = max(FEWEST, math.ceil(IN_TAIL / min(fit.quantile, 1 - fit.quantile) - 1e-9))
    rows = max(floor, math.ceil((ERRORS_AWAY * slope_error) ** 2)) if math.isfinite(slope_error) else math.nan
    reach = EXPONENT_REACH / NormalDist().inv_cdf(0.95)
    for_exponent = max(floor, math.ceil((exponent_error / reach) ** 2)) if math.isfinite(exponent_error) else math.nan
    missing = tuple(_missing(fit, rows))
    help_rows = "rows" in missing and not {"decades", "remedy"} & set(missing)
    per_row, seconds = fit.row_cost
    more = max(rows - fit.num_effective, 0.0) * fit.num_points / max(fit.num_effective, 1.0) if help_rows else math.nan
    plan = Plan(
        verdict=fit.verdict.name,
        missing=missing,
        rows_now=fit.num_effective,
        rows=rows if help_rows else math.nan,
        rows_for_exponent=for_exponent if not {"decades", "remedy"} & set(missing) else math.nan,
        decades=fit.decades,
        decades_needed=max(MIN_DECADES, fit.decades),
        spread=fit.spread,
        exponent_error=exponent_error / math.sqrt(max(fit.num_effective, 1.0)),
        gradients=more * per_row,
        minutes=more * seconds / 60,
        scan_minutes=SCAN_GRADIENTS * seconds / per_row / 60 if per_row > 0 else math.nan,
        advice=(),
    )
    wider = _spread_over(norms, WIDER_DECADES)
    there = (ERRORS_AWAY * relative_errors(wider, fit.L0, fit.L1, fit.spread, fit.quantile)[0]) ** 2
    advice = tuple(_advice(fit, plan, more, max(floor, there) if math.isfinite(there) else math.nan))
    return Plan(**{**vars(plan), "advice": advice})


def relative_errors(norms: Array, L0: float, L1: float, spread: float, quantile: float) -> tuple[float, float]:
    """Standard errors, from a single row, of L1 as a share of L1, and of the exponent of a constant plus a power.

    A fit of n independent rows has these over the square root of n. Without a line that rises, or with one through
    zero, the errors are those of a line whose two terms are equal at the median gradient norm.

    Args:
        norms: gradient norms, or quantiles of them.
        L0: intercept of the line.
        L1: slope of the line.
        spread: standard deviation of log smoothness around the line, taken as normal.
        quantile: level of the line.
    """
    if len(norms) < 3 or not spread > 0 or norms.min() == norms.max():
        return math.nan, math.nan
    x = norms / np.median(norms)
    a, b = (L0, L1 * float(np.median(norms))) if L0 > 0 and L1 > 0 else (1.0, 1.0)
    height = a + b * x
    level = NormalDist()
    # Variance of a quantile of normal noise, in units of the variance of the noise.
    inflation = quantile * (1 - quantile) / level.pdf(level.inv_cdf(quantile)) ** 2
    by_slope = np.stack([1 / height, b * x / height])
    by_exponent = np.concatenate([by_slope, [b * x * np.log(x) / height]])
    errors = []
    for derivatives in (by_slope, by_exponent):
        information = derivatives @ derivatives.T / len(x)
        if np.linalg.cond(information) > 1e12:
            errors.append(math.nan)
        else:
            errors.append(spread * math.sqrt(inflation * float(np.linalg.inv(information)[-1, -1])))
    return errors[0], errors[1]


def _spread_over(norms: Array, decades: float) -> Array:
    """Gradient norms spread evenly, in logarithms, over this many decades around the recorded ones."""
    middle = math.log10(float(np.median(norms))) if len(norms) else 0.0
    half = decades / 0.95 / 2  # The range counts the middle 95%.
    return np.logspace(middle - half, middle + half, 101)


def _blocking(fit: Any) -> list[Flag]:
    return [flag for flag in fit.flags if flag.fatal or flag.blocking]


def _missing(fit: Any, rows: float) -> Iterator[str]:
    if fit.verdict in (Verdict.NOT_IDENTIFIED, Verdict.ARTEFACT):
        names = {flag.name for flag in _blocking(fit)}
        if "range" in names:
            yield "decades"
        if "few points" in names:
            yield "rows"
        if names - {"range", "few points"}:
            yield "remedy"
        if not names:
            yield "relation" if rows <= fit.num_effective else "rows"
    elif fit.estimator.startswith(("local", "path")) and (fit.hessian is None or fit.hessian.agrees is None):
        yield "directions"


def _advice(fit: Any, plan: Plan, more: float, rows_there: float) -> Iterator[str]:
    scan = f"`sd.scan(model, loss_fn, batches)` at this checkpoint takes about {SCAN_GRADIENTS} gradients" + (
        f", here {_time(plan.scan_minutes)}" if math.isfinite(plan.scan_minutes) else ""
    )
    if not plan.missing:
        yield "nothing is missing for this verdict."
    for flag in _blocking(fit) if "remedy" in plan.missing else ():
        if flag.name in ("range", "few points"):
            continue
        yield f"Flag {flag.name}: {flag.remedy}. More rows of the same kind do not help."
    if any(flag.name in OF_TIME for flag in _blocking(fit)):
        yield f"A scan compares points around one checkpoint, so neither time nor rate can be the cause. {scan}."
    elif "decades" in plan.missing:
        yield (
            f"The gradient norms cover {plan.decades:.2f} decades and should cover at least {plan.decades_needed:g}. "
            f"More rows of the same run do not help. {scan}, and moves away from it until the norms have changed."
        )
    if "decades" in plan.missing:
        yield (
            "In a further run, record the warm-up from the first step, where gradient norms change most, on batches "
            'that stay the same (`data="fixed"`). Other learning rates alone do not help: the rate then moves both '
            "gradient norms and smoothness."
        )
        if math.isfinite(rows_there):
            yield (
                f"Over {WIDER_DECADES:g} decades and with the noise of these rows, L1 would take about "
                f"{rows_there:.0f} independent rows."
            )
    if math.isfinite(more) and more > 0:
        cost = ""
        if math.isfinite(plan.gradients):
            cost = f", about {plan.gradients:.0f} gradients"
        if math.isfinite(plan.minutes):
            cost += f" and {_time(plan.minutes)}"
        yield (
            f"Record {more:.0f} more rows like these{cost}: {plan.rows:.0f} independent ones tell L1 from zero in nine "
            f"of ten repetitions, if the line is as steep as it looks."
        )
    if "relation" in plan.missing:
        yield (
            f"The rows would be enough for a line as steep as this one, but the gradient norm explains too little of "
            f"their smoothness. `fit.comparison_frame()` shows whether another model does. {scan}."
        )
    if "directions" in plan.missing:
        yield (
            f"The rows bound smoothness along one direction. Record `sd.HessianNorm()` beside them, or scan: {scan}, "
            "and measures the Hessian norm."
        )
    if math.isfinite(plan.rows_for_exponent) and plan.rows_for_exponent > plan.rows_now and plan.missing:
        yield (
            f"To tell exponents of .5, 1 and 1.5 apart takes about {plan.rows_for_exponent:.0f} independent rows over "
            "this range."
        )


def _time(minutes: float) -> str:
    return f"{minutes:.0f} minutes" if minutes >= 2 else f"{60 * minutes:.0f} seconds"
