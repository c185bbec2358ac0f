"""Diverged: whether the steps that AutoClip measured belong to a run that trained, told from the rows of its trace."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from smoothdiag.console import counted
from smoothdiag.rows import CLIP_SUFFIX, Status

CALIBRATION = 30
"""Steps from AutoClip's first row on whose losses are compared: those that set its longest step."""

NUMBER = 5
"""Losses at either end that are compared. Ten losses without a trend stand in such an order once in 252 times."""

RISE = 0.5
"""The last losses are also too high if all lie above the very first by this share of it: a run that diverges in its
first steps has large losses at both ends."""


def why_diverged(rows: Iterable[Mapping[Any, Any]], *, not_finite: int = 0) -> str:
    """Returns why a run in which nothing was clipped does not say where to clip; empty if nothing speaks against it.

    It does not if a gradient or a loss was not finite, or if the loss clearly rose while AutoClip calibrated. The loss
    clearly rose if each of its last five measured values lies above all of the first five, or above the very first by
    half of its size. With fewer than ten values only the second counts, and with fewer than six nothing.

    Args:
        rows: The rows of the trace.
        not_finite: Gradients that were not finite, as far as AutoClip has counted them.
    """
    own = [row for row in rows if str(row["estimator"]).endswith(CLIP_SUFFIX)]
    bad = Status.NON_FINITE.name.lower()
    if not_finite:
        return f"{counted(not_finite, 'gradient was', 'gradients were')} not finite (inf or NaN)"
    if number := sum(row["status"] == bad for row in own):
        return f"the loss or the gradient was not finite (inf or NaN) in {counted(number, 'measured step')}"
    begin = min((row["step"] for row in own), default=0)
    early = sorted((row["step"], float(row["loss"])) for row in own if row["step"] < begin + CALIBRATION)
    losses = [loss for _, loss in early if math.isfinite(loss)]
    if len(losses) <= NUMBER or not _is_above(losses, min(losses[-NUMBER:])):
        return ""
    number = early[-1][0] - begin + 1
    return f"the loss rose from {losses[0]:.3g} to {losses[-1]:.3g} in the first {counted(number, 'step')}"


def _is_above(losses: list[float], least: float) -> bool:
    """Returns whether the smallest of the last losses lies clearly above the first ones."""
    of_all = len(losses) >= 2 * NUMBER and least > max(losses[:NUMBER])
    return of_all or least > losses[0] + RISE * abs(losses[0])
