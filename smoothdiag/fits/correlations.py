"""Rank correlations of gradient norm and smoothness: over all rows, and with time or another cause held fixed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from smoothdiag.fits.base import Array
from smoothdiag.fits.rows import Indices, step_blocks

TIED_TO_TIME = 0.98  # Rank correlation with the step above which time cannot be held fixed.
TIME_BLOCKS = 12
MIN_BLOCK = 8  # Rows that a block of steps needs before a correlation within it means something.
# With an autocorrelation of .98 from row to row, true laws have a median correlation of .7 within blocks, and hardly
# ever less than this.
MIN_WITHIN = 0.25
MIN_DECADES = 1.0
MIN_CORRELATION = 0.2  # Rank correlation below which there is no relation that a common cause would have to explain.


@dataclass(frozen=True)
class Correlations:
    """Rank correlations of gradient norm and smoothness; NaN if one of the two does not vary.

    Attributes:
        raw: over all rows.
        partial: with the effect of the step taken out; also NaN if one of the two follows the step so closely that
            nothing is left to correlate.
        within: pooled over blocks of steps, so that a drift from block to block has no effect.
        within_given_time: as `within`, with the effect of the step taken out inside each block.
        critical: value that `within_given_time` exceeds by chance in one of a hundred runs.
    """

    raw: float
    partial: float
    within: float = 1.0
    within_given_time: float = 1.0
    critical: float = 0.0

    @property
    def gone_within(self) -> bool:
        """Whether hardly any of the relation is left within blocks."""
        half = self.raw / 2
        return self.within < min(MIN_WITHIN, half) or self.within_given_time < min(self.critical, half)


def correlate(x: Array, y: Array, step: Array, run: Array) -> Correlations:
    """All rank correlations of the rows, in any order."""
    blocks = step_blocks(step, run, min(TIME_BLOCKS, max(len(x) // MIN_BLOCK, 1)))
    return Correlations(*rank_correlations(x, y, step), *within_blocks(x, y, blocks))


def within_blocks(x: Array, y: Array, blocks: list[Indices]) -> tuple[float, float, float]:
    """The last three fields of `Correlations`, for blocks whose rows are in the order of what is held fixed."""
    ranks, rests = [], []
    for block in blocks:
        centred = np.stack([rankdata(values[block]) - (len(block) + 1) / 2 for values in (x, y)])
        time = np.arange(len(block)) - (len(block) - 1) / 2
        ranks.append(centred)
        rests.append(centred - np.outer(centred @ time, time) / max(float(time @ time), 1.0))
    within, given_time = (_pooled(np.concatenate(parts, axis=1)) for parts in (ranks, rests))
    # The mean and the trend of each block cost two degrees of freedom; 2.3 is the normal 99% quantile.
    num_rows = sum(map(len, blocks))
    return 0.0 if np.isnan(within) else within, given_time, 2.3 / math.sqrt(max(num_rows - 2 * len(blocks), 1))


def _pooled(pairs: Array) -> float:
    size = float(np.sqrt(np.prod(np.sum(pairs**2, axis=1))))
    return float(pairs[0] @ pairs[1] / size) if size > 1e-9 * pairs.shape[1] else np.nan


def rank_correlations(x: Array, y: Array, time: Array) -> tuple[float, float]:
    """Rank correlation of x and y, and their rank correlation with the effect of time taken out.

    Returns:
        tuple[float, float]: both NaN if x or y is constant. The second is also NaN if x or y follows time so
        closely that nothing is left to correlate.
    """
    ranks = [rankdata(values) - (len(values) + 1) / 2 for values in (x, y, time)]
    xy, xt, yt = (_correlation(ranks[i], ranks[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    if np.isnan(xy) or np.isnan(xt):
        return xy, xy
    if max(abs(xt), abs(yt)) > TIED_TO_TIME:
        return xy, np.nan
    return xy, float((xy - xt * yt) / np.sqrt((1 - xt**2) * (1 - yt**2)))


def _correlation(u: Array, v: Array) -> float:
    size = np.sqrt(float(u @ u) * float(v @ v))
    return float(u @ v / size) if size > 0 else np.nan


def decades(x: Array) -> float:
    """Powers of ten between the 2.5% and the 97.5% quantile."""
    low, high = np.quantile(x, [0.025, 0.975])
    return float(np.log10(high / low))


def loglog_slope(x: Array, y: Array) -> float:
    """Least-squares slope of log y on log x; NaN if x is constant."""
    u, v = np.log(x), np.log(y)
    u, v = u - np.mean(u), v - np.mean(v)
    spread = float(u @ u)
    return float(u @ v / spread) if spread > 1e-20 * len(x) else np.nan
