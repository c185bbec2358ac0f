"""Calibration: from the first measurements of a run to the longest step it should take. Numbers only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

PHASE = 30
"""Steps of the calibration after the learning rate has last risen: later, curvature has adapted to the step."""

GROWTH = 1.3
"""Ratio of successive steps that are measured."""

WINDOW = 13
"""Measurements that a median is taken over: those of one phase."""

FEWEST = 5
"""Measurements below which the relative cap counts too: a single one is often 2.5 times off."""

LATER = 3
"""After calibration one in so many steps of the progression is measured, and as many make a median."""

LOWER_BY = 2.0
"""Factor that a later median has to fall by before the longest step follows: less is within what medians scatter."""

RISEN = 1.001
"""Factor above the largest rate so far that counts as a rise."""


@dataclass(frozen=True)
class StepRule:
    """How long a step may be, from measurements of gradient norm over smoothness.

    The longest step is S = multiple * median(length), and never above relative * ||x|| if ``bounded``. A length is the
    step at which a quadratic with the measured curvature is lowest: ||g|| / L along the gradient. As long as
    there are fewer than five valid measurements S is relative * ||x||, or the smaller of the two.

    Attributes:
        multiple: Of the median length; None goes by the length of the parameters alone.
        relative: Share of the length of the parameters.
        bounded: Whether the relative cap holds beside the measured one for good.

    Raises:
        ValueError: If a factor is not positive and finite.
    """

    multiple: float | None = 1.5
    relative: float = 0.03
    bounded: bool = False

    def __post_init__(self) -> None:
        for name in ("multiple", "relative"):
            value = getattr(self, name)
            if name == "multiple" and value is None:
                continue
            if not 0 < value < math.inf:
                raise ValueError(f"Parameter `{name}` should be positive and finite. Found `{name} = {value!r}`.")


def progression() -> Iterator[int]:
    """Yields 0, 1, 2, 3, 4, 5, 6, 8, 10, 13, 17, 22, 29, 38, ...: steps to measure."""
    step = 0
    while True:
        yield step
        step = max(step + 1, round(GROWTH * step))


def is_in_progression(step: int, every: int = 1) -> bool:
    """Returns whether ``step`` is in the progression, or among every second, third, ... of it."""
    for number, found in enumerate(progression()):
        if found >= step:
            return found == step and number % every == 0
    raise AssertionError


@dataclass(frozen=True)
class Measurement:
    """One row that calibration counts.

    Attributes:
        step: Optimizer step.
        length: Step at which a quadratic with the measured curvature is lowest [x], positive and finite.
    """

    step: int
    length: float


@dataclass
class Calibration:
    """Follows a run and knows at every step how long a step may be, as far as it is known.

    The first measurements set the longest step. Thirty steps after the learning rate has last risen it is held:
    from then on curvature follows the steps taken, and following it in turn leads nowhere. Later measurements can
    only lower it, where they fall by a factor of two.

    Attributes:
        rule: What is made of the measurements.
        measurements: Valid ones so far.
        num_invalid: Rows that could not be used.
        param_norm: ||x|| of the last row [x]; NaN before the first.
        risen_at: Step at which the learning rate was last above all before.
        longest: S from measurements alone [x]; NaN where there are none.
        held_at: Step since which S is held, or -1.
        lowered_at: Step at which it was lowered last, or -1.
    """

    rule: StepRule
    measurements: list[Measurement] = field(default_factory=list)
    num_invalid: int = 0
    param_norm: float = math.nan
    risen_at: int = 0
    longest: float = math.nan
    held_at: int = -1
    lowered_at: int = -1

    def due(self, step: int) -> bool:
        """Returns whether to measure optimizer step ``step``: also a schedule for the probe."""
        since = step - self.risen_at
        # A rate that rises at every step would make every step the first after a rise.
        after_rise = self.risen_at > 0 and 2 <= since < PHASE and is_in_progression(since)
        return after_rise or is_in_progression(step, LATER if self.held_at >= 0 else 1)

    def rate_rose(self, step: int) -> None:
        """Notes that step ``step`` is taken at a higher rate than any before."""
        self.risen_at = step

    def add(self, step: int, length: float, param_norm: float) -> None:
        """Takes up a measurement; ``length`` is NaN where it is not valid."""
        if math.isfinite(param_norm):
            self.param_norm = param_norm
        if self.rule.multiple is None:
            return
        if not 0 < length < math.inf:
            self.num_invalid += 1
            return
        self.measurements.append(Measurement(step, length))
        if self.held_at < 0:
            self.longest = self.rule.multiple * median(self.lengths)
            return
        later = [m.length for m in self.measurements if m.step >= self.held_at and m.step > self.lowered_at]
        if len(later) >= LATER and (found := self.rule.multiple * median(later[-LATER:])) < self.longest / LOWER_BY:
            self.longest, self.lowered_at = found, step

    def advance(self, step: int) -> bool:
        """Ends calibration when its time has come, before step ``step``; returns whether it just did."""
        if self.rule.multiple is None or len(self.measurements) < FEWEST:
            return False
        if self.held_at >= 0 or step < self.risen_at + PHASE:
            return False
        self.held_at = step
        return True

    @property
    def lengths(self) -> list[float]:
        """The lengths that the median is, or was, taken over."""
        before = [m.length for m in self.measurements if self.held_at < 0 or m.step < self.held_at]
        return before[-WINDOW:]

    @property
    def is_measured(self) -> bool:
        """Whether measurements alone decide."""
        return len(self.measurements) >= FEWEST and not self.rule.bounded

    def interval(self) -> tuple[float, float]:
        """Returns order statistics that hold the median of the lengths 9 times in 10, or NaN with fewer than five."""
        values, n = sorted(self.lengths), len(self.lengths)
        outside, k = 2.0 / 2**n, 0
        while k + 1 < n / 2 and outside + 2 * math.comb(n, k + 1) / 2**n <= 0.1:
            k, outside = k + 1, outside + 2 * math.comb(n, k + 1) / 2**n
        return (values[k], values[n - 1 - k]) if outside <= 0.1 else (math.nan, math.nan)

    def state_dict(self) -> dict[str, Any]:
        """Returns all of it but the rule, as numbers."""
        own = {name: value for name, value in vars(self).items() if name not in ("rule", "measurements")}
        return {**own, "measurements": [(m.step, m.length) for m in self.measurements]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from ``state``."""
        measured: Sequence[tuple[int, float]] = state["measurements"]
        restored = replace(self, **{**state, "measurements": [Measurement(*pair) for pair in measured]})
        vars(self).update(vars(restored))
