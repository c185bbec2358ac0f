"""Doubts about the fit of a scan: few lines, a short range, the distance, one line that decides, points left out."""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata

from smoothdiag.console import counted
from smoothdiag.fits.base import Array, Flag
from smoothdiag.fits.checks import MAX_MOVE, short_range
from smoothdiag.fits.correlations import MIN_WITHIN
from smoothdiag.fits.scans.lines import LARGEST_CURVATURE, Lines
from smoothdiag.fits.scans.rivals import Fitted
from smoothdiag.fits.scans.shapes import lift
from smoothdiag.fits.verdict import FLAT, MIN_GAIN
from smoothdiag.fits.wording import FURTHER

MIN_LINES = 4  # A resample of five lines leaves out two of them, and repeats others up to five times.
MAX_LEFT_OUT = 0.1  # Share of points that did not converge above which a scan deserves a doubt ...
MOST_LEFT_OUT = 0.5  # ... and above which it says too little.
IN_TAIL = 3  # Lines that the points above the fitted line should come from.


def check(lines: Lines, fitted: Fitted, rest: Array, quantile: float, rising: bool, raw: float) -> tuple[Flag, ...]:
    """All doubts, blocking ones first.

    Args:
        lines: the points.
        fitted: from `fit_all`.
        rest: log smoothness of each point minus the height of the median line.
        quantile: level of the line.
        rising: whether the line rises at all.
        raw: rank correlation of gradient norm and smoothness.
    """
    found = [
        _secants(lines),
        _few(lines, raw),
        short_range(lines.rows.x, FURTHER),
        _left_out(lines),
        _scatter(lines, rest, quantile),
    ]
    if rising:
        found += [_within(lines, raw), _distance(fitted), _leverage(lines, fitted)]
    found += [_tail(lines, rest, quantile)]
    return tuple(sorted((flag for flag in found if flag is not None), key=lambda flag: not flag.blocking))


def within(lines: Lines) -> float:
    """Rank correlation of gradient norm and smoothness inside of the lines, pooled; 0 if nothing varies there."""
    parts = []
    for number in range(lines.num_lines):
        points = lines.line == number
        parts.append(np.stack([rankdata(v[points]) - (points.sum() + 1) / 2 for v in (lines.rows.x, lines.rows.y)]))
    ranks = np.concatenate(parts, axis=1)
    size = float(np.sqrt(np.prod(np.sum(ranks**2, axis=1))))
    return float(ranks[0] @ ranks[1] / size) if size > 0 else 0.0


def _secants(lines: Lines) -> Flag | None:
    if lines.rows.estimator.startswith(LARGEST_CURVATURE) or lines.rows.estimator == "unnamed":
        return None
    return Flag(
        "direction",
        "the points hold smoothness along one direction, which turns from flat to stiff directions as a line leaves "
        "the starting point. On a quadratic, whose curvature is the same everywhere, such points follow a law",
        f"estimator {lines.rows.estimator!r}",
        f"fit the points of the estimator {LARGEST_CURVATURE!r}, which measures the largest curvature",
        blocking=True,
    )


def _few(lines: Lines, raw: float) -> Flag | None:
    if lines.num_units >= MIN_LINES:
        return None
    kinds = "" if lines.num_units == lines.num_lines else ", because all random lines of one kind count as one"
    return Flag(
        "few lines",
        "the points of one line are alike, so lines are the independent units, and there are too few of them for an "
        "interval",
        f"{counted(lines.num_lines, 'line')}, as good as {lines.num_units} independent ones{kinds}; should be at least "
        f"{MIN_LINES}. Along them gradient norm and smoothness have the rank correlation {raw:.2f}",
        "add lines of other kinds to sd.scan: toward= other checkpoints, update= of the optimizer, and the "
        "default directions, which take both ways along the gradient",
        blocking=True,
    )


def _left_out(lines: Lines) -> Flag | None:
    lost = lines.rows.dropped.get("not_converged", 0)
    share = lost / (lost + len(lines.rows.x))
    if share <= MAX_LEFT_OUT:
        return None
    return Flag(
        "not converged",
        "many points were left out because the largest curvature was not found there, and these may be the points "
        "with unusual curvature",
        f"{lost} of {lost + len(lines.rows.x)} points",
        "allow more Hessian-vector products at each point: sd.scan(..., estimators=[sd.HessianNorm(max_products=...)])",
        blocking=share > MOST_LEFT_OUT,
    )


def _scatter(lines: Lines, rest: Array, quantile: float) -> Flag | None:
    upper = lines.rows.x > np.median(lines.rows.x)
    every, above = (float(lift(part[None], np.ones((1, len(part))), quantile)[0]) for part in (rest, rest[upper]))
    factor = float(np.exp(above - every))
    if factor < FLAT:
        return None
    low, high = float(np.std(rest[~upper])), float(np.std(rest[upper]))
    return Flag(
        "scatter",
        "smoothness scatters more at large gradient norms than at small ones, so the fitted line, whose shape is that "
        "of the median, is too low at large gradient norms",
        f"above the median gradient norm the quantile {quantile:g} lies {factor:.2f} times as high as the line; the "
        f"deviation of the logarithm is {low:.2f} below and {high:.2f} above it",
        "fit at the quantile .5, or add lines",
    )


def _within(lines: Lines, raw: float) -> Flag | None:
    found = within(lines)
    if found >= min(MIN_WITHIN, raw / 2):
        return None
    return Flag(
        "within lines",
        "gradient norm and smoothness are related from line to line, but hardly along the lines, so what differs "
        "between the lines may explain both",
        f"rank correlation {raw:.2f} over all points, {found:.2f} along the lines",
        "add lines along which the gradient norm changes more (toward= other checkpoints, update=)",
        blocking=True,
    )


def _distance(fitted: Fitted) -> Flag | None:
    best = max((fitted.over_distance, fitted.power_over_distance), key=lambda pair: pair[0])
    if best[0] > MIN_GAIN and best[1][0] > 0:
        return None
    return Flag(
        "distance",
        "the distance from the starting point explains smoothness as well as the gradient norm does. Both grow along "
        "the lines, so these points do not tell which of them matters",
        f"on lines left out the gradient norm removes {best[0]:.0%} of the error that the distance leaves (interval "
        f"{best[1][0]:.0%} to {best[1][1]:.0%}), should be above {MIN_GAIN:.0%} with an interval above zero",
        "add lines along which the gradient norm grows faster or more slowly with the distance (toward= other "
        "checkpoints, or directions= with 'in PARAMETER' and 'random 2')",
        blocking=True,
    )


def _leverage(lines: Lines, fitted: Fitted) -> Flag | None:
    """Whether leaving out one line changes the slope; if it took the rise away, the interval of L1 would hold zero."""
    if lines.num_units < MIN_LINES:
        return None
    target = np.log(lines.rows.y)
    found = fitted.line.fit(target, lines.all_but_one())
    slopes, whole = fitted.line.constants(found)[1], fitted.line.constants(fitted.line_at)[1][0]
    with np.errstate(divide="ignore"):
        moves = np.maximum(slopes / whole, whole / slopes)
    worst = int(np.argmax(moves))
    if moves[worst] <= MAX_MOVE:
        return None
    return Flag(
        "leverage",
        "a single line decides the slope L1",
        f"without {_name(lines, worst)} L1 changes {moves[worst]:.2g}-fold",
        "look at this line, and add others that go as far",
    )


def _name(lines: Lines, unit: int) -> str:
    members = [lines.names[number] for number in sorted(set(lines.line[lines.unit == unit].tolist()))]
    return " and ".join(map(repr, members)) if len(members) < 3 else f"{members[0]!r} to {members[-1]!r}"


def _tail(lines: Lines, rest: Array, quantile: float) -> Flag | None:
    height = lift(rest[None], np.ones((1, len(rest))), quantile)[0]
    above = len(set(lines.line[rest >= height].tolist()) - {-1})
    if above >= IN_TAIL or height < np.log(FLAT):
        return None
    return Flag(
        "few above",
        "the height of the line, though not its shape, rests on very few lines, so a scan along other lines may give "
        "L0 and L1 that are larger or smaller by one common factor",
        f"the points at or above the quantile {quantile:g} lie on {counted(above, 'line')}, should be on at least "
        f"{IN_TAIL}",
        "add lines, or fit a quantile nearer to the median",
    )
