"""Null tests that set flags: could time, range, direction or a few rows alone have produced the relation?"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from smoothdiag.console import counted
from smoothdiag.fits import artefacts, causes
from smoothdiag.fits.affine import Line, quantile_line
from smoothdiag.fits.artefacts import MIN_POINTS, ON_THE_LINE
from smoothdiag.fits.base import Array, Flag, Interval
from smoothdiag.fits.correlations import (
    MIN_BLOCK,
    MIN_CORRELATION,
    MIN_DECADES,
    TIME_BLOCKS,
    Correlations,
    correlate,
    decades,
)
from smoothdiag.fits.rows import Rows
from smoothdiag.fits.verdict import CONSTANT_RISE, FLAT, has_slope, rises, widest_rise

MIN_EFFECTIVE = 10.0
MIN_IN_TAIL = 4.0  # Effective rows beyond the line; fewer say too little about an upper quantile.
MIN_IN_THIRD = 3  # A third of the range counts as occupied from this many rows and this share of the rows on.
MIN_SHARE_IN_THIRD = 0.01
MAX_MISS = 0.05  # Difference of coverage and quantile above which the line does not describe the rows.
EDGE = 0.05  # Share of the rows at either end of the gradient norms; leaving them out should not change the slope much.
MAX_MOVE = 1.5  # Largest factor by which leaving out a part of the rows may change the slope.


def check(
    rows: Rows,
    num_effective: float,
    correlations: Correlations,
    line: Line,
    quantile: float,
    weights: Array,
    others: tuple[Flag | None, ...] = (),
) -> tuple[Flag, ...]:
    """All null tests that the rows allow, fatal flags first and blocking ones next.

    Args:
        rows: the rows of the fit.
        num_effective: number of independent rows with the same information.
        correlations: from `correlate`.
        line: the fitted line.
        quantile: level of the line.
        weights: weight of each row.
        others: results of tests that need more than these rows.
    """
    found = [
        artefacts.saturation(rows, line),
        artefacts.noise_floor(rows),
        artefacts.step_length(rows),
        artefacts.learning_rate(rows),
        artefacts.not_reproduced(rows),
        causes.proportional_noise(rows, line, quantile),
        causes.step_batch(rows, line),
        _few(rows, num_effective, quantile),
        _range(rows),
        _time(rows, correlations),
        causes.rate(rows, correlations.raw, line),
        causes.short_lived(rows, line),
        _coverage(rows, correlations, line, quantile),
        *others,
        _leverage(rows, line, quantile, weights),
        artefacts.kinks(rows),
    ]
    return tuple(sorted((flag for flag in found if flag is not None), key=lambda f: (not f.fatal, not f.blocking)))


def _range(rows: Rows) -> Flag | None:
    begin = (
        "measure the first steps more often (sd.log_spaced())"
        if np.min(rows.step) == 0  # advice to begin there would be idle
        else "record from the first step on"
    )
    remedy = (
        f"scan one checkpoint (sd.scan), which changes the gradient norm without time or rate, or {begin}. Changes of "
        "the learning rate widen the range, too, but then the rate may be the cause of both axes"
    )
    return short_range(rows.x, remedy) or _occupied(rows.x)


def short_range(x: Array, remedy: str) -> Flag | None:
    """Whether the gradient norms cover less than `MIN_DECADES`."""
    found = decades(x)
    if found >= MIN_DECADES:
        return None
    return Flag(
        "range",
        "the gradient norms vary too little to tell L0 from L1",
        f"{found:.2f} powers of ten between their 2.5% and 97.5% quantiles, should be at least {MIN_DECADES:g}",
        remedy,
        blocking=True,
    )


def _occupied(x: Array) -> Flag | None:
    """Whether all thirds of the range hold rows: two separate clouds define a line, whatever lies between them."""
    low, high = np.log(np.quantile(x, [0.025, 0.975]))
    third = np.clip(np.floor(3 * (np.log(x) - low) / (high - low)), 0, 2)
    counts = [int(np.sum(third == number)) for number in range(3)]
    if min(counts) >= max(MIN_IN_THIRD, MIN_SHARE_IN_THIRD * len(x)):
        return None
    return Flag(
        "range",
        "a third of the range of gradient norms is nearly empty. Separate groups of rows define a line whether or not "
        "a law holds between them",
        f"{counts[0]}, {counts[1]} and {counts[2]} rows in the lower, middle and upper third of the range, on a "
        "logarithmic axis",
        "record more often while the gradient norm changes",
        blocking=True,
    )


def _few(rows: Rows, num_effective: float, quantile: float) -> Flag | None:
    tail = min(quantile, 1 - quantile)
    asked = {
        f"{MIN_POINTS} rows": len(rows.x) >= MIN_POINTS,
        f"{MIN_EFFECTIVE:g} independent ones": num_effective >= MIN_EFFECTIVE,
        f"{MIN_IN_TAIL:g} beyond the quantile": tail * num_effective >= MIN_IN_TAIL - 1e-9,
    }
    lacking = [name for name, is_met in asked.items() if not is_met]
    if not lacking:
        return None
    return Flag(
        "few points",
        "there are too few independent rows for a line at this quantile and its interval",
        f"{counted(len(rows.x), 'row carries', 'rows carry')} the information of {num_effective:.1f} independent "
        f"ones, {tail * num_effective:.1f} "
        f"of which lie beyond the quantile {quantile:g}; should be at least {' and '.join(lacking)}",
        "probe more often or for longer, or fit a quantile nearer to the median; if another flag blocks, follow its "
        "remedy first",
        blocking=True,
    )


def loss_and_time(rows: Rows, gap: Array, known: npt.NDArray[np.bool_]) -> Flag | None:
    """Whether time explains smoothness as well as the loss does; `gap` has a value for each of the rows `known`."""
    return _tied(correlate(gap, rows.y[known], rows.step[known], rows.run[known]), "loss")


def _time(rows: Rows, found: Correlations) -> Flag | None:
    return _tied(found) if len(rows.x) >= MIN_POINTS else None


def _tied(found: Correlations, name: str = "gradient norm") -> Flag | None:
    raw = found.raw
    if np.isnan(raw) or raw < MIN_CORRELATION:
        return None
    remedy = (
        "scan one checkpoint (sd.scan), where time plays no part, or add runs of other seeds or learning rates, so "
        f"that the same {name} occurs at different steps"
    )
    if np.isnan(found.partial):
        return Flag(
            "tied to time",
            f"the {name} or the smoothness rises or falls with the step almost without exception. A law in the {name}, "
            "a drift over time and a turning direction explain such rows equally well",
            f"rank correlation {raw:.2f}; with the effect of the step taken out it is undefined",
            remedy,
            blocking=True,
        )
    if found.partial >= 0.1 and not found.gone_within:
        return None
    return Flag(
        "time trend",
        f"{name} and smoothness move together over the run, but a test without the drift over time finds hardly any "
        "relation, so time may explain both",
        f"rank correlation {raw:.2f}; {found.partial:.2f} with the effect of the step taken out; {found.within:.2f} "
        f"within blocks of steps; {found.within_given_time:.2f} within blocks with their trends taken out",
        remedy,
        blocking=True,
    )


def _coverage(rows: Rows, correlations: Correlations, line: Line, quantile: float) -> Flag | None:
    """Whether the share of rows below the line is the quantile of the fit.

    Weights are relative, so a few rows with unusual gradient norms can outvote many others. Where smoothness falls with
    the gradient norm, the slope stops at zero and the line is not meant to fit.
    """
    if line.slope == 0 and not correlations.raw > 0:
        return None
    height = line(rows.x)
    above = float(np.mean(rows.y > height * (1 + ON_THE_LINE)))
    below = float(np.mean(rows.y < height * (1 - ON_THE_LINE)))
    if max(above - (1 - quantile), below - quantile) <= MAX_MISS + 2 / len(rows.x):
        return None
    return Flag(
        "coverage",
        "the share of rows at or below the line is not the quantile of the fit: a few rows with outlying gradient "
        "norms pull the line, or the relation is not a line",
        f"{1 - above:.3f} of the rows lie at or below it, should be {quantile:g}",
        "look at the rows with the largest and the smallest gradient norms, and fit again without those that do not "
        "belong",
        blocking=True,
    )


def _leverage(rows: Rows, line: Line, quantile: float, weights: Array) -> Flag | None:
    """Whether leaving out one stretch of steps, or either end of the gradient norms, changes the slope."""
    n = len(rows.x)
    if n < MIN_POINTS or rises(line, (float(np.min(rows.x)), float(np.max(rows.x)))) < FLAT:
        return None
    order = np.argsort(rows.x, kind="stable")
    edge = max(1, int(EDGE * n))
    parts = {
        "the rows with the largest gradient norms": order[-edge:],
        "the rows with the smallest gradient norms": order[:edge],
    }
    blocks = np.array_split(np.arange(n), min(TIME_BLOCKS, n // MIN_BLOCK))
    parts |= {f"steps {rows.step[b[0]]:g} to {rows.step[b[-1]]:g}": b for b in blocks}
    worst, factor = "", MAX_MOVE
    for name, left_out in parts.items():
        kept = np.ones(n)
        kept[left_out] = 0.0
        slope = quantile_line(rows.x, rows.y, quantile, weights * kept, start=line).slope
        move = max(slope / line.slope, line.slope / slope) if slope > 0 else math.inf
        if move > factor:
            worst, factor = name, move
    if not worst:
        return None
    return Flag(
        "leverage",
        "a small part of the rows decides the slope L1",
        f"without {worst} L1 changes {factor:.2g}-fold",
        "look at these rows, and record more of their kind",
    )


def direction(
    line: Line, L1_interval: Interval, other: Line, other_interval: Interval, bounds: Interval
) -> Flag | None:
    """Whether rows of random directions contradict the slope, or the absence of one, along the gradient.

    On a quadratic, ||H g|| / ||g|| changes as the gradient turns into flatter directions, although H is constant.
    """
    slope, other_slope = has_slope(line, L1_interval, bounds), has_slope(other, other_interval, bounds)
    if slope == other_slope:
        return None
    flat, flat_interval, steep = (other, other_interval, line) if slope else (line, L1_interval, other)
    widest = widest_rise(flat, flat_interval, bounds)
    if widest > max(CONSTANT_RISE, rises(steep, bounds)):
        return None
    with_slope, without = ("the gradient", "random directions") if slope else ("random directions", "the gradient")
    return Flag(
        "direction",
        f"smoothness grows with the gradient norm along {with_slope} and not along {without}, so the relation comes "
        "from the direction and not from the curvature",
        f"the line rises {rises(steep, bounds):.3g}-fold along {with_slope}, and at most {widest:.3g}-fold along "
        f"{without}",
        "measure the largest curvature instead (HessianNorm), which depends on no direction",
        blocking=True,
    )
