"""Outliers: values far above the values before them, and values that are too much alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from smoothdiag.spiking import Array, Mask, SpikeRule

RULE = SpikeRule()
"""What a spike is: the rule that `SpikeGuard` goes by, too."""

# A pile: norms as close together as after clipping, rounding to float32 and printing with four digits.
PILE_WIDTH = 1e-3
PILE_SHARE, PILE_ROWS = 0.05, 5
PILE_REACH, PILE_DENSITY = 10, 3  # width of the neighbourhood on either side, and how much denser a pile is


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
    values, step = rows[column].to_numpy(dtype=np.float64), rows["step"].to_numpy()
    far, usual = RULE.find(values, is_norm=column == "grad_norm")
    return [Spike(int(step[i]), column, float(values[i]), float(usual[i])) for i in np.flatnonzero(far)]


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
