"""What to measure next, in numbers: rows, decades, gradients and minutes that a fit lacks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from smoothdiag.fits.decision import (
    FOR_THE_LAW,
    OF_TIME,
    OPEN,
    Decision,
    Do,
    blocking,
    follows_gradients,
    is_of_autoclip,
    next_of,
)
from smoothdiag.fits.needed import (
    MIN_DECADES,
    Law,
    decades_needed,
    over,
    relative_errors,
    rows_for_exponent,
    rows_for_line,
    spread_allowed,
)
from smoothdiag.fits.parts import Verdict
from smoothdiag.fits.text import minutes, number, wrap
from smoothdiag.fits.wording import FURTHER, SCAN_GRADIENTS, Headline, next_step, verdict_of
from smoothdiag.notebooks import as_html

if TYPE_CHECKING:
    from collections.abc import Iterator

LARGEST_EXPONENT = 3.0  # That the fit of a scan tries.
ENOUGH = 0.6  # Width of the interval of an exponent that is told from .5 and 1.5.
WIDER_DECADES = 1.5  # Range for which the plan states the number of rows where the recorded range is too short.
MISSING = {
    "rows": "more independent rows",
    "decades": "a wider range of gradient norms",
    "noise": "rows with less noise",
    "relation": "a gradient norm that explains more",
    "directions": "other directions than the measured one",
    "remedy": "another way to measure",
    "lines": "more lines of the scan",
}
"""What each word of `Plan.missing` means."""


@dataclass(frozen=True)
class Plan:
    """What a fit lacks, and what it costs to measure it. Print it to read it.

    Attributes:
        verdict: name of the verdict of the fit.
        missing: what is missing: "rows"; "decades" of gradient norms; "noise" where so much of it hides a line however
            many rows there are; "relation" where there are rows enough and the gradient norm explains too little;
            "directions" where the rows bound one direction only; "remedy" where a flag names something else to change;
            "lines" where a scan has too few of them to tell exponents apart; empty if nothing is.
        rows_now: independent rows in the fit.
        rows: independent rows that a line as steep as this one needs for a verdict, in about nine of ten repetitions.
            Its L1 has to differ from zero and it has to predict later smoothness; the flag "few points" asks for a
            smallest number, too. NaN if more rows do not help.
        rows_for_exponent: independent rows with which the 90% interval of a free exponent reaches .25 to either side,
            so that exponents of .5, 1 and 1.5 can be told apart. NaN if more rows do not help.
        decades: powers of ten that the gradient norms cover now.
        decades_needed: powers of ten that they should cover: one, or more where the noise is large.
        spread: standard deviation of log smoothness around the line, the noise.
        spread_allowed: largest noise with which a line as steep as this one shows over the recorded range.
        exponent_error: standard error of a free exponent with the rows of this fit.
        gradients: gradients that the further rows, or a scan with enough lines, cost; NaN if unknown.
        minutes: minutes that they take; NaN if unknown.
        scan_minutes: minutes that a scan of `SCAN_GRADIENTS` gradients takes; NaN if unknown.
        decision: the kind of what to do first, with its numbers.
        next: what to do first, one sentence.
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
    spread_allowed: float
    exponent_error: float
    gradients: float
    minutes: float
    scan_minutes: float
    decision: Decision
    next: str
    advice: tuple[str, ...]

    def __str__(self) -> str:
        said = "nothing is missing for this verdict."
        if self.missing:
            said = f"missing: {', '.join(MISSING[name] for name in self.missing)}."
        lines = [f"PLAN after {self.verdict}: {said}", f"NEXT: {self.next}"]
        if not self.missing:
            return "\n".join(lines)
        numbers = (
            f"{self.rows_now:.0f} independent rows, {self.decades:.2f} decades of gradient norms, noise "
            f"{number(self.spread)} in log smoothness, standard error of a free exponent {number(self.exponent_error)}"
        )
        for place, sentence in enumerate(self.advice, 1):
            lines += wrap(str(place), sentence)
        return "\n".join([*lines, *wrap("now", numbers)])

    def _repr_html_(self) -> str:
        return as_html(str(self))


@np.errstate(all="ignore")  # beyond the range of numbers a plan says so in words
def make_plan(fit: Any) -> Plan:
    """The plan for a SmoothnessFit (this module stands below that class)."""
    norms = np.array(fit.grad_norm_quantiles)
    norms = norms[(norms > 0) & np.isfinite(norms)]
    law = Law(fit.L0, fit.L1, fit.spread, fit.quantile)
    rows = rows_for_line(norms, law)
    missing = tuple(_missing(fit, rows))
    no_help = fit.num_scans > 0 or {"decades", "remedy", "noise", "relation"} & set(missing)
    help_rows = "rows" in missing and not no_help
    per_row, seconds = fit.row_cost
    more = max(rows - fit.num_effective, 0.0) * fit.num_points / max(fit.num_effective, 1.0) if help_rows else math.nan
    plan = Plan(
        verdict=fit.verdict.name,
        missing=missing,
        rows_now=fit.num_effective,
        rows=rows if help_rows else math.nan,
        rows_for_exponent=math.nan if no_help else rows_for_exponent(norms, law),
        decades=fit.decades,
        decades_needed=decades_needed(norms, law),
        spread=fit.spread,
        spread_allowed=spread_allowed(norms, law),
        exponent_error=relative_errors(norms, law)[1] / math.sqrt(max(fit.num_effective, 1.0)),
        gradients=_lines_cost(fit) if "lines" in missing else more * per_row,
        minutes=_lines_cost(fit) * seconds / per_row / 60 if "lines" in missing else more * seconds / 60,
        scan_minutes=SCAN_GRADIENTS * seconds / per_row / 60 if per_row > 0 else math.nan,
        decision=Decision(Do.SCAN),
        next="",
        advice=(),
    )
    costs = {"more": more, "gradients": plan.gradients, "time": plan.minutes, "scan": plan.scan_minutes}
    decision = next_of(fit, missing, **costs)
    return replace(
        plan,
        decision=decision,
        next=next_step(fit, decision, is_confirmed="directions" not in missing),
        advice=tuple(_advice(fit, plan, more, rows_for_line(over(norms, WIDER_DECADES), law))),
    )


def headline(fit: Any) -> Headline:
    """The verdict of a fit and what to do next, a line each; `summary()` begins with them.

    Args:
        fit: a SmoothnessFit.
    """
    return Headline(verdict_of(fit), f"NEXT: {make_plan(fit).next}")


def _missing(fit: Any, rows: float) -> Iterator[str]:
    if fit.verdict in (Verdict.NOT_IDENTIFIED, Verdict.ARTEFACT):
        names = {flag.name for flag in blocking(fit)}
        if "range" in names:
            yield "decades"
        if fit.num_scans:
            yield from ["remedy"] if names - {"range"} else [] if names else ["lines"]
            return
        hopeless = rows == math.inf and names <= {"few points"}
        if "few points" in names and not hopeless:
            yield "rows"
        if names - {"range", "few points"}:
            yield "remedy"
        if hopeless:
            yield "noise"
        elif not names:
            yield "relation" if rows <= fit.num_effective else "rows"
    elif fit.estimator.startswith(("local", "path")) and (fit.hessian is None or fit.hessian.agrees is None):
        yield "directions"


def _lines_cost(fit: Any) -> float:
    """Gradients of a scan whose exponent would be known within `ENOUGH`; NaN if the interval says nothing yet.

    Standard errors fall with the root of the number of lines.
    """
    low, high = fit.exponent_interval
    known = high < LARGEST_EXPONENT  # False for NaN too
    return float(SCAN_GRADIENTS * max((high - low) / ENOUGH, 1.0) ** 2) if known else math.nan


def _advice(fit: Any, plan: Plan, more: float, rows_there: float) -> Iterator[str]:
    scanned = fit.num_scans > 0
    scan = f"`sd.scan(model, loss_fn, batches)` at {'another' if scanned else 'this'} checkpoint takes about " + (
        f"{SCAN_GRADIENTS} gradients"
        + (f", here {minutes(plan.scan_minutes)}" if math.isfinite(plan.scan_minutes) else "")
    )
    kind = "lines" if scanned else "kind" if "remedy" in plan.missing else "run"
    no_help = f"More rows of the same {kind} do not help."
    if any(flag.name == "few points" for flag in blocking(fit)):
        first = "follow this remedy first, and then record more" if kind == "kind" else "the range comes first"
        no_help = f"The rows are too few, too, but more rows of the same {kind} do not help: {first}."
    if not plan.missing:
        yield "nothing is missing for this verdict."
    elif not follows_gradients(fit):
        yield (
            f"L0 and L1 make no threshold under {fit.optimizer or 'this optimizer'}; AutoClip needs neither. What "
            "follows is for the law itself."
        )
    if is_of_autoclip(fit) and fit.verdict in OPEN:
        yield (
            "An AutoClip asked for these rows: they are few, and each is measured on the batch of its own step. For "
            f"the law, {FOR_THE_LAW}."
        )
        return
    for flag in blocking(fit) if "remedy" in plan.missing else ():
        if flag.name in ("range", "few points"):
            continue
        yield f"Flag {flag.name}: {flag.remedy}. {no_help}"
    if any(flag.name in OF_TIME for flag in blocking(fit)):
        yield f"A scan compares points around one checkpoint, so neither time nor rate can be the cause. {scan}."
    elif "decades" in plan.missing:
        further = f"{FURTHER[0].upper()}{FURTHER[1:]}. Otherwise " if scanned else ""
        yield (
            f"The gradient norms cover {plan.decades:.2f} decades and should cover at least {MIN_DECADES:g}. "
            f"{no_help} {further}{scan}, and moves away from it until the norms have changed."
        )
    if "decades" in plan.missing and not scanned:
        fixed = "" if fit.data == "fixed" else ' on batches that stay the same (`data="fixed"`, the default)'
        begin = (
            "measure the first steps more often (`schedule=sd.log_spaced()`)"
            if fit.first_step == 0  # advice to begin there would be idle
            else "record the warm-up from the first step"
        )
        yield (
            f"If you cannot scan, {begin} in a further run, where gradient norms change most{fixed}. "
            "Other learning rates alone do not help: the rate then moves both gradient norms and smoothness."
        )
    if "lines" in plan.missing:
        low, high = fit.exponent_interval
        narrower = (
            f"About {plan.gradients:.0f} gradients (`budget=`) would narrow it to a width of {ENOUGH:g}, if it shrinks "
            "with the root of the number of lines"
            if math.isfinite(plan.gradients)
            else "How many gradients narrow it is unknown, because it reaches the largest exponent tried"
        )
        yield (
            f"The exponent lies between {low:.2f} and {high:.2f}. {narrower}. Lines of other kinds help most: each "
            "checkpoint in `toward=` adds two, and `update=` one."
        )
    if "decades" in plan.missing and not scanned and not math.isnan(rows_there):
        yield f"With the noise of these rows, a line over {WIDER_DECADES:g} decades would take " + (
            "more than any number of rows: less noise is needed, too."
            if rows_there == math.inf
            else f"about {rows_there:.0f} independent rows."
        )
    if "noise" in plan.missing:
        yield (
            f"With a noise of {plan.spread:.2g} in log smoothness a line over {plan.decades:.2g} decades predicts "
            f"hardly better than a constant, and more rows do not change that. It takes {_or_more(plan)}. Rows on "
            f'fixed batches (`data="fixed"`) or larger ones have less noise. {scan}.'
        )
    if math.isfinite(more) and more > 0:
        cost = ""
        if math.isfinite(plan.gradients):
            cost = f", about {plan.gradients:.0f} gradients"
        if math.isfinite(plan.minutes):
            cost += f" and {minutes(plan.minutes)}"
        yield (
            f"Record {more:.0f} more rows like these{cost}. About {plan.rows:.0f} independent ones show a line in nine "
            "of ten repetitions, if it is as steep as it looks."
        )
    if "rows" in plan.missing and not math.isfinite(more) and "decades" not in plan.missing:
        yield "Record more rows. How many is unknown, because the noise of these is."
    if "relation" in plan.missing:
        yield (
            "There are rows enough for a line as steep as this one, but the gradient norm explains too little of their "
            f"smoothness. `fit.comparison_frame()` shows whether another model does. {scan}."
        )
    if "directions" in plan.missing:
        yield (
            f"The rows bound smoothness along one direction. Record `sd.HessianNorm()` beside them, or scan: {scan}, "
            "and measures the Hessian norm."
        )
    asks = fit.verdict in (Verdict.NOT_IDENTIFIED, Verdict.L0L1) and plan.missing
    if math.isfinite(plan.rows_for_exponent) and plan.rows_for_exponent > plan.rows_now and asks:
        yield (
            f"To tell exponents of .5, 1 and 1.5 apart takes about {plan.rows_for_exponent:.0f} independent rows over "
            "this range."
        )


def _or_more(plan: Plan) -> str:
    ways = []
    if math.isfinite(plan.decades_needed) and plan.decades_needed > plan.decades:
        ways.append(f"{plan.decades_needed:.1f} decades of gradient norms")
    if math.isfinite(plan.spread_allowed):
        ways.append(f"a noise of at most {plan.spread_allowed:.2f}")
    return " or ".join(ways) or "another experiment"
