"""Intervals under dependence: stationary block bootstrap over steps, block length and effective number of points.

Neighbouring rows of a training run look alike, so n rows carry less information than n independent rows, and
resampling them one by one gives intervals that are far too narrow. Where there are several runs (seeds), whole runs are
resampled first, and blocks of steps within each of them second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm, t

from smoothdiag.fits.affine import Line
from smoothdiag.fits.base import Array, Flag, Interval
from smoothdiag.fits.resamples import Codes, Counts, parts_of, resampled_quantile
from smoothdiag.fits.walk import TOUCHING, Neighbours

LEVEL = 0.9  # Share of the intervals that should contain the truth.
MIN_STEPS = 8  # With fewer steps resampling only repeats the rows at hand, and its intervals mean nothing.
RESOLVED = 1e-7  # Relative difference of smoothness that is rounding in single precision.
FEW_RUNS = 5  # With fewer runs it is hardly known how much runs differ.


@dataclass(frozen=True)
class Dependence:
    """How long the rows of a run stay alike.

    Attributes:
        block_length: mean block length for the stationary bootstrap, in rows.
        num_effective: number of independent rows that carry as much information as the given rows.
    """

    block_length: float
    num_effective: float


def dependence(series: Array) -> Dependence:
    """Block length and effective number of points of one series, by the automatic rule for the stationary bootstrap.

    The rule estimates the spectral density at zero and its curvature with a flat-top lag window. The window is twice as
    wide as the lag after which the autocorrelations cannot be told from zero.

    Args:
        series: values in order of time.

    Returns:
        Dependence: for a constant series the block length is 1 and every point counts.

    Source: Politis and White, 2004, with the correction of Patton, Politis and White, 2009.
    """
    n = len(series)
    centred = series - np.mean(series)
    variance = float(np.mean(centred**2))
    if n < MIN_STEPS or not variance > 1e-24 * float(np.mean(series**2)):
        return Dependence(1.0, float(n))
    run = max(5, math.ceil(math.sqrt(math.log10(n))))  # K_n of the paper.
    max_lag = min(n - 1, math.ceil(math.sqrt(n)) + run)
    size = 2 ** math.ceil(math.log2(2 * n))
    power = np.abs(np.fft.rfft(centred, size)) ** 2
    covariance = np.fft.irfft(power, size)[: max_lag + 1] / n
    negligible = np.abs(covariance[1:] / variance) < 2 * math.sqrt(math.log10(n) / n)
    cutoff = next((lag for lag in range(max_lag - run + 1) if negligible[lag : lag + run].all()), None)
    if cutoff is None:
        cutoff = int(np.flatnonzero(~negligible)[-1]) + 1
    bandwidth = min(2 * max(cutoff, 1), max_lag)
    lags = np.arange(1, bandwidth + 1)
    window = np.clip(2 * (1 - lags / bandwidth), 0.0, 1.0)
    spectrum = variance + 2 * float(window @ covariance[1 : bandwidth + 1])
    curvature = 2 * float(window @ (lags * covariance[1 : bandwidth + 1]))
    longest = math.ceil(min(3 * math.sqrt(n), n / 3))
    if spectrum <= 0:
        return Dependence(1.0, float(n))
    block = (abs(curvature) / spectrum) ** (2 / 3) * n ** (1 / 3)
    return Dependence(min(max(block, 1.0), longest), min(max(n * variance / spectrum, 1.0), float(n)))


def line_dependence(
    x: Array, y: Array, weights: Array, line: Line, quantile: float, steps: Array, runs: Array | None = None
) -> Dependence:
    """Dependence of the quantities that a quantile line averages; the slowest of them counts.

    These quantities are the two scores of the fit (weighted above-or-below signs, alone and times the gradient norm)
    and the logarithmic distance from the line. Each run is a series of its own. Where the means of the runs differ by
    more than the variation within the runs explains, this difference sets the effective number.

    Args:
        x: gradient norms in order of steps.
        y: smoothness.
        weights: weight of each row.
        line: the fitted line.
        quantile: level of the line.
        steps: step of each row; rows of one step of one run count as one.
        runs: number of the run of each row; None if there is one run.
    """
    height = np.maximum(line(x), np.finfo(np.float64).tiny)
    off = np.abs(y - height) > TOUCHING * (y + height)  # For rows on the line, rounding would decide above or below.
    score = np.where(off, weights * (quantile - (y < height)), 0.0)
    distance = np.where(off, np.log(y / height), 0.0)
    parts = parts_of(steps, runs)
    found = [_pooled([_means(values[rows], codes) for rows, codes in parts]) for values in (score, score * x, distance)]
    return Dependence(max(d.block_length for d in found), min(d.num_effective for d in found))


def _means(values: Array, codes: Codes) -> Array:
    return np.asarray(np.bincount(codes, weights=values) / np.bincount(codes))


def _pooled(series: list[Array]) -> Dependence:
    """Dependence of one quantity over all runs."""
    found = [dependence(values) for values in series]
    size = np.array([len(values) for values in series], dtype=np.float64)
    block_length = float(np.average([d.block_length for d in found], weights=size))
    num_effective = sum(d.num_effective for d in found)
    if len(series) > 1:
        pooled = np.concatenate(series)
        share = size / np.sum(size)
        means = np.array([np.mean(values) for values in series])
        between = len(series) / (len(series) - 1) * float(np.sum(share**2 * (means - np.mean(pooled)) ** 2))
        variance = float(np.var(pooled))
        if between * num_effective > variance > 1e-24 * float(np.mean(pooled**2)):
            num_effective = max(variance / between, 1.0)
    return Dependence(block_length, num_effective)


def bootstrap_lines(x: Array, y: Array, weights: Array, line: Line, quantile: float, counts: Counts) -> Array:
    """The quantile line of every resample, as rows (intercept, slope).

    A resample only changes the weights, so each replicate starts its walk at the line of the whole sample.

    Args:
        x: gradient norms.
        y: smoothness.
        weights: weight of each row in the fit, held fixed over the resamples.
        line: the line of the whole sample.
        quantile: level of the line.
        counts: from `resamples.stationary_counts`.

    Units: columns [f/x^2] and [1/x].
    """
    x_unit, y_unit = float(np.median(x)), float(np.median(y))
    begin = line.intercept / y_unit, line.slope * x_unit / y_unit
    rows = Neighbours(x / x_unit, y / y_unit, begin)
    return rows.walk_all(quantile, weights, counts, begin) * (y_unit, y_unit / x_unit)


def degrees_of_freedom(memory: Dependence, quantile: float, num_runs: int = 1) -> float:
    """How many independent numbers the spread of the line is estimated from, at least 1.

    For a quantile these are the effective rows on its rarer side. With several runs the number is at most the number of
    runs minus one.
    """
    beyond = min(quantile, 1 - quantile) * memory.num_effective
    return max(1.0, min(beyond, num_runs - 1) if num_runs > 1 else beyond)


def percentile_interval(replicates: Array, estimate: float | None = None, freedom: float = math.inf) -> Interval:
    """Central interval of the replicates at `LEVEL`, widened to contain the estimate from the whole sample.

    A spread that is estimated from a few numbers comes out too small too often. So the percentiles move outwards as far
    as the percentiles of Student's t do: from .95 to .956 with 30 degrees of freedom, to .992 with 3.

    Args:
        replicates: values of one constant, from `bootstrap_lines`.
        estimate: the constant from the whole sample.
        freedom: from `degrees_of_freedom`.
    """
    tail = float(norm.sf(t.isf((1 - LEVEL) / 2, freedom)))
    low, high = np.quantile(replicates, [tail, 1 - tail])
    if estimate is not None:
        low, high = min(low, estimate), max(high, estimate)
    return float(low), float(high)


def line_intervals(
    x: Array,
    y: Array,
    weights: Array,
    line: Line,
    quantile: float,
    counts: Counts,
    replicates: Array,
    freedom: float = math.inf,
) -> tuple[Interval, Interval]:
    """Intervals of intercept and slope that hold every split of the height of the line which the rows leave open.

    Rows at one gradient norm fix the height of a line there, and not how it splits into intercept and slope. A fit
    returns one of these lines, and so does every resample. So each of them is turned about the middle of the gradient
    norms, both ways, until its height changes by `RESOLVED` at the ends or one constant is zero.

    Over a short range noise turns the lines of the resamples, and many end at an intercept or a slope of zero. An
    interval that admits an intercept of zero then has to admit the slopes of lines through the origin, and one that
    admits a slope of zero the heights of constants.

    Args:
        x: gradient norms.
        y: smoothness.
        weights: weight of each row in the fit.
        line: the line of the whole sample.
        quantile: level of the line.
        counts: from `resamples.stationary_counts`.
        replicates: from `bootstrap_lines`.
        freedom: from `degrees_of_freedom`.

    Units: the intervals of L0 [f/x^2] and of L1 [1/x].
    """
    low, high = float(np.min(x)), float(np.max(x))
    middle, half = (low + high) / 2, (high - low) / 2
    lines = np.vstack([replicates, line])
    height = lines[:, 0] + lines[:, 1] * middle
    turn = RESOLVED * height / half if half > RESOLVED**2 * middle else np.full(len(lines), np.inf)
    slopes = np.maximum(lines[:, 1] - turn, 0.0), np.minimum(lines[:, 1] + turn, height / middle)
    intercepts = np.maximum(height - slopes[1] * middle, 0.0), np.maximum(height - slopes[0] * middle, 0.0)
    (L0_low, L0_high), (L1_low, L1_high) = (
        (percentile_interval(least[:-1], value, freedom)[0], percentile_interval(most[:-1], value, freedom)[1])
        for (least, most), value in zip((intercepts, slopes), line, strict=True)
    )
    if L0_low <= 0:
        L1_high = max(L1_high, percentile_interval(resampled_quantile(y / x, quantile, counts, weights * x))[1])
    if L1_low <= 0:
        L0_high = max(L0_high, percentile_interval(resampled_quantile(y, quantile, counts, weights))[1])
    return (L0_low, L0_high), (L1_low, L1_high)


def few_runs(num_runs: int) -> Flag | None:
    """Whether there are several runs, but too few to say how much runs differ."""
    if not 1 < num_runs < FEW_RUNS:
        return None
    return Flag(
        "few runs",
        "so few runs hardly show how much L0 and L1 differ from run to run. The intervals describe these runs, and may "
        "miss the constants of another run more often than their level says",
        f"{num_runs} runs, should be at least {FEW_RUNS}",
        "add runs that differ only in their seed",
    )
