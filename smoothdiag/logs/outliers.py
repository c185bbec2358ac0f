"""Outliers: values far above the values before them, and values that are too much alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from smoothdiag.spiking import Array, Mask, SpikeRule

RULE = SpikeRule()
"""What a spike is: the rule that `SpikeGuard` goes by, too."""

PART = 1 << 18  # values that are looked at together, so that millions of them take little memory

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


def find_spikes(step: npt.NDArray[Any], value: npt.NDArray[Any], column: str) -> list[Spike]:
    """Returns the spikes of a column in the order of steps; gradient norms are compared by their logarithm."""
    is_norm = column == "grad_norm"
    keep = np.isfinite(value) & ((value > 0) if is_norm else True)
    if not keep.any():
        return []
    if not keep.all():
        value, step = value[keep], step[keep]
    found: list[Spike] = []
    for begin in range(0, len(value), PART):
        # Windows reach into the part before.
        start = max(begin - RULE.window, 0)
        part = value[start : begin + PART]
        far, usual = RULE.find(part, is_norm=is_norm)
        found += [
            Spike(int(step[start + i]), column, float(part[i]), float(usual[i]))
            for i in np.flatnonzero(far)
            if start + i >= begin
        ]
    return found


def find_pile(norm: Array) -> Mask:
    """Returns which norms make up a pile; none if there is no pile."""
    x = norm[norm > 0]
    x.sort()
    nothing = np.zeros(len(norm), dtype=np.bool_)
    if len(x) == 0:
        return nothing
    # The values are sorted, so the values within a width above each one follow it directly.
    most, densest = 0, 0
    for begin in range(0, len(x), PART):
        part = x[begin : begin + PART]
        counts = np.searchsorted(x, part * (1 + PILE_WIDTH), side="right") - np.arange(begin, begin + len(part))
        if (count := int(counts.max())) > most:
            most, densest = count, begin + int(np.argmax(counts))
    low = float(x[densest])
    high = low * (1 + PILE_WIDTH)
    # Bounds in the type of the norms: numpy would convert all norms to the type of the bounds.
    begin, end = np.searchsorted(x, np.array([low / 2, 2 * low], dtype=x.dtype))
    digit = _least_gap(x[begin:end])  # the last digit of a rounded log
    reach = PILE_REACH * max(PILE_WIDTH * low, digit)
    beside = int(((x >= low - reach) & (x < low)).sum() + ((x > high) & (x <= high + reach)).sum())
    if most < max(PILE_ROWS, PILE_SHARE * len(norm)) or most <= PILE_DENSITY * beside:
        return nothing
    return np.asarray((norm >= low) & (norm <= high))


def _least_gap(x: Array) -> float:
    """Returns the least distance of two different values that are sorted; 0 if there are no two."""
    least = math.inf
    for begin in range(0, len(x), PART):
        gaps = np.diff(x[begin : begin + PART + 1])
        least = min(least, float(gaps[gaps > 0].min(initial=math.inf)))
    return least if math.isfinite(least) else 0.0
