"""Outliers: values far above the values before them, and values that are too much alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from smoothdiag.spiking import Reading, SpikeRule
from smoothdiag.tails import Array, Mask

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


def find_spikes(step: npt.NDArray[Any], grad_norm: npt.NDArray[Any], loss: npt.NDArray[Any]) -> list[Spike]:
    """Returns the spikes of gradient norms and losses, in the order of steps; norms are compared by their logarithm."""
    found: list[Spike] = []
    columns = {"grad_norm": grad_norm, "loss": loss}
    digits = [
        _least_gap(np.sort(each[np.isfinite(each)])) for each in columns.values()
    ]  # the last digit of rounded logs
    reading = Reading(RULE, [True, False], digits)
    for begin in range(0, len(step), PART):
        parts = {name: each[begin : begin + PART] for name, each in columns.items()}
        for (name, part), (far, usual) in zip(parts.items(), reading.take(*parts.values()), strict=True):
            rows = np.flatnonzero(far)
            found += [Spike(int(step[begin + i]), name, float(part[i]), float(usual[i])) for i in rows]
    return sorted(found, key=lambda spike: spike.step)


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
