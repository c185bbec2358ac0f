"""Calibration: from the first measurements of a run to the longest step it should take. Numbers only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from statistics import median
from typing import Any

PHASE = 30
"""Steps of the calibration: later, curvature has adapted to the step."""

GROWTH = 1.3
"""Ratio of successive steps that are measured."""

WINDOW = 13
"""Measurements that a median is taken over: those of one phase."""

FEWEST = 5
"""Measurements below which the relative cap counts too: a single one is often 2.5 times off."""

MULTIPLE = 1.2
"""Longest step without momentum, in median measured lengths."""

LONGEST_GAP = 200
"""Steps between measurements, at most: a guard whose measurements become ever rarer would sleep through the run."""

LATER = 3
"""After calibration one in so many steps of the progression is measured, and so many rows have to agree that S is too
long: a median of as many, tested again with every row, would sooner or later fall to the low end of the scatter."""

LOWER_BY = 2.0
"""Factor that they all have to be short by before the longest step follows the largest of them."""


@dataclass(frozen=True)
class StepRule:
    """How long a step may be, from measurements of gradient norm over smoothness.

    The longest step is S = multiple * median(length), and never above relative * ||x|| if ``bounded``. A length is the
    step at which a quadratic with the measured curvature is lowest: ||g|| / L along the gradient. As long as
    there are fewer than five valid measurements S is relative * ||x||, or the smaller of the two.

    Attributes:
        multiple: Of the median length; None goes by the length of the parameters alone, and measures nothing.
        relative: Share of the length of the parameters.
        bounded: Whether the relative cap holds beside the measured one for good.

    Raises:
        ValueError: If a factor is not positive and finite.
    """

    multiple: float | None = MULTIPLE
    relative: float = 0.03
    bounded: bool = False

    @classmethod
    def for_momentum(cls, momentum: float) -> StepRule:
        """Returns the rule where gradients are clipped before a momentum in [0, 1) that adds them up.

        Its steps are as long as S where gradients are equal, and sqrt((1 - momentum) / (1 + momentum)) of S where
        they are uncorrelated. The best multiple, found in training runs, lies half way on a log scale: 1.2 without
        momentum, 2.5 at 0.9.

        Raises:
            ValueError: If ``momentum`` is not in [0, 1).
        """
        if not 0 <= momentum < 1:
            raise ValueError(f"Parameter `momentum` should be in [0, 1). Found `momentum = {momentum!r}`.")
        return cls(multiple=MULTIPLE * ((1 + momentum) / (1 - momentum)) ** 0.25)

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
        rate: The learning rate that makes it [x^2/f], without momentum; NaN where a slope was measured.
        taken: How long the step was that was taken [x], as far as it is known.
        reduction: How long clipped steps are, in longest steps.
    """

    step: int
    length: float
    rate: float
    taken: float = math.inf
    reduction: float = 1.0


@dataclass
class Calibration:
    """Follows a run and knows at every step how long a step may be, as far as it is known.

    The first measurements set the longest step. After thirty steps it is held, whatever the learning rate does:
    from then on curvature follows the steps taken, and following it in turn leads nowhere. Later measurements can
    only lower it, where three in a row are short of the steps taken by a factor of two.

    Attributes:
        rule: What is made of the measurements.
        measurements: Valid ones so far.
        invalid: How many rows could not be used, by their status.
        joined_at: Step at which the run was joined.
        risen_at: Step at which the learning rate was last above all before, or -1.
        longest: S from measurements alone [x]; NaN where there are none.
        held_at: Step since which S is held, or -1.
        lowered_at: Step at which it was lowered last, or -1.
    """

    rule: StepRule
    measurements: list[Measurement] = field(default_factory=list)
    invalid: dict[str, int] = field(default_factory=dict)
    joined_at: int = 0
    risen_at: int = -1
    longest: float = math.nan
    held_at: int = -1
    lowered_at: int = -1

    def due(self, step: int) -> bool:
        """Returns whether to measure optimizer step ``step``."""
        if self.rule.multiple is None:
            return False
        if self.held_at < 0:
            return step >= self.joined_at and is_in_progression(step - self.joined_at)
        return step % LONGEST_GAP == 0 or is_in_progression(step, LATER)

    def rise(self, step: int) -> bool:
        """Notes a rise of the rate before step ``step``; returns whether it is not the last one going on."""
        is_new = self.risen_at < 0 or step >= self.risen_at + PHASE
        self.risen_at = step
        return is_new

    def count_invalid(self, status: str) -> None:
        """Counts a row without a length."""
        self.invalid[status] = self.invalid.get(status, 0) + 1

    def add(self, found: Measurement) -> bool:
        """Takes up a measurement; returns whether it lowered a longest step that was held.

        Curvature adapts to the steps taken, which are shorter than S where the rate has decayed, gradients have become
        small, or momentum averages them. So a length is short only beside the step that was taken.
        """
        multiple = self.rule.multiple
        if multiple is None:
            return False
        self.measurements.append(found)
        if self.held_at < 0:
            self.longest = multiple * median(self.lengths)
            return False
        later = [m for m in self.measurements if m.step >= self.held_at and m.step > self.lowered_at][-LATER:]
        if len(later) < LATER or any(not multiple * m.length < m.taken / LOWER_BY for m in later):
            return False
        self.longest, self.lowered_at = multiple * max(m.length / m.reduction for m in later), found.step
        return True

    def advance(self, step: int) -> bool:
        """Ends calibration when its time has come, before step ``step``; returns whether it just did."""
        if self.held_at >= 0 or len(self.measurements) < FEWEST or step < self.joined_at + PHASE:
            return False
        self.held_at = step
        return True

    @property
    def lowering(self) -> list[Measurement]:
        """The measurements that S was lowered by last."""
        return [m for m in self.measurements if m.step <= self.lowered_at][-LATER:]

    @property
    def early(self) -> list[Measurement]:
        """The last measurements of calibration, which the median is taken over."""
        return [m for m in self.measurements if self.held_at < 0 or m.step < self.held_at][-WINDOW:]

    @property
    def lengths(self) -> list[float]:
        """Lengths of the early measurements [x]."""
        return [m.length for m in self.early]

    @property
    def is_measured(self) -> bool:
        """Whether measurements alone decide."""
        return len(self.measurements) >= FEWEST and not self.rule.bounded

    def interval(self) -> tuple[float, float]:
        """Returns order statistics that hold the median of the early lengths 9 times in 10; NaN with fewer than five.

        Units: [x].
        Source: the sign test: each of n independent lengths is below the median with probability 1/2.
        """
        return median_interval(self.lengths)

    def state_dict(self) -> dict[str, Any]:
        """Returns all of it as numbers."""
        own = {name: value for name, value in vars(self).items() if name not in ("rule", "measurements", "invalid")}
        measured = [astuple(m) for m in self.measurements]
        return {**own, "invalid": dict(self.invalid), "measurements": measured, "rule": asdict(self.rule)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from ``state``."""
        measured: Sequence[tuple[Any, ...]] = state["measurements"]
        parts: dict[str, Any] = {"measurements": [Measurement(*m) for m in measured], "invalid": dict(state["invalid"])}
        parts["rule"] = StepRule(**state["rule"])
        vars(self).update(vars(replace(self, **{**state, **parts})))


def median_interval(values: Sequence[float], level: float = 0.9) -> tuple[float, float]:
    """Returns the narrowest pair of opposite order statistics that holds the median with at least this probability.

    NaN where even the smallest and the largest do not.
    """
    ordered, n = sorted(values), len(values)
    # The pair (k, n - 1 - k) misses the median when at most k values lie on one side of it.
    outside, best = 0.0, -1
    for k in range((n + 1) // 2):
        outside += 2 * math.comb(n, k) / 2**n
        if outside > 1 - level:
            break
        best = k
    return (ordered[best], ordered[n - 1 - best]) if best >= 0 else (math.nan, math.nan)
