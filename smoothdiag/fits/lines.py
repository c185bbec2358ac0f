"""The quantile line of the rows of a fit with its resamples and intervals, and the way back to the caller's units."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from smoothdiag.fits import affine, intervals, lossgap, resamples
from smoothdiag.fits.base import Array, Correction, Interval, ModelScore
from smoothdiag.fits.ranges import ldexp
from smoothdiag.fits.rows import Rows


@dataclass(frozen=True)
class Scale:
    """Converts results for rows in units of powers of two back into the units of the caller."""

    x: int
    y: int

    def intercept(self, value: float) -> float:
        """An intercept, a height or another smoothness."""
        return ldexp(value, self.y)

    def slope(self, value: float) -> float:
        """A slope."""
        return ldexp(value, self.y - self.x)

    def correction(self, found: Correction | None) -> Correction | None:
        """Corrected constants."""
        if found is None:
            return None
        return replace(found, L0=self.intercept(found.L0), L1=self.slope(found.L1))

    def score(self, score: ModelScore) -> ModelScore:
        """The constants of a model."""
        power = 0.0 if score.name == lossgap.NAME else score.exponent  # Losses are in the units of the caller.
        with np.errstate(over="ignore", under="ignore"):  # A coefficient may have units beyond what a float holds.
            factor = float(np.exp2(self.y - self.x * power))
        coefficient = score.coefficient * factor if score.coefficient else 0.0
        return replace(score, intercept=self.intercept(score.intercept), coefficient=coefficient)


@dataclass(frozen=True)
class QuantileFit:
    """A quantile line with the resamples and numbers from which its intervals come."""

    line: affine.Line
    weights: Array
    memory: intervals.Dependence
    counts: resamples.Counts
    replicates: Array
    freedom: float
    L0_interval: Interval = (0.0, math.inf)
    L1_interval: Interval = (0.0, math.inf)


def quantile_fit(rows: Rows, quantile: float, num_boot: int, seed: int) -> QuantileFit:
    """The line, and its intervals if there are enough steps to resample."""
    x, y = rows.x, rows.y
    weights = affine.relative_weights(x, y)
    line = affine.quantile_line(x, y, quantile, weights)
    memory = intervals.line_dependence(x, y, weights, line, quantile, rows.step, rows.run)
    freedom = intervals.degrees_of_freedom(memory, quantile, rows.num_runs)
    counts = resamples.stationary_counts(rows.step, memory.block_length, num_boot, seed, rows.run)
    if rows.num_steps < intervals.MIN_STEPS:
        return QuantileFit(line, weights, memory, counts, np.zeros((0, 2)), freedom)
    replicates = intervals.bootstrap_lines(x, y, weights, line, quantile, counts)
    return QuantileFit(
        line,
        weights,
        memory,
        counts,
        replicates,
        freedom,
        *intervals.line_intervals(x, y, weights, line, quantile, counts, replicates, freedom),
    )
