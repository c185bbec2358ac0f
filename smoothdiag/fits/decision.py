"""What comes next after a fit, decided once. `fits.wording` and the report say it, each in its own way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from smoothdiag.fits.parts import Flag, Verdict
from smoothdiag.rows import CLIP_SUFFIX

OF_TIME = ("learning rate", "surrogates", "tied to time", "time trend")
OPEN = (Verdict.NOT_IDENTIFIED, Verdict.ARTEFACT)
SHADOW = "shadow"
FOR_THE_LAW = "let the probe measure by a schedule of its own (estimators=, schedule=), on fixed batches"
"""What makes rows for a law beside the rows that AutoClip asks for, each on the batch of its own step."""


class Do(Enum):
    """The kind of the next step; the value says when it is taken."""

    THRESHOLD = "L0 and L1, or a power of at most 1, make a threshold."
    RATE = "No threshold is needed, or none is safe: set the learning rate."
    WARMUP = "The loss sets smoothness: let it set the learning rate."
    AUTOCLIP = "The gradient norm does not set the step, or nobody says whether it does: attach an AutoClip."
    KEEP = "No threshold follows, and an AutoClip keeps the steps of this run short already."
    ACT = "No threshold follows, and an AutoClip watches this run in shadow mode: let it act."
    PROBE = "The rows could not be checked for artefacts: record them with a probe."
    REMEDY = "A flag says what to change."
    LINES = "A scan needs lines of other kinds."
    ROWS = "More rows like these settle it."
    SCAN = "Rows of this run cannot settle it: scan a checkpoint."


@dataclass(frozen=True)
class Decision:
    """The next step, with its numbers.

    Attributes:
        do: kind of the step.
        remedy: what to change, a clause; for `REMEDY`.
        more: rows to record, for `ROWS`; NaN if unknown.
        gradients: gradients that the step costs; NaN if unknown.
        minutes: minutes that it takes; NaN if unknown.
    """

    do: Do
    remedy: str = ""
    more: float = math.nan
    gradients: float = math.nan
    minutes: float = math.nan


def next_of(fit: Any, missing: Sequence[str], *, more: float, gradients: float, time: float, scan: float) -> Decision:
    """Decides what comes next after a SmoothnessFit (this module stands below that class).

    Args:
        fit: the fit.
        missing: what is missing, as in `Plan.missing`.
        more: rows to record; NaN if unknown.
        gradients: what they, or further lines of a scan, cost; NaN if unknown.
        time: minutes that this takes; NaN if unknown.
        scan: minutes that a scan takes; NaN if unknown.
    """
    found = _of_fit(fit, missing, Decision(Do.ROWS, "", more, gradients, time), Decision(Do.SCAN, minutes=scan))
    if found.do is Do.THRESHOLD or not fit.clip_mode:
        return found
    return Decision(Do.ACT if fit.clip_mode == SHADOW else Do.KEEP)


def _of_fit(fit: Any, missing: Sequence[str], rows: Decision, scan: Decision) -> Decision:
    if not follows_gradients(fit):
        return Decision(Do.AUTOCLIP)
    if fit.verdict in OPEN or any(flag.fatal for flag in fit.flags):
        return _measure(fit, missing, rows, scan)
    if unchecked(fit):
        return Decision(Do.PROBE)
    if fit.hessian is not None and fit.hessian.agrees is False:
        return scan
    if fit.verdict is Verdict.LOSS_GAP:
        return Decision(Do.WARMUP)
    if fit.verdict is Verdict.POWER:  # above 1, no step length is safe at every gradient norm, so no threshold is
        return Decision(Do.RATE if exponent_of(fit) > 1 else Do.THRESHOLD)
    return Decision(Do.THRESHOLD if fit.verdict is Verdict.L0L1 and fit.L1_interval[0] > 0 else Do.RATE)


def _measure(fit: Any, missing: Sequence[str], rows: Decision, scan: Decision) -> Decision:
    if is_of_autoclip(fit):
        return Decision(Do.REMEDY, FOR_THE_LAW)
    if "lines" in missing:
        return Decision(Do.LINES, gradients=rows.gradients, minutes=rows.minutes)
    for flag in sorted(blocking(fit), key=lambda flag: (not flag.fatal, flag.name == "few points")):
        if flag.name == "few points":
            break
        if not fit.num_scans and not flag.fatal and flag.name in (*OF_TIME, "range", "rate"):
            return scan
        return Decision(Do.REMEDY, flag.remedy.partition(". ")[0].rstrip("."))
    return rows if "rows" in missing else scan


def blocking(fit: Any) -> list[Flag]:
    """The flags that stand against a law."""
    return [flag for flag in fit.flags if flag.fatal or flag.blocking]


def follows_gradients(fit: Any) -> bool:
    """Whether steps are the rate times an average of gradients, or nobody says which optimizer took them."""
    return bool(fit.follows_gradients) or (fit.follows_gradients is None and not fit.optimizer)


def unchecked(fit: Any) -> bool:
    """Whether the check for artefacts could not run."""
    return any(flag.name == "saturation unknown" for flag in fit.flags)


def is_of_autoclip(fit: Any) -> bool:
    """Whether an AutoClip asked for the rows of the fit: few, and each on the batch of its own step."""
    return bool(fit.estimator.endswith(CLIP_SUFFIX))


def exponent_of(fit: Any) -> float:
    """The exponent of the power model; NaN if the fit holds none."""
    return next((score.exponent for score in fit.comparison if score.name == "power"), math.nan)
