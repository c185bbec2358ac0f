"""The summary of a fit, a table to read. This module stands below SmoothnessFit."""

from __future__ import annotations

import math
from typing import Any

from smoothdiag.fits.parts import Interval
from smoothdiag.fits.plan import headline
from smoothdiag.fits.text import RULE, RUN, SCAN, THIN, cost, fixed, free_exponent, hessian_cost, interval, number, wrap
from smoothdiag.fits.wording import GLOSSARY
from smoothdiag.rows import printable

_LINES = {"hard": "hard envelope", "mean": "mean"}


def summarise(fit: Any) -> str:
    """A SmoothnessFit as a text: verdict and next step in two lines, then reason, flags, constants, rows and rivals."""
    level, words = f"{fit.interval_level:.0%} interval", SCAN if fit.num_scans else RUN
    single = "; the intervals say nothing about other seeds" * (fit.num_runs == 1)
    saturated = "; above 0.5 the step length sets the smoothness"
    out = [*headline(fit), RULE, *wrap("reason", fit.verdict_reason)]
    for flag in fit.flags:
        weight = " (fatal)" if flag.fatal else " (blocks the verdict)" if flag.blocking else ""
        said = f"{flag.cause} ({flag.evidence})."
        out += wrap(f"flag {flag.name}{weight}", "see the reason." if said == fit.verdict_reason else said)
        out += wrap("    remedy", f"{flag.remedy}.")
    if not fit.flags:
        out.append("no flags")
    out += [
        THIN,
        f"smoothness <= L0 + L1 * gradient norm, for a share of {fit.quantile:g} of the rows",
        f"rows of estimator {fit.estimator}, group {fit.group}, data {fit.data}",
        THIN,
        f"{'':4}{'estimate':>12}{level:>26}   {'unit':<21}{'inverse':>30}",
        _constant("L0", fit.L0, fit.L0_interval, "loss / parameter^2", f"max_lr = 1/L0 = {number(fit.max_lr)}"),
        _constant("L1", fit.L1, fit.L1_interval, "1 / parameter", f"step_cap = 1/L1 = {number(fit.step_cap)}"),
        THIN,
        f"rows in the fit       {fit.num_points}, as informative as {fit.num_effective:.0f} independent rows",
        f"bootstrap blocks      {fit.block_length:.1f} {words.resampled}",
        *([] if fit.num_scans else [f"runs                  {fit.num_runs}{single}"]),
        f"rows dropped          {_counts(fit.dropped)}",
        f"gradient norms        {number(fit.grad_norm_quantiles[0])} to {number(fit.grad_norm_quantiles[-1])}, "
        f"{fit.decades:.2f} decades (powers of ten) in the middle 95%",
        f"rank correlation      {number(fit.spearman)} of gradient norm and smoothness; "
        f"{number(fit.partial_spearman)} with {words.confounder} taken out",
        f"log-log slope         {number(fit.loglog_slope)}; it would be {number(fit.implied_slope)} if all rows lay on "
        "the line",
        f"exponent              {free_exponent(fit.exponent_interval, fit.interval_level)}",
        *_hessian(fit),
        f"cost of a row         {cost(fit.row_cost)}",
        f"coverage              {fit.coverage:.3f} of the rows lie at or below the line",
        f"errors in the norms   {_errors(fit)}",
        *([] if fit.num_scans else [f"median saturation     {number(fit.median_saturation)}{saturated}"]),
        THIN,
        f"{'other lines':22}{'L0':>12}{'L1':>12}",
        *(
            f"  {_LINES.get(key, f'quantile {key}'):20}{number(a):>12}{number(b):>12}"
            for key, (a, b) in fit.lines.items()
        ),
        THIN,
        f"{'model':12}{'exponent':>10}{'loss':>10}{'later loss':>12}{'skill':>10}{level:>24}",
    ]
    out += [
        f"{score.name:12}{fixed(score.exponent or math.nan, 2):>10}{fixed(score.loss, 4):>10}"
        f"{fixed(score.later_loss, 4):>12}{fixed(score.skill, 2):>10}"
        f"{interval(score.skill_interval, '.2f') if place else 'reference':>24}"
        for place, score in enumerate(fit.comparison)
    ]
    out += [
        "  affine: the line; isotonic: any function that never falls; loss: error on the fitted rows",
        f"  later loss: error on {words.unseen}; skill: share of the constant's later loss that is removed",
        THIN,
    ]
    out += [*wrap("next", "in Python, print(fit.plan()) says what to measure, in numbers"), GLOSSARY]
    return "\n".join(map(printable, [*out, RULE]))


def _hessian(fit: Any) -> list[str]:
    """What the Hessian norms say or, if there are none, what measuring them would cost."""
    found, head = fit.hessian, "Hessian norms         "
    if found is not None:
        said = {True: "follow the line", False: "contradict the line", None: "cannot decide"}[found.agrees]
        below = f"{found.coverage:.0%} of them lie at or below the line, should be {fit.quantile:.0%}"
        return [f"{head}{found.num_rows} beside the rows; {below}; they {said}"]
    if not fit.estimator.startswith(("local", "path")):
        return []
    return [f"{head}none beside; to test the law on ||H||, add", f"{'':22}{hessian_cost(fit.row_cost)}"]


def _errors(fit: Any) -> str:
    """The corrected constants or, if there are none, the direction in which errors would move the plain ones."""
    if fit.corrected is not None:
        return (
            f"L0 {number(fit.corrected.L0)}, L1 {number(fit.corrected.L1)} after correcting errors of up to "
            f"{fit.corrected.deviation:.0%}"
        )
    return (
        "not corrected (unknown, negligible or too large); errors make L1 too "
        f"{'large' if fit.quantile > 0.75 else 'small'}"
    )


def _constant(name: str, value: float, ends: Interval, unit: str, inverse: str) -> str:
    return f"{name:4}{number(value):>12}{interval(ends):>26}   {unit:<21}{inverse:>30}"


def _counts(dropped: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in dropped.items()) or "none"
