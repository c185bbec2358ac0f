"""Fits of scans: the law along lines out of one checkpoint, on one batch, where neither time nor rate can be a cause.

Lines are the independent units: they are resampled whole, and models are scored on lines that they were not fitted to.
The distance from the starting point, which grows along every line, is a rival. Imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd

from smoothdiag.fits import affine, hull, intervals
from smoothdiag.fits.base import Array, Interval, ModelScore, SmoothnessFit
from smoothdiag.fits.correlations import decades, loglog_slope, rank_correlations
from smoothdiag.fits.lines import Scale
from smoothdiag.fits.rows import follows_gradients, optimizer_of
from smoothdiag.fits.scans import deciding, doubts
from smoothdiag.fits.scans.lines import Lines, has_lines, select_lines
from smoothdiag.fits.scans.rivals import DISTANCE, fit_all
from smoothdiag.fits.scans.shapes import lift

__all__ = ["fit_lines", "has_lines"]

NUM_KEPT = 200  # Resamples that a fit keeps, as for runs.


def fit_lines(
    frame: pd.DataFrame,
    estimator: str | None,
    group: str,
    quantile: float,
    num_boot: int,
    seed: int,
    path: tuple[float, ...],
) -> SmoothnessFit:
    """Fits smoothness <= L0 + L1 * grad_norm to the points of a scan.

    The shape of the line, L0 / L1, is that of the median: least squares of log smoothness over all points. Then both
    constants are multiplied by one factor, so that a share `quantile` of the points lies at or below the line. This
    assumes that smoothness scatters around its median by the same factor at all gradient norms (a scale model); the
    flag "scatter" tests it.

    Args:
        frame: the points.
        estimator: name of the estimator; None prefers "hessian_norm".
        group: parameter group.
        quantile: share of the points that should lie at or below the line.
        num_boot: number of resamples of the lines.
        seed: seed of the resampling.
        path: quantiles of further lines.

    Raises:
        ValueError: if the table does not hold one scan, or no point of it is usable.

    Source: Koenker, 2005, section 3.2, the location-scale shift, for reading quantiles off the residuals; Davison and
        Hinkley, 1997, section 3.8, for resampling clusters.
    """
    recorded, lines = select_lines(frame, estimator, group)
    scale = Scale(*recorded.units())
    rows, x, target = lines.rows, lines.rows.x, np.log(lines.rows.y)
    counts = lines.resamples(num_boot, seed)
    everything = np.ones((1, len(x)))
    fitted = fit_all(lines, counts)
    freedom = max(1.0, lines.num_units - 1.0)
    enough = lines.num_units >= doubts.MIN_LINES

    rest = (target - fitted.line.heights(fitted.line_at))[0]
    L0, L1 = _lifted(fitted.line.constants(fitted.line_at), lift(rest[None], everything, quantile))[0]
    again = target - fitted.line.heights(fitted.line_again)
    replicates = _lifted(fitted.line.constants(fitted.line_again), lift(again, counts, quantile))

    def ends(values: Array, estimate: float, widest: Interval = (0.0, math.inf)) -> Interval:
        return intervals.percentile_interval(values, estimate, freedom) if enough else widest

    L0_interval, L1_interval = ends(replicates[:, 0], float(L0)), ends(replicates[:, 1], float(L1))
    bounds = (float(np.quantile(x, 0.025)), float(np.quantile(x, 0.975)))
    exponents, exponent = (fitted.power.constants(f)[2] for f in (fitted.power_again, fitted.power_at))
    exponent_interval = ends(exponents, float(exponent[0]), (math.nan, math.nan))
    both = [
        ends(grid.rise(resampled, *bounds), float(grid.rise(at, *bounds)[0]), (1.0, math.inf))
        for grid, resampled, at in (
            (fitted.line, fitted.line_again, fitted.line_at),
            (fitted.power, fitted.power_again, fitted.power_at),
        )
    ]
    rise = min(low for low, _ in both), max(high for _, high in both)
    rising = deciding.rises(fitted, L1_interval, bounds)
    raw, partial = rank_correlations(x, rows.y, lines.distance)
    flags = doubts.check(lines, fitted, rest, quantile, rising, raw)
    departure = ends(deciding.departures(fitted, bounds), 1.0)[1]
    where = deciding.farthest(lines)
    verdict, reason = deciding.decide(flags, fitted, bounds, rise, exponent_interval, departure, rising, where)

    corners = hull.upper_hull(x, rows.y)
    slopes, intercepts = affine.frontier(corners)
    weights = affine.relative_weights(x, rows.y)
    levels = {f"{q:g}": lift(rest[None], everything, q) for q in path}
    constants = fitted.line.constants(fitted.line_at)
    other = {name: _lifted(constants, level)[0] for name, level in levels.items()}
    other |= {"hard": affine.hard_envelope(x, rows.y, weights, corners), "mean": affine.least_squares(x, rows.y)}
    height = L0 + L1 * x
    return SmoothnessFit(
        L0=scale.intercept(float(L0)),
        L1=scale.slope(float(L1)),
        L0_interval=(scale.intercept(L0_interval[0]), scale.intercept(L0_interval[1])),
        L1_interval=(scale.slope(L1_interval[0]), scale.slope(L1_interval[1])),
        interval_level=intervals.LEVEL,
        quantile=float(quantile),
        num_points=len(x),
        num_effective=_effective(rest, lines),
        block_length=float(np.mean(np.bincount(lines.line[lines.line >= 0]))),
        decades=decades(x),
        spearman=raw,
        partial_spearman=partial,
        loglog_slope=loglog_slope(x, rows.y),
        implied_slope=loglog_slope(x, height) if L1 > 0 else 0.0,
        coverage=float(np.mean(rows.y <= height * (1 + 1e-9))),
        median_saturation=math.nan,
        lines={name: (scale.intercept(float(a)), scale.slope(float(b))) for name, (a, b) in other.items()},
        comparison=tuple(_in_units(scale, score) for score in fitted.scores),
        flags=flags,
        verdict=verdict,
        verdict_reason=reason,
        estimator=rows.estimator,
        group=rows.group,
        data=rows.data,
        dropped=rows.dropped,
        grad_norm_quantiles=tuple(np.quantile(rows.recorded, np.linspace(0, 1, 101)).tolist()),
        corners=tuple((scale.slope(b), scale.intercept(a)) for b, a in zip(slopes, intercepts, strict=True)),
        loss_floors=tuple(_in_units(scale, score) for score in fitted.floors),
        interval_freedom=freedom,
        replicates=tuple((scale.intercept(a), scale.slope(b)) for a, b in replicates[:NUM_KEPT].tolist() if enough),
        optimizer=optimizer_of(frame),
        follows_gradients=follows_gradients(frame),
        exponent_interval=exponent_interval,
        spread=float(np.std(rest)),
        row_cost=rows.cost,
        num_scans=lines.num_lines,
    )


def _lifted(constants: tuple[Array, Array, Array], level: Array) -> Array:
    """Intercept and slope of each resample times the factor of its quantile; shape (resamples, 2)."""
    return np.stack(constants[:2], axis=1) * np.exp(level)[:, None]


def _in_units(scale: Scale, score: ModelScore) -> ModelScore:
    if score.name != DISTANCE:
        return scale.score(score)
    # Distances are in the units of the caller already, so the coefficient has the units of a smoothness.
    return replace(scale.score(replace(score, exponent=0.0)), exponent=score.exponent)


def _effective(rest: Array, lines: Lines) -> float:
    """Independent points with the same information, from how alike the points of one line are.

    Source: Kish, 1965, section 5.4, the design effect; Donner and Koval, 1980, the analysis of variance estimator.
    """
    on_line = lines.line >= 0
    values, line = rest[on_line], lines.line[on_line]
    sizes = np.bincount(line)
    n, k = len(values), lines.num_lines
    if n <= k or k < 2:
        return float(k)
    means = np.bincount(line, weights=values) / sizes
    inner = float(np.sum((values - means[line]) ** 2)) / (n - k)
    outer = float(np.sum(sizes * (means - np.mean(values)) ** 2)) / (k - 1)
    size = (n - float(np.sum(sizes**2)) / n) / (k - 1)
    total = outer + (size - 1) * inner
    alike = (outer - inner) / total if total > 0 else 0.0
    return float(np.clip(n / (1 + (size - 1) * max(alike, 0.0)), k, n))
