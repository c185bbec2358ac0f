"""Rivals of the line: a constant and a power, scored on steps later than those they were fitted to."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from smoothdiag.fits.affine import Line, pinball, quantile_line
from smoothdiag.fits.base import Array, Interval, ModelScore

EXPONENT_RANGE = (0.25, 3.0)
EXPONENT_STEPS = (0.25, 0.05, 0.01)
NUM_BLOCKS = 6
FIRST_TEST = 2  # The first score is taken after a third of the run.
MIN_ROWS = 24
EXACT = 1e-9  # Relative losses below this are rounding: the model reproduces the rows.


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


def fit_power(x: Array, y: Array, weights: Array, quantile: float) -> Curve:
    """Intercept, coefficient and exponent together: a line in x ** exponent, profiled over the exponent.

    The profile may have several valleys and has kinks, so it is searched on grids, the finer ones around the best
    point of the coarser. Fixed grid points also keep the result the same whatever the units of x and y.
    """
    unit = float(np.median(x))
    start = Line(float(np.median(y)), 0.0)
    best, least = Curve(0.0, 0.0, 0.0), np.inf
    for step, reach in zip(EXPONENT_STEPS, (None, *EXPONENT_STEPS), strict=False):
        low, high = EXPONENT_RANGE if reach is None else (best.exponent - reach, best.exponent + reach)
        for exponent in np.arange(round(low / step), round(high / step) + 1) * step:
            if exponent < EXPONENT_STEPS[-1] or least <= EXACT * float(weights @ y):
                continue
            line = quantile_line((x / unit) ** exponent, y, quantile, weights, start=start)
            loss = float(weights @ pinball(y - line((x / unit) ** exponent), quantile))
            if loss < least:
                best, least = Curve(line.intercept, line.slope / unit ** float(exponent), float(exponent)), loss
    return best


FITTERS = {"constant": fit_constant, "affine": fit_affine, "power": fit_power}


def compare(
    x: Array, y: Array, weights: Array, quantile: float, counts: np.ndarray[tuple[int, int], np.dtype[np.int16]]
) -> tuple[ModelScore, ...]:
    """Constant, line and power, each fitted to the steps so far and scored on the next ones.

    Args:
        x: gradient norms in order of steps.
        y: smoothness.
        weights: weight of each row.
        quantile: level of all models.
        counts: resamples of the rows, from which the intervals of skill and gain come.

    Returns:
        tuple[ModelScore, ...]: in the order constant, affine, power.

    Source: rolling-origin evaluation, Tashman, 2000.
    """
    edges = np.linspace(0, len(x), NUM_BLOCKS + 1).astype(int)
    later = {name: np.zeros(0) for name in FITTERS}
    enough = len(x) >= MIN_ROWS
    for block in range(FIRST_TEST, NUM_BLOCKS if enough else 0):
        past, test = slice(0, edges[block]), slice(edges[block], edges[block + 1])
        for name, fitter in FITTERS.items():
            curve = fitter(x[past], y[past], weights[past], quantile)
            losses = weights[test] * pinball(y[test] - curve(x[test]), quantile)
            later[name] = np.concatenate([later[name], losses])
    resampled = counts[:, edges[FIRST_TEST] :].astype(np.float64)
    scores = []
    for name, fitter in FITTERS.items():
        curve = fitter(x, y, weights, quantile)
        loss = float(np.mean(weights * pinball(y - curve(x), quantile)))
        nothing = np.nan, (np.nan, np.nan)
        skill, skill_interval = _saving(later[name], later["constant"], resampled) if enough else nothing
        gain, gain_interval = _saving(later[name], later["affine"], resampled) if enough else nothing
        mean = float(np.mean(later[name])) if enough else np.nan
        scores.append(ModelScore(name, *curve, loss, mean, skill, skill_interval, gain, gain_interval))
    return tuple(scores)


def _saving(model: Array, baseline: Array, resampled: Array) -> tuple[float, Interval]:
    """Share of the baseline's loss that the model removes, with its interval."""
    size = np.maximum(resampled.sum(axis=1), 1.0)
    means = [np.append(resampled @ losses / size, np.mean(losses)) for losses in (model, baseline)]
    *replicates, saving = 1 - np.maximum(means[0], EXACT) / np.maximum(means[1], EXACT)
    low, high = np.quantile(replicates, [0.05, 0.95])
    return float(saving), (float(low), float(high))
