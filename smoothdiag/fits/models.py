"""Rivals of the line: a constant, a power and any monotone function, scored on steps later than the fitted ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from smoothdiag.fits.affine import Line, pinball, quantile_line
from smoothdiag.fits.base import Array, Interval, ModelScore
from smoothdiag.fits.resamples import Codes, Counts, sums
from smoothdiag.fits.walk import MANY

EXPONENT_RANGE = (0.25, 3.0)
EXPONENT_STEPS = (0.25, 0.05, 0.01)
NUM_BLOCKS = 6
FIRST_TEST = 2  # The first score is taken after a third of the run.
MIN_ROWS = 24
EXACT = 1e-9  # Relative losses below this are rounding: the model reproduces the rows.
# Between the best curves of two exponents hardly any row lies if the exponents differ by less than this over the cubic
# root of the number of rows. Only speed depends on it.
CLOSE = 1.9
TIED = 1e-12  # Relative differences of sums below this are rounding.
# Most rows on which a shape is searched for: with as many, an exponent scatters by less than a step of its grid.
SEARCHED = 50_000


class Curve(NamedTuple):
    """The model smoothness = intercept + coefficient * grad_norm ** exponent."""

    intercept: float
    coefficient: float
    exponent: float

    def __call__(self, x: Array) -> Array:
        """Height at the gradient norms `x`."""
        return np.asarray(self.intercept + self.coefficient * x**self.exponent)


def fit_constant(x: Array, y: Array, weights: Array, quantile: float) -> Curve:
    """The constant that minimises the weighted pinball loss: a weighted quantile."""
    order = np.argsort(y)
    share = np.cumsum(weights[order])
    return Curve(float(y[order][np.searchsorted(share, quantile * share[-1] * (1 - 1e-12))]), 0.0, 0.0)


def fit_affine(x: Array, y: Array, weights: Array, quantile: float) -> Curve:
    """The quantile line as a curve."""
    line = quantile_line(x, y, quantile, weights, start=Line(float(np.median(y)), 0.0))
    return Curve(line.intercept, line.slope, 1.0)


def searched(num_rows: int) -> slice | Codes:
    """The rows on which to search for a shape: all of up to `SEARCHED` rows, and as many out of more.

    Of neighbouring rows one is drawn at random, so that runs that take turns and other periods all have their share.
    """
    if num_rows <= SEARCHED:
        return slice(None)
    edges = np.linspace(0, num_rows, SEARCHED + 1).astype(np.intp)
    return np.random.default_rng(0).integers(edges[:-1], edges[1:])


def fit_power(x: Array, y: Array, weights: Array, quantile: float) -> Curve:
    """Intercept, coefficient and exponent together: a line in x ** exponent, profiled over the exponent.

    The profile has kinks and may have several valleys. So it is searched on grids, and each finer grid lies around the
    best point of the coarser one. Fixed grid points also make the result independent of the units of x and y. Beyond
    `SEARCHED` rows the exponent is chosen on that many of them, and intercept and coefficient are fitted to all.
    """
    unit = float(np.median(x))
    some = searched(len(x))
    best = _best_power(x[some] / unit, y[some], weights[some], quantile)
    if not isinstance(some, slice):
        z = (x / unit) ** best.exponent
        line = quantile_line(z, y, quantile, weights, start=Line(best.intercept, best.coefficient))
        best = Curve(line.intercept, line.slope, best.exponent)
    return best._replace(coefficient=best.coefficient / unit**best.exponent)


def _best_power(x: Array, y: Array, weights: Array, quantile: float) -> Curve:
    best, least = Curve(0.0, 0.0, 0.0), np.inf
    found: dict[float, Line] = {}
    for step, reach in zip(EXPONENT_STEPS, (None, *EXPONENT_STEPS), strict=False):
        low, high = EXPONENT_RANGE if reach is None else (best.exponent - reach, best.exponent + reach)
        for exponent in (np.arange(round(low / step), round(high / step) + 1) * step).tolist():
            if exponent < EXPONENT_STEPS[-1] or least <= EXACT * float(weights @ y):
                continue
            line = power_line(x, y, quantile, weights, exponent, found)
            loss = float(weights @ pinball(y - line(x**exponent), quantile))
            if loss < least:
                best, least = Curve(line.intercept, line.slope, exponent), loss
    return best


def power_line(x: Array, y: Array, quantile: float, weights: Array, exponent: float, found: dict[float, Line]) -> Line:
    """The quantile line in x ** exponent, from the line of the nearest exponent so far, and a note of it among these.

    Args:
        x: gradient norms in units that make them about one.
        y: smoothness.
        quantile: level of the line.
        weights: weight of each row.
        exponent: the power.
        found: lines by exponent.
    """
    start, is_close = Line(float(np.median(y)), 0.0), False
    if found:
        nearest = min(found, key=lambda one: abs(one - exponent))
        start, is_close = (
            _bent(found[nearest], nearest, exponent, x),
            abs(nearest - exponent) <= CLOSE / len(x) ** (1 / 3),
        )
    found[exponent] = quantile_line(x**exponent, y, quantile, weights, start, is_close)
    return found[exponent]


def _bent(line: Line, exponent: float, other: float, x: Array) -> Line:
    """The line in x ** other that meets the line in x ** exponent where x is about its 10% and its 90% quantile."""
    at = np.quantile(x[:: -(-len(x) // MANY)], [0.1, 0.9])
    heights, places = line(at**exponent), at**other
    if not places[1] > places[0]:
        return line
    slope = float((heights[1] - heights[0]) / (places[1] - places[0]))
    return Line(max(float(heights[0] - slope * places[0]), 0.0), slope)


class Steps(NamedTuple):
    """A monotone function, given by its values at the fitted gradient norms; straight between them, flat beyond."""

    at: Array
    values: Array

    def __call__(self, x: Array) -> Array:
        """Height at the gradient norms `x`."""
        return np.interp(x, self.at, self.values)


def fit_isotonic(x: Array, y: Array, weights: Array, quantile: float) -> Steps:
    """The function with the least weighted pinball loss among all functions that never fall in x.

    On the rows of the fit no monotone function of the gradient norm does better, whatever its formula. Its values are
    among the values of y. Halving the range of values splits the rows, in order of x, into rows that stay below the
    middle and rows that stay above; each part is then solved on its own.

    Source: Stout, 2013, Isotonic regression via partitioning.
    """
    order = np.argsort(x, kind="stable")
    ys, ws = y[order], weights[order]
    at, begins = np.unique(x[order], return_index=True)
    edges = np.append(begins, len(x))
    levels = np.unique(y)
    values = np.empty(len(at))
    parts = [(0, len(at), 0, len(levels) - 1)]  # Groups of equal x, and the levels they may take.
    while parts:
        first, last, low, high = parts.pop()
        if low == high:
            values[first:last] = levels[low]
            continue
        middle = (low + high) // 2
        rows = slice(edges[first], edges[last])
        # Cost of raising a row from this level to the next, in units of the distance between the levels.
        raising = np.zeros(edges[last] - edges[first] + 1)
        np.cumsum(ws[rows] * ((ys[rows] <= levels[middle]) - quantile), out=raising[1:])
        cost = raising[-1] - raising[edges[first : last + 1] - edges[first]]
        best = first + int(np.argmax(cost <= np.min(cost) + TIED * float(np.sum(ws[rows]))))
        parts += [part for part in ((first, best, low, middle), (best, last, middle + 1, high)) if part[0] < part[1]]
    return Steps(at, values)


Fitter = Callable[[Array, Array, Array, float], Curve | Steps]
FITTERS: dict[str, Fitter] = {
    "constant": fit_constant,
    "affine": fit_affine,
    "power": fit_power,
    "isotonic": fit_isotonic,
}


def compare(x: Array, y: Array, weights: Array, quantile: float, counts: Counts) -> tuple[ModelScore, ...]:
    """Scores of constant, line, power and monotone function, each fitted to the steps so far, scored on the next ones.

    Args:
        x: gradient norms in order of steps.
        y: smoothness.
        weights: weight of each row.
        quantile: level of all models.
        counts: resamples of the rows, from which the intervals of skill and gain come.

    Returns:
        tuple[ModelScore, ...]: in the order constant, affine, power, isotonic.

    Source: rolling-origin evaluation, Tashman, 2000.
    """
    later = {name: rolling_curve(fitter, x, y, weights, quantile) for name, fitter in FITTERS.items()}
    means = averages(later, counts)
    scores = []
    for name in later:
        curve = FITTERS[name](x, y, weights, quantile)
        loss = float(np.mean(weights * pinball(y - curve(x), quantile)))
        lowest = curve if isinstance(curve, Curve) else Curve(float(curve.values[0]), 0.0, 0.0)
        scores.append(score(name, lowest, loss, means[name], means["constant"], means["affine"]))
    return tuple(scores)


def rolling_curve(fitter: Fitter, x: Array, y: Array, weights: Array, quantile: float) -> Array:
    """`rolling` for a model of the gradient norm alone."""

    def fit(past: slice) -> Callable[[slice], Array]:
        curve = fitter(x[past], y[past], weights[past], quantile)
        return lambda rows: curve(x[rows])

    return rolling(fit, y, weights, quantile)


def rolling(fit: Callable[[slice], Callable[[slice], Array]], y: Array, weights: Array, quantile: float) -> Array:
    """Relative pinball losses of the later rows, each under the model fitted to the blocks of steps before its own.

    Args:
        fit: takes the rows of the past, and returns a function that gives the heights of other rows.
        y: smoothness in order of steps.
        weights: weight of each row.
        quantile: level of the model.

    Returns:
        Array: one loss for each row from the first test block on; empty if there are fewer than `MIN_ROWS` rows.
    """
    edges = np.linspace(0, len(y), NUM_BLOCKS + 1).astype(int)
    found = [np.zeros(0)]
    for block in range(FIRST_TEST, NUM_BLOCKS if len(y) >= MIN_ROWS else 0):
        test = slice(int(edges[block]), int(edges[block + 1]))
        heights = fit(slice(0, int(edges[block])))(test)
        found.append(weights[test] * pinball(y[test] - heights, quantile))
    return np.concatenate(found)


def averages(losses: Mapping[str, Array], counts: Counts) -> dict[str, Array]:
    """The mean of each kind of losses on every resample, and last on the rows themselves; NaN without losses.

    Args:
        losses: by name, all of the same rows, which are the last ones of the fit, as `rolling` gives them.
        counts: resamples of the rows of the fit.
    """
    num = len(next(iter(losses.values())))
    if num == 0:
        return {name: np.full(len(counts) + 1, np.nan) for name in losses}
    found = sums(counts[:, -num:], np.stack([np.ones(num), *losses.values()], axis=1))
    means = found[:, 1:] / np.maximum(found[:, :1], 1.0)
    return {name: np.append(column, np.mean(losses[name])) for name, column in zip(losses, means.T, strict=True)}


def score(
    name: str, formula: tuple[float, ...], loss: float, later: Array, constant: Array, affine: Array
) -> ModelScore:
    """The score of one model, compared with constant and line on the same rows; all three come from `averages`."""
    skill, skill_interval = saving(later, constant)
    gain, gain_interval = saving(later, affine)
    intercept, coefficient, exponent = formula[:3]
    return ModelScore(
        name,
        intercept,
        coefficient,
        exponent,
        loss,
        float(later[-1]),
        skill,
        skill_interval,
        gain,
        gain_interval,
        *formula[3:],
    )


def saving(model: Array, baseline: Array) -> tuple[float, Interval]:
    """Share of the baseline's loss that the model removes, with its interval; both losses come from `averages`."""
    *replicates, found = 1 - np.maximum(model, EXACT) / np.maximum(baseline, EXACT)
    low, high = np.quantile(replicates, [0.05, 0.95])
    return float(found), (float(low), float(high))
