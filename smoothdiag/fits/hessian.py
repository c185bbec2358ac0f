"""Hessian norms beside the fitted rows: the law is meant as a bound of ||H||, so they have the last word on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from smoothdiag.fits.affine import Line
from smoothdiag.fits.artefacts import MIN_POINTS
from smoothdiag.fits.base import Array, Flag, HessianCheck, Interval
from smoothdiag.fits.correlations import correlate, rank_correlations
from smoothdiag.fits.intervals import dependence, percentile_interval
from smoothdiag.fits.resamples import Counts, resampled_quantile, sums, with_all
from smoothdiag.fits.rows import Rows
from smoothdiag.fits.text import number
from smoothdiag.fits.verdict import CONSTANT_RISE, FLAT, has_slope, rises

NAME = "hessian_norm"
HALF = 0.5  # Hessian norms follow the line if, in logarithms, they show this to 2 - this of its rise.


class _Shape(NamedTuple):
    """How much Hessian norms rise where the line rises `line`-fold; `low` and `high` are the ends of the interval."""

    line: float
    found: float
    low: float
    high: float


def applies_to(estimator: str) -> bool:
    """Whether Hessian norms say something about the rows of an estimator; in another norm they do not."""
    return estimator != NAME and "preconditioned" not in estimator


def check(
    beside: Rows,
    slope_ends: Interval,
    counts: Counts,
    line: Line,
    L1_interval: Interval,
    bounds: Interval,
    quantile: float,
    to_caller: Callable[[float], float],
) -> tuple[HessianCheck, Flag | None]:
    """What Hessian norms say about a line fitted to another estimator, and a flag if they contradict it.

    They contradict the line in one of three ways. They rise by less than half, or by more than one and a half, of what
    the line does (in logarithms, over the range that both cover). They rise where the line is flat. Or they lie above
    the line: the factor that would lift it above a share `quantile` of them is more than `FLAT`. In all three the
    whole interval has to say so. A secant is a lower bound of the largest curvature, so a constant factor between the
    two says nothing about the first and the second, which compare ratios.

    Args:
        beside: the Hessian norms, in the units of the fit.
        slope_ends: interval of the slope of their own line.
        counts: resamples of their rows.
        line: the fitted line.
        L1_interval: interval of its slope.
        bounds: 2.5% and 97.5% quantiles of the gradient norms of the fit.
        quantile: level of the line.
        to_caller: converts a smoothness into the units of the caller.
    """
    inside = (beside.x >= bounds[0]) & (beside.x <= bounds[1])
    if inside.sum() < MIN_POINTS or not (line(beside.x[inside]) > 0).all():
        coverage = float(np.mean(beside.y <= line(beside.x)))
        return HessianCheck(len(beside.x), coverage, slope_ends, None), None
    x, y, counts = beside.x[inside], beside.y[inside], counts[:, inside]
    height = line(x)
    covered = float(np.quantile(x, 0.025)), float(np.quantile(x, 0.975))
    coverage = float(np.mean(y <= height))
    lifts = resampled_quantile(y / height, quantile, with_all(counts))
    lift = float(lifts[-1])
    least_lift = percentile_interval(lifts[:-1], lift)[0]
    rising = has_slope(line, L1_interval, bounds)
    shape = _shape(np.log(height) if rising else np.log(x), np.log(y), counts, covered, line if rising else None)
    rank = rank_correlations(x, y, beside.step[inside])[0]
    cause = ""
    if rising and shape.line >= FLAT and shape.high < shape.line**HALF:
        cause = "the largest curvature hardly rises where the fitted rows do, so the line is no law of the Hessian norm"
    elif rising and shape.line >= FLAT and shape.low > shape.line ** (2 - HALF):
        cause = "the largest curvature rises more steeply than the fitted rows, so the line does not bound it"
    elif not rising and shape.low >= FLAT:
        cause = "the largest curvature rises with the gradient norm where the fitted rows do not"
    elif least_lift > FLAT:
        cause = "the Hessian norms lie above the line, which is meant to bound them"
    if cause:
        found = HessianCheck(int(inside.sum()), coverage, slope_ends, False)
        return found, _flag(cause, found, shape, lift, rank, quantile, to_caller(float(np.quantile(y, quantile))))
    if rising:
        covers = shape.line >= rises(line, bounds) ** HALF
        same = covers and shape.low > shape.line**HALF and shape.high < shape.line ** (2 - HALF)
        same = same and not correlate(x, y, beside.step[inside], beside.run[inside]).gone_within
    else:
        same = shape.high <= CONSTANT_RISE and covered[1] / covered[0] >= math.sqrt(bounds[1] / bounds[0])
    agrees = True if same and lift <= FLAT else None
    return HessianCheck(int(inside.sum()), coverage, slope_ends, agrees), None


def _shape(log_height: Array, log_y: Array, counts: Counts, covered: Interval, line: Line | None) -> _Shape:
    """Rise of the Hessian norms over the range covered, from a regression of logarithms on every resample."""
    scale = math.log(covered[1] / covered[0]) if line is None else math.log(max(rises(line, covered), 1.0))
    u, v = log_height, log_y
    found = sums(with_all(counts), np.stack([np.ones(len(u)), u, v, u**2, u * v], axis=1)).T
    mean_u, mean_v, mean_uu, mean_uv = found[1:] / np.maximum(found[0], 1.0)
    slopes = (mean_uv - mean_u * mean_v) / np.maximum(mean_uu - mean_u**2, 1e-18)
    slope = float(slopes[-1])
    u = log_height - np.mean(log_height)
    freedom = dependence(u * (log_y - np.mean(log_y) - slope * u)).num_effective - 2
    low, high = percentile_interval(slopes[:-1], slope, max(1.0, freedom))
    to_rise = [math.exp(min(max(value * scale, -700.0), 700.0)) for value in (slope, low, high)]
    return _Shape(math.exp(scale) if line is not None else 1.0, *to_rise)


def _flag(
    cause: str, found: HessianCheck, shape: _Shape, lift: float, rank: float, quantile: float, ceiling: float
) -> Flag:
    return Flag(
        "Hessian norms",
        cause,
        f"{found.coverage:.0%} of {found.num_rows} Hessian norms lie at or below the line, should be {quantile:.0%}, "
        f"which takes a line {lift:.3g} times as high. Over their range the line changes {shape.line:.3g}-fold and "
        f"they change {shape.found:.3g}-fold (interval {shape.low:.3g} to {shape.high:.3g}); their rank correlation "
        f"with the gradient norm is {number(rank)}",
        f'fit the Hessian norms themselves: fit_smoothness(data, estimator="{NAME}"). Until then one constant, '
        f"L = {ceiling:.4g}, bounds a share {quantile:g} of them, which allows rates up to 1/L = {1 / ceiling:.3g}",
        blocking=True,
    )
