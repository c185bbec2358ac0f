"""Rivals of the line on a scan: constant, power, monotone function, distance and loss gap, scored on lines left out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from smoothdiag.fits import lossgap, models
from smoothdiag.fits.base import Array, Interval, ModelScore
from smoothdiag.fits.scans.lines import Lines
from smoothdiag.fits.scans.shapes import EXPONENTS, FINE_SHARES, Found, Shapes, left_out

DISTANCE = "distance"
FLAT, STRAIGHT = np.zeros(1), np.ones(1)


@dataclass(frozen=True)
class Fitted:
    """Everything that the fit of one scan found, in the units of `Lines`; resamples are of whole lines.

    Attributes:
        line: the grid of lines, `line_at` the best one and `line_again` the best one of each resample.
        power: the grid of powers, likewise.
        scores: constant, affine, power, isotonic, distance and, if losses are known, loss gap.
        floors: one score for each f*; empty without losses.
        over_distance: share of the distance's error that the line removes, and its interval.
        power_over_distance: the same for the power.
        beyond: share of the loss gap's error that a further line in the gradient norm removes, and its interval.
        gap_over: share of the error of affine, power and distance that the loss gap removes, by model; empty without
            losses.
    """

    line: Shapes
    line_at: Found
    line_again: Found
    power: Shapes
    power_at: Found
    power_again: Found
    scores: tuple[ModelScore, ...]
    floors: tuple[ModelScore, ...]
    over_distance: tuple[float, Interval]
    power_over_distance: tuple[float, Interval]
    beyond: tuple[float, Interval]
    gap_over: dict[str, tuple[float, Interval]]


def fit_all(lines: Lines, counts: Array) -> Fitted:
    """Fits every model to all points, to every resample and to all lines but one.

    The error of a model is the mean of |log(smoothness / prediction)| over the points of lines that it was not fitted
    to.

    Args:
        lines: the points.
        counts: from `Lines.resamples`.
    """
    x, target = lines.rows.x, np.log(lines.rows.y)
    on_line = lines.line >= 0
    without = lines.all_but_one()
    again = counts[:, on_line].astype(np.uint8)
    everything = np.ones((1, len(x)))
    grids = {
        "constant": Shapes(x, STRAIGHT, FLAT),
        "affine": _straight(x, target),
        "power": Shapes(x, EXPONENTS),
        DISTANCE: Shapes(lines.distance, EXPONENTS),
    }
    errors = {name: _errors(grid, target, lines, without) for name, grid in grids.items()}
    errors["isotonic"] = _isotonic_errors(x, lines, without)
    means = models.averages(errors, again)
    at = {name: grid.fit(target, everything) for name, grid in grids.items()}

    def averaged(later: Array) -> Array:
        return models.averages({DISTANCE: later}, again)[DISTANCE]

    def scored(name: str, grid: Shapes, found: Found, later: Array, *more: float) -> ModelScore:
        formula = tuple(float(part[0]) for part in grid.constants(found))
        rest = float(np.mean(np.abs(target - grid.heights(found)[0])))
        return models.score(name, (*formula, *more), rest, later, means["constant"], means["affine"])

    scores = [scored(name, grids[name], at[name], means[name]) for name in ("constant", "affine", "power")]
    scores += [_isotonic_score(x, target, means)]
    scores += [scored(DISTANCE, grids[DISTANCE], at[DISTANCE], means[DISTANCE])]
    floors: list[ModelScore] = []
    beyond = (np.nan, (np.nan, np.nan))
    gap_over: dict[str, tuple[float, Interval]] = {}
    gaps = _gaps(lines.rows.loss)
    if gaps is not None:
        grid = Shapes(gaps, np.array(lossgap.EXPONENTS))
        later = averaged(_errors(grid, target, lines, without))
        found = grid.fit(target, everything)
        floor = np.min(lines.rows.loss) - gaps.min(axis=1)
        scores += [scored(lossgap.NAME, grid, found, later, float(floor[grid.source[found.best[0]]]))]
        for number, row in enumerate(gaps):
            one = Shapes(row, np.array(lossgap.EXPONENTS))
            fitted = one.fit(target, everything)
            left = averaged(_errors(one, target, lines, without))
            floors += [scored(lossgap.NAME, one, fitted, left, float(floor[number]))]
        further = averaged(_further_errors(grid, grids["affine"], target, lines, without))
        beyond = models.saving(further, later)
        gap_over = {name: models.saving(later, means[name]) for name in ("affine", "power", DISTANCE)}
    return Fitted(
        line=grids["affine"],
        line_at=at["affine"],
        line_again=grids["affine"].fit(target, counts),
        power=grids["power"],
        power_at=at["power"],
        power_again=grids["power"].fit(target, counts),
        scores=tuple(scores),
        floors=tuple(floors),
        over_distance=models.saving(means["affine"], means[DISTANCE]),
        power_over_distance=models.saving(means["power"], means[DISTANCE]),
        beyond=beyond,
        gap_over=gap_over,
    )


def _straight(x: Array, target: Array) -> Shapes:
    """The grid of lines, which is finest around the best one."""
    coarse = Shapes(x, STRAIGHT, FINE_SHARES)
    best = int(coarse.fit(target, np.ones((1, len(x)))).best[0])
    near = FINE_SHARES[max(best - 1, 0) : best + 2]
    return Shapes(x, STRAIGHT, np.union1d(FINE_SHARES, np.linspace(near[0], near[-1], 201)))


def _errors(grid: Shapes, target: Array, lines: Lines, without: Array) -> Array:
    if lines.num_units < 2:
        return np.zeros(0)
    return np.abs(target[lines.line >= 0] - left_out(grid, target, lines.unit, without))


def _isotonic_errors(x: Array, lines: Lines, without: Array) -> Array:
    y = lines.rows.y
    if lines.num_units < 2:
        return np.zeros(0)
    errors = np.zeros(len(x))
    for number, kept in enumerate(without > 0):
        on_line = lines.unit == number
        curve = models.fit_isotonic(x[kept], y[kept], 1 / y[kept], 0.5)
        errors[on_line] = np.abs(np.log(y[on_line] / curve(x[on_line])))
    return errors[lines.line >= 0]


def _isotonic_score(x: Array, target: Array, means: dict[str, Array]) -> ModelScore:
    y = np.exp(target)
    curve = models.fit_isotonic(x, y, 1 / y, 0.5)
    rest = float(np.mean(np.abs(target - np.log(curve(x)))))
    formula = (float(curve.values[0]), 0.0, 0.0)
    return models.score("isotonic", formula, rest, means["isotonic"], means["constant"], means["affine"])


def _gaps(loss: Array) -> Array | None:
    """Distances of the losses from each f* of the grid; None if a loss is unknown or they hardly vary."""
    if not (np.abs(loss) < lossgap.LARGEST).all():
        return None
    low = float(np.min(loss))
    spread = float(np.median(loss)) - low
    if not spread > 1 / lossgap.LARGEST or np.ptp(loss) > lossgap.LARGEST_RATIO * spread:
        return None
    return np.stack([loss - (low - distance * spread) for distance in lossgap.DISTANCES])


def _further_errors(gap: Shapes, line: Shapes, target: Array, lines: Lines, without: Array) -> Array:
    """Errors of the loss gap times a line in the gradient norm, both fitted without the line of the point."""
    if lines.num_units < 2:
        return np.zeros(0)
    below = gap.heights(gap.fit(target, without))
    predicted = np.copy(target)
    for number in range(lines.num_units):
        found = line.fit(target - below[number], without[number : number + 1])
        points = lines.unit == number
        predicted[points] = (below[number] + line.heights(found)[0])[points]
    return np.abs(target - predicted)[lines.line >= 0]
