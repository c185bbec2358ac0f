"""Outliers: values far above the values before them, and values that are too much alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

# Spikes: robust standard deviations above the median of the rows before, and the least excess over that median.
WINDOW, FEWEST = 50, 20
DEVIATIONS = 6.0
IQR_OF_NORMAL = 1.349  # the interquartile range of a normal distribution, in standard deviations
LEAST_RATIO, LEAST_RISE = 2.0, 0.1

# A pile: norms as close together as after clipping, rounding to float32 and printing with four digits.
PILE_WIDTH = 1e-3
PILE_SHARE, PILE_ROWS = 0.05, 5
PILE_REACH, PILE_DENSITY = 10, 3  # width of the neighbourhood on either side, and how much denser a pile is

SPIKE_RULE: Final = f"""\
  A spike lies more than {DEVIATIONS:g} robust standard deviations (interquartile range / {IQR_OF_NORMAL}) above the
  median of the {WINDOW} rows before it (at least {FEWEST}). Gradient norms are compared by their logarithm and must
  be at least {LEAST_RATIO:g} times the median. Losses must be at least {LEAST_RISE:.0%} above the median."""


@dataclass(frozen=True)
class Spike:
    """A value far above the values before it.

    Attributes:
        step: Step of the value, as in the log.
        column: ``grad_norm`` or ``loss``.
        value: What was logged.
        usual: Median of the rows before the spike.
    """

    step: int
    column: str
    value: float
    usual: float


def find_spikes(rows: pd.DataFrame, column: str) -> list[Spike]:
    """Returns the spikes of a column; gradient norms are compared by their logarithm."""
    is_norm = column == "grad_norm"
    value = rows[column].to_numpy(dtype=np.float64)
    keep = np.isfinite(value) & ((value > 0) if is_norm else True)
    value, step = value[keep], rows["step"].to_numpy()[keep]
    scale = pd.Series(np.log(value) if is_norm else value)
    before = scale.shift(1).rolling(WINDOW, min_periods=FEWEST)
    usual = before.median()
    deviation = (before.quantile(0.75) - before.quantile(0.25)) / IQR_OF_NORMAL
    least = pd.Series(np.full(len(value), math.log(LEAST_RATIO))) if is_norm else LEAST_RISE * usual.abs()
    far = (scale - usual > DEVIATIONS * deviation) & (scale - usual >= least)
    return [
        Spike(int(step[i]), column, float(value[i]), float(np.exp(usual[i]) if is_norm else usual[i]))
        for i in np.flatnonzero(far)
    ]


def find_pile(norm: Array) -> Mask:
    """Returns which norms make up a pile; none if there is no pile."""
    x = np.sort(norm[norm > 0])
    nothing = np.zeros(len(norm), dtype=np.bool_)
    if len(x) == 0:
        return nothing
    # The values are sorted, so the values within a width above each one follow it directly.
    counts = np.searchsorted(x, x * (1 + PILE_WIDTH), side="right") - np.arange(len(x))
    low = x[int(np.argmax(counts))]
    high = low * (1 + PILE_WIDTH)
    near = np.unique(x[(x >= low / 2) & (x <= 2 * low)])
    digit = float(np.diff(near).min()) if len(near) > 1 else 0.0  # the last digit of a rounded log
    reach = PILE_REACH * max(PILE_WIDTH * low, digit)
    beside = int(((x >= low - reach) & (x < low)).sum() + ((x > high) & (x <= high + reach)).sum())
    if counts.max() < max(PILE_ROWS, PILE_SHARE * len(norm)) or counts.max() <= PILE_DENSITY * beside:
        return nothing
    return np.asarray((norm >= low) & (norm <= high))
