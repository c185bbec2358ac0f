"""Spiking: when a value counts as a spike, for logs that are read afterwards and for runs that are watched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from smoothdiag import arguments
from smoothdiag.tails import (
    AFTERMATH,
    FEWEST_OF_TAIL,
    QUANTILES,
    ROUNDING,
    TAIL,
    Array,
    Mask,
    Rows,
    distance,
    events,
    quantiles,
    rare,
    trusted,
    without_trend,
)

BLOCK: Final = 1 << 14
"""How many windows are sorted together."""

LARGEST: Final = 10.0
"""Distances in the memory are at most this many times as large as the distance asked for."""


@dataclass(frozen=True)
class SpikeRule:
    """A value is a spike if it lies far above the values before it, in robust standard deviations and as a ratio.

    Gradient norms, and the lengths of updates, are compared by their logarithm. Values that are not finite, and norms
    of 0, are left out of the values before. Spikes themselves are not: the quantiles hardly notice them.

    A robust standard deviation is the larger of interquartile range / 1.349 and interdecile range / 2.563. The two are
    equal for normal values; the second is larger where large values are frequent. While there are fewer values than the
    window holds, the deviation is a rough guess, and a spike has to lie so much further away that chance makes it no
    more often.

    Losses near zero scatter over decades. So a loss that is positive, like nine tenths of those before it, is compared
    on a logarithmic scale, too, and the smaller distance counts. There the trend is taken off first: the straight line
    through the medians of the older and the newer half.

    Losses of zero scatter by rounding alone. So the deviation of a loss is at least 4 times the precision of float32,
    relative to the largest median so far.

    The loss and the norm of one step are two witnesses. Their distance is the root of the sum of squares of their
    deviations above the median, and of several norms or losses the one with the largest deviation counts. Of a step
    that lies far enough, each value is a spike that makes up at least half of the distance asked for.

    In some runs far steps are usual: every twentieth batch, say, has an example that the network gets wrong. So the
    distance must be rare, too. As soon as 200 distances are known, an exponential tail through the largest 5% of the
    last 500 says which distance comes once in 10,000 steps. A spike lies further away than that, or twice as far as all
    of them; and no three events among them came as far. Far steps that follow each other within 5 steps are one event,
    which counts once, and is not compared with itself. Distances above 60 count as 60, so that one of them does not
    hide all others.

    Source of the tail: "peaks over threshold" with an exponential excess, Davison and Smith 1990 (J. R. Stat. Soc. B);
    for streams with another tail, Siffer et al. 2017 (KDD).

    Args:
        window: How many of the last values count.
        fewest: With fewer values than this, nothing is a spike.
        deviations: Least distance of a step from the median, in robust standard deviations.
        least_ratio: Least ratio of a norm to the median.
        least_rise: Least distance of a loss from the median, as a share of the median.
        memory: How many of the last distances say what is rare, at least 200; 0 leaves that question out.
        once_in: In how many steps the tail of the distances may reach a spike once.

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
    memory: int = 500
    once_in: float = 10_000.0

    def __post_init__(self) -> None:
        arguments.whole("window", self.window, 4)
        arguments.whole("fewest", self.fewest, 4)
        if self.fewest > self.window:
            raise arguments.wrong("fewest", f"at most `window = {self.window}`", self.fewest)
        arguments.positive("deviations", self.deviations)
        arguments.number("least_ratio", self.least_ratio, "at least 1 and finite", lambda v: 1 <= v < math.inf)
        arguments.number("least_rise", self.least_rise, "at least 0 and finite", lambda v: 0 <= v < math.inf)
        arguments.whole("memory", self.memory, 0)
        if 0 < self.memory < FEWEST_OF_TAIL / TAIL:
            raise arguments.wrong("memory", f"0, or at least {FEWEST_OF_TAIL / TAIL:g}", self.memory)
        arguments.number("once_in", self.once_in, f"above {1 / TAIL:g} and finite", lambda v: 1 / TAIL < v < math.inf)

    @property
    def largest(self) -> float:
        """The largest distance that the memory tells apart."""
        return LARGEST * self.deviations

    @property
    def excesses(self) -> float:
        """How many mean excesses beyond the beginning of the tail a distance lies that comes once in so many steps."""
        return math.log(TAIL * self.once_in)

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
        return Reading(self, [is_norm for _, is_norm in signals]).take(*(values for values, _ in signals))

    @property
    def _rarity(self) -> str:
        return (
            f"  Where large deviations are frequent among the {self.memory} rows before, a spike is further away: so\n"
            f"  far that their tail reaches it once in {self.once_in:,.0f} rows."
        )

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
            f"  at least {self.least_rise:.0%} above the median." + (f"\n{self._rarity}" if self.memory else "")
        )


class Reading:
    """Values that are read part after part, and judged as if they had come at once.

    Args:
        rule: What a spike is.
        are_norms: For each signal whether its values are norms.
        digits: For each signal what its values are rounded to; 0 if they are not rounded. No deviation is smaller.
    """

    def __init__(self, rule: SpikeRule, are_norms: Sequence[bool], digits: Sequence[float] = ()) -> None:
        self._rule = rule
        each = zip(are_norms, digits or [0.0] * len(are_norms), strict=True)
        self._signals = [_Signal(rule, is_norm, digit) for is_norm, digit in each]
        self._memory = np.zeros(0)

    def take(self, *values: npt.ArrayLike) -> list[tuple[Mask, Array]]:
        """Returns for each signal which of the next values are spikes, and the median of the values before each.

        Args:
            values: For each signal one value for each step, all of one length.
        """
        columns = [np.asarray(each, dtype=np.float64) for each in values]
        if any(column.shape != columns[0].shape or column.ndim != 1 for column in columns):
            shapes = ", ".join(str(column.shape) for column in columns)
            raise ValueError(f"Parameter `values` should have one number for each step. Found shapes {shapes}.")
        for signal, column in zip(self._signals, columns, strict=True):
            signal.take(column)
        rows = np.flatnonzero(np.any([signal.is_large for signal in self._signals], axis=0))
        away = [signal.deviations(rows) for signal in self._signals]
        total = self._together(away)
        is_far = total > self._rule.deviations
        if self._rule.memory:
            is_far[is_far] = self._are_rare(rows[is_far], total[is_far])
        found = []
        for signal, own in zip(self._signals, away, strict=True):
            is_spike = np.zeros(len(signal.is_large), dtype=np.bool_)
            is_spike[rows] = signal.is_large[rows] & is_far & (own >= self._rule.deviations / 2)
            found.append((is_spike, signal.usual))
        return found

    def _together(self, away: Sequence[Array]) -> Array:
        total: Array = np.zeros(len(away[0]))
        for kind in (True, False):
            alike = [each for each, signal in zip(away, self._signals, strict=True) if signal.is_norm is kind]
            total = np.hypot(total, np.max(alike, axis=0, initial=0)) if alike else total
        return total

    def _are_rare(self, rows: Rows, total: Array) -> Mask:
        """Returns which distances are rare beside those of the steps before, and keeps the last distances."""
        size, reach, before = self._rule.memory, self._rule.memory + AFTERMATH, len(self._memory)
        entering = np.flatnonzero(np.any([signal.is_known for signal in self._signals], axis=0))
        place = np.searchsorted(entering, rows) + before
        distances = np.concatenate([self._memory, np.full(len(entering), math.nan)])
        asked_for = _before(np.append(place + 1, len(distances)), reach + 1, len(distances))
        wanted = np.flatnonzero(asked_for[before:])  # few, in most logs
        far = self._together([signal.deviations(entering[wanted]) for signal in self._signals])
        distances[before + wanted] = np.minimum(far, self._rule.largest)
        self._memory = distances[max(len(distances) - reach, 0) :]
        counted, begin = events(distances, self._rule.deviations)
        is_rare = np.ones(len(rows), dtype=np.bool_)
        for part in np.split(np.arange(len(rows)), range(BLOCK // 8, len(rows), BLOCK // 8)):
            back = place[part, None] + np.arange(-size, 0)
            last = np.where(back >= 0, counted[np.maximum(back, 0)], -math.inf)
            last[back == begin[place[part], None]] = -math.inf  # an event is not compared with itself
            is_rare[part] = np.minimum(total[part], self._rule.largest) > rare(last, self._rule.excesses)
        return is_rare


def _before(ends: Rows, number: int, length: int) -> Mask:
    """Returns which places lie among so many before one of the ends."""
    changes = np.bincount(np.maximum(ends - number, 0), minlength=length + 1) - np.bincount(ends, minlength=length + 1)
    found: Mask = np.cumsum(changes)[:length] > 0
    return found


class _Signal:
    """Values of a signal beside the values before each.

    Attributes:
        usual: Median of the values before; NaN where it is not known.
        is_known: Whether a value counts, and enough values before it.
        is_large: Whether a value lies above the median by the least ratio or share.
    """

    def __init__(self, rule: SpikeRule, is_norm: bool, digit: float) -> None:
        self.rule, self.is_norm, self._digit = rule, is_norm, digit
        self._trust = np.array(trusted(rule.deviations, rule.window))
        self._before, self._level = np.zeros(0), 0.0

    def take(self, value: Array) -> None:
        """Goes on to the next values."""
        import pandas as pd

        rule = self.rule
        self._keep = rule.counts(value, is_norm=self.is_norm)
        kept, begin = value[self._keep], len(self._before)
        self._scale = np.concatenate([self._before, np.log(kept) if self.is_norm else kept])
        self._begin, self._before = begin, self._scale[-rule.window :]
        before = pd.Series(self._scale).shift(1).rolling(rule.window, min_periods=rule.fewest)
        middle = before.median().to_numpy()[begin:]
        least = math.log(rule.least_ratio) if self.is_norm else rule.least_rise * np.abs(middle)
        self.usual, self.is_large = np.full(len(value), math.nan), np.zeros(len(value), dtype=np.bool_)
        self.usual[self._keep], self._middle = np.exp(middle) if self.is_norm else middle, middle
        self.is_large[self._keep] = self._scale[begin:] - middle >= least
        self.is_known = self._keep & np.isfinite(self.usual)
        self._levels = np.fmax.accumulate(np.append(self._level, np.abs(middle)))[1:]
        if len(kept):
            self._level = float(self._levels[-1])

    def deviations(self, rows: Rows) -> Array:
        """Returns how far the values at these rows lie from their medians; 0 where that is not known."""
        found = np.zeros(len(rows))
        if len(rows):
            places = self._begin + np.cumsum(self._keep) - 1  # of a row among the values that are kept
            known = np.flatnonzero(self.is_known[rows])
            for part in np.split(known, range(BLOCK, len(known), BLOCK)):
                found[part] = self._deviations(places[rows[part]])
        return found

    def _deviations(self, places: Rows) -> Array:
        rows = places[:, None] + np.arange(-self.rule.window, 0)  # oldest first
        values, now = np.where(rows >= 0, self._scale[np.maximum(rows, 0)], math.nan), self._scale[places]
        number = np.minimum(places, self.rule.window)
        if self.is_norm:
            with np.errstate(over="ignore"):
                least = np.log1p(self._digit * np.exp(-self._middle[places - self._begin]))
        else:
            least = np.maximum(ROUNDING * self._levels[places - self._begin], self._digit)
        usual = quantiles(values)
        away = distance(now, usual, least)
        if not self.is_norm:
            positive = (now > 0) & (usual[QUANTILES.index(0.1)] > 0)
            logs = np.log(np.where(values[positive] > 0, values[positive], math.nan))
            in_logs = distance(np.log(now[positive]), quantiles(without_trend(logs, number[positive])))
            away[positive] = np.minimum(away[positive], in_logs)
        away *= self._trust[number]
        return away
