"""Spiking: when a value counts as a spike, for logs that are read afterwards and for runs that are watched."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from smoothdiag import arguments

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

QUANTILES: Final = (0.1, 0.25, 0.5, 0.75, 0.9)
"""The quantiles of the values before that say what is usual."""

RANGES_OF_NORMAL: Final = (1.349, 2.563)
"""Interquartile and interdecile range of a normal distribution, in standard deviations."""

BLOCK: Final = 1 << 14
"""How many windows are sorted together."""


@dataclass(frozen=True)
class SpikeRule:
    """A value is a spike if it lies far above the values before it, in robust standard deviations and as a ratio.

    Gradient norms, and the lengths of updates, are compared by their logarithm. Values that are not finite, and norms
    of 0, are left out of the values before. Spikes themselves are not: the quantiles hardly notice them.

    A robust standard deviation is the larger of interquartile range / 1.349 and interdecile range / 2.563. The two are
    equal for normal values; the second is larger where large values are frequent.

    Losses near zero scatter over decades. So a loss that is positive, like all those before it, is compared on a
    logarithmic scale, too, and the smaller distance counts. There the trend is taken off first: the straight line
    through the medians of the older and the newer half.

    The loss and the norm of one step are two witnesses. Their distance is the root of the sum of squares of their
    deviations above the median, and of several norms or losses the one with the largest deviation counts. Of a step
    that lies far enough, each value is a spike that makes up at least half of the distance asked for.

    Args:
        window: How many of the last values count.
        fewest: With fewer values than this, nothing is a spike.
        deviations: Least distance of a step from the median, in robust standard deviations.
        least_ratio: Least ratio of a norm to the median.
        least_rise: Least distance of a loss from the median, as a share of the median.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> import numpy as np
        >>> norms = np.where(np.arange(100) == 80, 9.0, 1 + 0.1 * np.sin(np.arange(100)))
        >>> is_spike, usual = sd.SpikeRule().find(norms, is_norm=True)
        >>> print(np.flatnonzero(is_spike), usual[80].round(1))
        [80] 1.0
    """

    window: int = 50
    fewest: int = 20
    deviations: float = 6.0
    least_ratio: float = 2.0
    least_rise: float = 0.1

    def __post_init__(self) -> None:
        arguments.whole("window", self.window, 4)
        arguments.whole("fewest", self.fewest, 4)
        if self.fewest > self.window:
            raise arguments.wrong("fewest", f"at most `window = {self.window}`", self.fewest)
        arguments.positive("deviations", self.deviations)
        arguments.number("least_ratio", self.least_ratio, "at least 1 and finite", lambda v: 1 <= v < math.inf)
        arguments.number("least_rise", self.least_rise, "at least 0 and finite", lambda v: 0 <= v < math.inf)

    def counts(self, values: npt.NDArray[Any], *, is_norm: bool) -> Mask:
        """Returns which values count: finite ones, and of norms positive ones."""
        found: Mask = np.isfinite(values)
        return found & (values > 0) if is_norm else found

    def find(self, values: npt.ArrayLike, *, is_norm: bool) -> tuple[Mask, Array]:
        """Returns which values are spikes, and the median of the values before each.

        Args:
            values: One value for each step.
            is_norm: Whether the values are norms, which are compared by their logarithm, and not losses.
        """
        ((found, usual),) = self.find_together((values, is_norm))
        return found, usual

    def find_together(self, *signals: tuple[npt.ArrayLike, bool]) -> list[tuple[Mask, Array]]:
        """Returns for each signal which values are spikes, and the median of the values before each.

        Args:
            signals: For each signal one value for each step, and whether the values are norms.
        """
        all_signals = [_Signal(self, values, is_norm) for values, is_norm in signals]
        rows = np.flatnonzero(np.any([signal.is_large for signal in all_signals], axis=0))
        away = [signal.deviations(rows) for signal in all_signals]
        total = np.zeros(len(rows))
        for kind in (True, False):
            alike = [each for each, signal in zip(away, all_signals, strict=True) if signal.is_norm is kind]
            total = np.hypot(total, np.max(alike, axis=0, initial=0)) if alike else total
        found = []
        for signal, own in zip(all_signals, away, strict=True):
            is_spike = np.zeros(len(signal.is_large), dtype=np.bool_)
            is_spike[rows] = signal.is_large[rows] & (total > self.deviations) & (own >= self.deviations / 2)
            found.append((is_spike, signal.usual))
        return found

    @property
    def text(self) -> str:
        """What a spike is, in words, indented by two blanks."""
        return (
            f"  A spike lies more than {self.deviations:g} robust standard deviations above the median of the "
            f"{self.window} rows before it (at least\n"
            f"  {self.fewest}); the deviations of loss and norm of one row count together, as the root of the sum of "
            "their squares.\n"
            "  Gradient norms are compared by their logarithm and must be at least "
            f"{self.least_ratio:g} times the median. Losses must be\n"
            f"  at least {self.least_rise:.0%} above the median."
        )


class _Signal:
    """Values of a signal beside the values before each.

    Attributes:
        usual: Median of the values before; NaN where it is not known.
        is_large: Whether a value lies above the median by the least ratio or share.
    """

    def __init__(self, rule: SpikeRule, values: npt.ArrayLike, is_norm: bool) -> None:
        import pandas as pd

        value = np.asarray(values, dtype=np.float64)
        self.rule, self.is_norm = rule, is_norm
        self._keep = rule.counts(value, is_norm=is_norm)
        self._scale = np.log(value[self._keep]) if is_norm else value[self._keep]
        before = pd.Series(self._scale).shift(1).rolling(rule.window, min_periods=rule.fewest)
        middle = before.median().to_numpy()
        least = math.log(rule.least_ratio) if is_norm else rule.least_rise * np.abs(middle)
        self.usual, self.is_large = np.full(len(value), math.nan), np.zeros(len(value), dtype=np.bool_)
        self.usual[self._keep] = np.exp(middle) if is_norm else middle
        self.is_large[self._keep] = self._scale - middle >= least

    def deviations(self, rows: npt.NDArray[np.intp]) -> Array:
        """Returns how far the values at these rows lie from their medians; 0 where that is not known."""
        found = np.zeros(len(rows))
        if len(rows):
            places = np.cumsum(self._keep) - 1  # of a row among the values that are kept
            known = np.flatnonzero(self._keep[rows] & (places[rows] >= self.rule.fewest))
            for part in np.split(known, range(BLOCK, len(known), BLOCK)):
                found[part] = self._deviations(places[rows[part]])
        return found

    def _deviations(self, places: npt.NDArray[np.intp]) -> Array:
        rows = places[:, None] + np.arange(-self.rule.window, 0)  # oldest first
        values, now = np.where(rows >= 0, self._scale[np.maximum(rows, 0)], math.nan), self._scale[places]
        number = np.minimum(places, self.rule.window)
        away = _distance(now, values, number)
        if not self.is_norm:
            least = np.nanmin(values, axis=1)
            positive = (now > 0) & (least > 0)
            in_logs = _without_trend(np.log(values[positive]), number[positive])
            in_logs = _distance(np.log(now[positive]), in_logs, number[positive])
            away[positive] = np.minimum(away[positive], in_logs)
        return away


def _quantiles(values: Array, number: npt.NDArray[np.intp], shares: tuple[float, ...] = QUANTILES) -> Array:
    """Returns the quantiles of each row, which has this number of values and then NaN; shape (shares, rows)."""
    ordered = np.sort(values, axis=1)  # NaN last
    last = number[:, None] - 1
    at = last * np.array(shares)
    below = at.astype(np.intp)
    low, high = (np.take_along_axis(ordered, i, axis=1) for i in (below, np.minimum(below + 1, last)))
    found: Array = (low + (at - below) * (high - low)).T
    return found


def _without_trend(values: Array, number: npt.NDArray[np.intp]) -> Array:
    """Returns windows as they would be without a trend, on the level of the step that comes next."""
    half, num = number // 2, number[:, None]
    age = np.arange(values.shape[1], 0, -1) - 1
    newer, older = age < half[:, None], (age >= num - half[:, None]) & (age < num)
    (new,), (old,) = (_quantiles(np.where(part, values, math.nan), half, (0.5,)) for part in (newer, older))
    slope = (new - old) / (number - half)
    found: Array = values + slope[:, None] * (age + 1)
    return found


def _distance(now: Array, values: Array, number: npt.NDArray[np.intp]) -> Array:
    """Returns how far values lie from the medians of their windows, in robust standard deviations."""
    q10, q25, q50, q75, q90 = _quantiles(values, number)
    deviation = np.maximum((q75 - q25) / RANGES_OF_NORMAL[0], (q90 - q10) / RANGES_OF_NORMAL[1])
    with np.errstate(divide="ignore", invalid="ignore"):
        away: Array = (now - q50) / deviation
    return np.where(np.isnan(away), 0.0, away)
