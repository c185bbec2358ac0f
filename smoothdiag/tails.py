"""Tails: how far values lie from those before them, and from where on a distance is rare."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.intp]

QUANTILES: Final = (0.1, 0.25, 0.5, 0.75, 0.9)
"""The quantiles of the values before that say what is usual."""

RANGES_OF_NORMAL: Final = (1.349, 2.563)
"""Interquartile and interdecile range of a normal distribution, in standard deviations."""

ROUNDING: Final = 4 * 2.0**-23
"""How far losses in float32 may scatter by rounding, as a share of the largest usual loss so far."""

TAIL: Final = 0.05
"""The share of the distances that counts as their tail."""

FEWEST_OF_TAIL: Final = 10
"""With fewer distances in the tail, nobody knows what is rare."""

FAR_FROM_ALL: Final = 2.0
"""A distance this many times as large as all of the last ones is rare, whatever their tail is."""

FREQUENT: Final = 3
"""As many events among the last distances make it usual to come as far."""

AFTERMATH: Final = 5
"""So many steps after a far step, a further one belongs to the same event."""

DEGREES: Final = 0.63
"""Degrees of freedom of a robust deviation, per value that it is made of: with these, normal values that are compared
with the quantiles of `SpikeRule` have the tail of Student's t; `tests/spikes/test_spike_modules.py` simulates it."""


def raised(deviations: float, values: int, window: int, number: int = 1) -> float:
    """Returns the distance at which each of many signals is as rare as one at ``deviations``, divided by their number.

    The deviation of a window is a guess, and now and then it is too small, the more so the fewer values it has. So
    large distances are more frequent than a normal distribution has them: as frequent as Student's t with nu degrees of
    freedom, whose tail falls with (1 + d^2 / nu)^(-(nu + 1) / 2). By the bound of Bonferroni the signals together then
    seldom fire by chance, however they depend on each other.

    Args:
        deviations: Distance asked of one signal when the window is full.
        values: Number of values in the window.
        window: Number of values in a full window.
        number: Number of signals.
    """
    full, nu = DEGREES * window, DEGREES * max(values, 1)
    exponent = (full + 1) * math.log1p(deviations**2 / full) + 2 * math.log(number)
    return math.sqrt(nu * math.expm1(min(exponent / (nu + 1), 600.0)))


def trusted(deviations: float, window: int, number: int = 1) -> list[float]:
    """Returns, for each number of values up to a full window, how much of a distance counts, see `raised`."""
    return [deviations / raised(deviations, values, window, max(number, 1)) for values in range(window + 1)]


def rare(last: Array, excesses: float) -> Array:
    """Returns from where on a distance is rare, by an exponential tail of the last distances.

    Args:
        last: The last distances of each row, and -inf for those that there are not, shape (rows, memory).
        excesses: How many mean excesses beyond the beginning of the tail a rare distance lies.
    """
    most = int(TAIL * last.shape[1])
    largest = -np.sort(-np.partition(last, -most - 1, axis=1)[:, -most - 1 :], axis=1)
    size = (TAIL * (last > -math.inf).sum(axis=1)).astype(np.intp)
    begin = np.take_along_axis(largest, size[:, None], axis=1)[:, 0]
    with np.errstate(invalid="ignore"):
        within = np.where(np.arange(most + 1) < size[:, None], largest - begin[:, None], 0.0)
    found: Array = begin + within.sum(axis=1) / np.maximum(size, 1) * excesses
    found = np.maximum(np.minimum(found, FAR_FROM_ALL * largest[:, 0]), largest[:, FREQUENT - 1])
    return np.where(size < FEWEST_OF_TAIL, -math.inf, found)


def events(distances: Array, least: float) -> tuple[Array, Rows]:
    """Returns distances in which the steps of one event count once, and where the event of each step begins.

    A far step belongs to the event of a far step that is at most `AFTERMATH` steps old. The event counts where it
    began, with its largest distance; its other steps are -inf.

    Args:
        distances: One distance for each step.
        least: Beyond this, a step is far.
    """
    place, is_far = np.arange(len(distances)), distances > least
    last = np.maximum.accumulate(np.where(is_far, place, -len(place) - AFTERMATH))
    before = np.append(np.full(1, -len(place) - AFTERMATH), last[:-1])
    goes_on = is_far & (place - before <= AFTERMATH)
    begin = np.maximum.accumulate(np.where(is_far & ~goes_on, place, 0))
    found = np.where(goes_on, -math.inf, distances)
    np.maximum.at(found, begin[goes_on], distances[goes_on])
    return found, np.where(goes_on, begin, place)


def quantiles(values: Array, shares: tuple[float, ...] = QUANTILES) -> Array:
    """Returns the quantiles of each row without its NaN; shape (shares, rows)."""
    ordered = np.sort(values, axis=1)  # NaN last
    last = np.maximum((~np.isnan(values)).sum(axis=1)[:, None] - 1, 0)
    at = last * np.array(shares)
    below = at.astype(np.intp)
    low, high = (np.take_along_axis(ordered, i, axis=1) for i in (below, np.minimum(below + 1, last)))
    found: Array = (low + (at - below) * (high - low)).T
    return found


def without_trend(values: Array, number: Rows) -> Array:
    """Returns windows as they would be without a trend, on the level of the step that comes next.

    Args:
        values: Values, oldest first, and NaN for those that do not count; shape (rows, window).
        number: How many of the newest values of each row there are.
    """
    half, num = number // 2, number[:, None]
    age = np.arange(values.shape[1], 0, -1) - 1
    newer, older = age < half[:, None], (age >= num - half[:, None]) & (age < num)
    (new,), (old,) = (quantiles(np.where(part, values, math.nan), (0.5,)) for part in (newer, older))
    slope = (new - old) / (number - half)
    found: Array = values + slope[:, None] * (age + 1)
    return found


def distance(now: Array, usual: Array, least: Array | float = 0.0) -> Array:
    """Returns how far values lie from the medians of their windows, in robust deviations of at least ``least``.

    Args:
        now: The values.
        usual: The `QUANTILES` of their windows, shape (5, values).
        least: The least deviation.
    """
    q10, q25, q50, q75, q90 = usual
    deviation = np.maximum((q75 - q25) / RANGES_OF_NORMAL[0], (q90 - q10) / RANGES_OF_NORMAL[1])
    deviation = np.maximum(deviation, least)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        away: Array = (now - q50) / deviation
    return np.where(np.isnan(away), 0.0, away)
