"""Intervals under dependence: stationary block bootstrap over steps, block length and effective number of points.

Consecutive rows of a training run look alike, so n rows carry less than n rows' worth of information and
resampling them one by one gives intervals that are far too narrow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from smoothdiag.fits.affine import Line
from smoothdiag.fits.base import Array, Interval
from smoothdiag.fits.walk import TOUCHING, Neighbours

Counts = npt.NDArray[np.int16]

LEVEL = 0.9  # Share of the intervals that should contain the truth.
MIN_STEPS = 8  # Below this, resampling only repeats the rows at hand and its intervals mean nothing.


@dataclass(frozen=True)
class Dependence:
    """How long a run remembers.

    Attributes:
        block_length: mean block length for the stationary bootstrap, in rows.
        num_effective: independent rows that would be as informative as the rows given.
    """

    block_length: float
    num_effective: float


def dependence(series: Array) -> Dependence:
    """Block length and effective number of points of one series, by the automatic rule for the stationary bootstrap.

    The rule estimates the spectral density at zero and its curvature with a flat-top lag window whose width is
    twice the lag after which the autocorrelations are indistinguishable from zero.

    Args:
        series: values in order of time.

    Returns:
        Dependence: with block length 1 and every point counted where the series is constant.

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
    block = (curvature**2 / spectrum**2) ** (1 / 3) * n ** (1 / 3)
    return Dependence(min(max(block, 1.0), longest), min(max(n * variance / spectrum, 1.0), float(n)))


def line_dependence(x: Array, y: Array, weights: Array, line: Line, quantile: float, steps: Array) -> Dependence:
    """Dependence of the quantities that a quantile line averages; the slowest of them counts.

    These are the two scores of the fit (weighted above-or-below signs, alone and times the gradient norm) and the
    logarithmic distance from the line.

    Args:
        x: gradient norms in order of steps.
        y: smoothness.
        weights: weight of each row.
        line: the fitted line.
        quantile: its level.
        steps: step of each row; rows of one step count as one.
    """
    height = np.maximum(line(x), np.finfo(np.float64).tiny)
    off = np.abs(y - height) > TOUCHING * (y + height)  # On the line, above or below would be decided by rounding.
    score = np.where(off, weights * (quantile - (y < height)), 0.0)
    distance = np.where(off, np.log(y / height), 0.0)
    _, codes = np.unique(steps, return_inverse=True)
    size = np.bincount(codes)
    series = [np.bincount(codes, weights=values) / size for values in (score, score * x, distance)]
    found = [dependence(values) for values in series]
    return Dependence(max(d.block_length for d in found), min(d.num_effective for d in found))


def stationary_counts(steps: Array, block_length: float, num_boot: int, seed: int) -> Counts:
    """How often each row occurs in each resample of blocks of steps.

    Blocks start anywhere, have geometric lengths with mean `block_length` and wrap around at the end. Rows of one
    step stay together.

    Args:
        steps: step of each row.
        block_length: mean block length in steps, at least 1.
        num_boot: number of resamples.
        seed: the same seed gives the same resamples.

    Returns:
        Counts: shape (num_boot, rows).

    Source: Politis and Romano, 1994, the stationary bootstrap.
    """
    rng = np.random.default_rng(seed)
    _, codes = np.unique(steps, return_inverse=True)
    n = int(codes.max()) + 1
    counts = np.empty((num_boot, len(steps)), dtype=np.int16)
    position = np.arange(n)
    for replicate in range(num_boot):
        starts_block = rng.random(n) < 1 / block_length
        starts_block[0] = True
        begin = np.maximum.accumulate(np.where(starts_block, position, 0))
        drawn = (rng.integers(0, n, size=n)[begin] + position - begin) % n
        counts[replicate] = np.bincount(drawn, minlength=n)[codes]
    return counts


def bootstrap_lines(x: Array, y: Array, weights: Array, line: Line, quantile: float, counts: Counts) -> Array:
    """The quantile line of every resample, as rows (intercept, slope).

    A resample is a change of weights, so each replicate starts its walk at the line of the whole sample.

    Args:
        x: gradient norms.
        y: smoothness.
        weights: weight of each row in the fit, held fixed over the resamples.
        line: the line of the whole sample.
        quantile: its level.
        counts: from `stationary_counts`.

    Units: columns [f/x^2] and [1/x].
    """
    x_unit, y_unit = float(np.median(x)), float(np.median(y))
    begin = line.intercept / y_unit, line.slope * x_unit / y_unit
    rows = Neighbours(x / x_unit, y / y_unit, begin)
    found = [rows.walk(quantile, weights * row, begin) for row in counts]
    return np.array(found) * (y_unit, y_unit / x_unit)


def percentile_interval(replicates: Array, estimate: float | None = None) -> Interval:
    """Central interval of the replicates at `LEVEL`, widened to contain the estimate it belongs to."""
    low, high = np.quantile(replicates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    if estimate is not None:
        low, high = min(low, estimate), max(high, estimate)
    return float(low), float(high)
