"""The two lines that stand above everything else about a fit: the verdict, and what to do next, in plain words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from smoothdiag.console import counted
from smoothdiag.fits.parts import Flag, Verdict
from smoothdiag.fits.text import minutes, number

SCAN_GRADIENTS = 500  # Default budget of `sd.scan`.
OF_TIME = ("learning rate", "surrogates", "tied to time", "time trend")
GLOSSARY = "docs/glossary.md explains the terms of this summary"

_UNUSED = "do not use L0 and L1"


class Headline(NamedTuple):
    """The verdict of a fit and what to do next, a line each.

    Attributes:
        verdict: the verdict and what it means, one sentence.
        next: what to do next, one sentence.
    """

    verdict: str
    next: str

    def __str__(self) -> str:
        return "\n".join(self)


def verdict_of(fit: Any) -> str:
    """The verdict of a SmoothnessFit and what it means, in one line (this module stands below that class)."""
    rows = counted(fit.num_points, "row") if not fit.num_scans else counted(fit.num_points, "point") + " of a scan"
    do = "does" if fit.num_points == 1 else "do"
    said = {
        Verdict.L0L1: (
            f"smoothness grows with the gradient norm: L0 = {number(fit.L0)} and L1 = {number(fit.L1)} can be used."
        ),
        Verdict.CONSTANT: "smoothness hardly depends on the gradient norm; one constant bounds it.",
        Verdict.POWER: f"smoothness grows as {_power(fit)} of the gradient norm; {_UNUSED}.",
        Verdict.LOSS_GAP: f"smoothness follows the loss and not the gradient norm; {_UNUSED}.",
        Verdict.NOT_IDENTIFIED: f"{rows} {do} not determine L0 and L1; do not use them.",
        Verdict.ARTEFACT: f"the numbers show how they were measured, not the loss; {_UNUSED}.",
    }
    return f"VERDICT {fit.verdict.name}: {said[fit.verdict]}"


def next_step(fit: Any, missing: Sequence[str], *, more: float, gradients: float, time: float, scan: float) -> str:
    """What to do next, in one sentence.

    Args:
        fit: the SmoothnessFit.
        missing: what is missing, as in `Plan.missing`.
        more: rows to record; NaN if unknown.
        gradients: what they, or further lines of a scan, cost; NaN if unknown.
        time: minutes that this takes; NaN if unknown.
        scan: minutes that a scan takes; NaN if unknown.
    """
    if fit.verdict in (Verdict.NOT_IDENTIFIED, Verdict.ARTEFACT):
        return _measure(fit, missing, more=more, gradients=gradients, time=time, scan=scan)
    if not follows_gradients(fit):
        return f"let sd.AutoClip keep the updates of {fit.optimizer} short; L0 and L1 cannot."
    if unchecked(fit):
        return "record rows with sd.Probe, whose check against artefacts these rows could not have."
    return f"{_use(fit)}{'; sd.HessianNorm() or sd.scan would confirm it' if 'directions' in missing else ''}."


def blocking(fit: Any) -> list[Flag]:
    """The flags that stand against a law."""
    return [flag for flag in fit.flags if flag.fatal or flag.blocking]


def follows_gradients(fit: Any) -> bool:
    """Whether steps are the rate times an average of gradients, or nobody says which optimizer took them."""
    return bool(fit.follows_gradients) or (fit.follows_gradients is None and not fit.optimizer)


def unchecked(fit: Any) -> bool:
    """Whether the check for artefacts could not run."""
    return any(flag.name == "saturation unknown" for flag in fit.flags)


def _use(fit: Any) -> str:
    if fit.verdict is Verdict.L0L1:
        return "sd.clip_rule(fit, lr=...) makes a threshold"
    if fit.verdict is Verdict.LOSS_GAP:
        return "sd.LossGapWarmup(optimizer, fit) makes a rate"
    if fit.verdict is Verdict.POWER:
        if _exponent(fit) > 1:  # No step length is safe at every gradient norm, so no threshold is.
            return "sd.step_rate(fit) makes a rate"
        return "sd.clip_rule(fit, lr=...) makes a threshold"
    return "do not clip; sd.step_rate(fit) makes a rate"


def _measure(fit: Any, missing: Sequence[str], *, more: float, gradients: float, time: float, scan: float) -> str:
    cost = f", about {gradients:.0f} gradients" if math.isfinite(gradients) else ""
    cost += f" and {minutes(time)}" if cost and math.isfinite(time) else ""
    if "lines" in missing:
        return f"scan again along lines of other kinds (toward=, update=){cost}."
    here = f"scan this checkpoint: sd.scan(model, loss_fn, batches), about {SCAN_GRADIENTS} gradients"
    here += f", here {minutes(scan)}." if math.isfinite(scan) else "."
    flags = sorted(blocking(fit), key=lambda flag: (not flag.fatal, flag.name == "few points"))
    for flag in flags:
        if flag.name == "few points":
            break
        if not fit.num_scans and not flag.fatal and flag.name in (*OF_TIME, "range", "rate"):
            return here
        return f"{_first_sentence(flag.remedy)}."
    if "rows" in missing:
        return f"record {f'{more:.0f} ' if math.isfinite(more) else ''}more rows like these{cost}."
    return here


def _first_sentence(text: str) -> str:
    return text.partition(". ")[0].rstrip(".")


def _exponent(fit: Any) -> float:
    return next((score.exponent for score in fit.comparison if score.name == "power"), math.nan)


def _power(fit: Any) -> str:
    exponent = _exponent(fit)
    return "a power" if math.isnan(exponent) else f"the power {exponent:.2f}"
