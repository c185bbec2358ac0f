"""Calibration: turns the first measurements of a run into its longest step. Numbers only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from statistics import fmean, median
from typing import Any

from smoothdiag.autoclip.progression import is_in_progression
from smoothdiag.notebooks import as_html

PHASE = 30
"""Steps of the calibration: later, curvature has adapted to the step."""

WINDOW = 13
"""Number of measurements in a median: as many as the first thirty steps have."""

FEWEST = 5
"""With fewer measurements the relative limit counts too, because a single one is often 2.5 times off."""

MULTIPLE = 1.2
"""Longest step without momentum, as a multiple of the median measured length."""

USUAL_SIGNAL, LEAST_SIGNAL = 0.5, 0.2
"""Share of the squared gradient that is signal: what the multiple is for, and the least that counts."""

LONGEST_GAP = 200
"""Most steps between two measurements. If they became ever rarer, nothing would watch over the later run."""

LATER = 3
"""After calibration, every third step of the progression is measured, and three rows in a row have to say that S is too
long. A median of three rows, tested with each new row, would sooner or later land at the low end of the
scatter."""

LOWER_BY = 2.0
"""All of these rows have to be short by this factor. Then the longest step falls to the largest of them."""

RAISING, RAISE_BY, RAISE_UPDATES_BY, AT_CAP = 2, 2.0, 4.0, 0.9
"""So many rows in a row have to be long by this factor, each of a step that was nearly as long as allowed. Then the
longest step rises to the smallest of them. A length along the gradient says less about updates in another direction,
so they need a larger factor."""

MOST_RISE = 10.0
"""Largest factor of a single rise."""

CONFIRM_GAP = 50
"""Most steps from a row that says that S should rise to the next one, which confirms it or does not. Rows that would
lower S are left as far apart as they are: so close together they share the low end of the scatter."""


@dataclass(frozen=True)
class StepRule:
    """How long a step may be, from measurements of gradient norm over smoothness.

    The longest step is S = multiple * median(length) * (signal / 0.5)^noise. A length is the step to the lowest point
    of a quadratic with the measured curvature, ||g|| / L along the gradient. The signal is the share of ||g||^2 that
    two halves of a batch have in common; where it is not known, the last factor is 1. With fewer than five valid
    measurements S is relative * ||x||, or the measured length if that is smaller. If ``bounded``, S never exceeds
    relative * ||x||.

    Attributes:
        multiple: Factor on the median length. None: S is relative * ||x||, and nothing is measured.
        relative: Share of the length ||x|| of the parameters.
        bounded: Whether relative * ||x|| limits S for the whole run.
        noise: Power of the signal share; 0 leaves the noise of batches out of account, and saves its measurement.

    Raises:
        ValueError: If a factor is not positive and finite, or if ``noise`` is negative.

    Examples:
        >>> sd.StepRule(multiple=None, relative=0.01)  # one hundredth of ||x||, without measurements
        StepRule(multiple=None, relative=0.01, bounded=False, noise=0.5)
        >>> round(sd.StepRule.for_momentum(0.9).multiple, 2)
        2.51
    """

    multiple: float | None = MULTIPLE
    relative: float = 0.03
    bounded: bool = False
    noise: float = 0.5

    @classmethod
    def for_momentum(cls, momentum: float) -> StepRule:
        """Returns the rule for an optimizer whose momentum adds up gradients that are clipped before.

        The optimizer's steps are as long as S if all gradients are equal. If they are uncorrelated, steps have
        sqrt((1 - momentum) / (1 + momentum)) times that length. The best multiple, found in training runs, lies half
        way between on a log scale: 1.2 without momentum, 2.5 at momentum 0.9.

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
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"Parameter `noise` should be at least 0 and finite. Found `noise = {self.noise!r}`.")

    def _repr_html_(self) -> str:
        measured = f"at most {self.multiple:.3g} times the measured length" if self.multiple else "not measured"
        least = f"at most {self.relative:g} of the length of the parameters"
        head = f"{measured}; {least}" if self.bounded else measured if self.multiple else least
        return as_html(f"StepRule: steps are {head}.\nNEXT: pass it as AutoClip(optimizer, probe, rule=...).\n{self!r}")


@dataclass(frozen=True)
class Measurement:
    """One valid measurement.

    Attributes:
        step: Optimizer step.
        length: Step to the lowest point of a quadratic with the measured curvature [x], positive and finite.
        rate: Learning rate of that step [x^2/f]: without momentum, or for an update with all that the optimizer does to
            a gradient; NaN if it is not known.
        taken: Length of the step that the optimizer took [x], as far as it is known.
        reduction: Length of clipped steps at that time, as a share of the longest step.
        signal: Share of ||g||^2 that two halves of the batch have in common, in [-1, 1]; NaN if it is not known.
        saturated: Whether the gradient turned over within the measured distance.
    """

    step: int
    length: float
    rate: float
    taken: float = math.inf
    reduction: float = 1.0
    signal: float = math.nan
    saturated: bool = False


@dataclass
class Calibration:
    """Knows at every step of a run how long the step may be.

    The first measurements set the longest step. After thirty steps it is held, whatever the learning rate does: from
    then on curvature adapts to the steps taken, and a longest step that adapts to curvature would drift. Later
    measurements lower it if three in a row say that the steps taken were more than twice too long. They raise it if two
    in a row, of steps at the cap, would allow more than ``raise_by`` times as much: where curvature has adapted to the
    steps, it does not allow that.

    Attributes:
        rule: Turns measurements into a longest step.
        measurements: Valid measurements so far.
        invalid: Number of rows that could not be used, by status.
        joined_at: Step at which AutoClip joined the run.
        risen_at: Last step at which the learning rate was higher than ever before, or -1.
        longest: S from measurements alone [x]; NaN without measurements.
        held_at: Step from which S is held, or -1.
        lowered_at: Step at which S was last lowered, or -1.
        raised_at: Step at which S was last raised, or -1.
        raise_by: How many times longer than S steps have to be allowed for it to rise; infinite where it never rises.
        confirms: Whether a row that says that S should rise is soon followed by the next one.
    """

    rule: StepRule
    measurements: list[Measurement] = field(default_factory=list)
    invalid: dict[str, int] = field(default_factory=dict)
    joined_at: int = 0
    risen_at: int = -1
    longest: float = math.nan
    held_at: int = -1
    lowered_at: int = -1
    raised_at: int = -1
    raise_by: float = math.inf
    confirms: bool = True

    def due(self, step: int) -> bool:
        """Returns whether to measure optimizer step ``step``."""
        if self.rule.multiple is None:
            return False
        if self.held_at < 0:
            return step >= self.joined_at and is_in_progression(step - self.joined_at)
        if step % LONGEST_GAP == 0 or is_in_progression(step, LATER):
            return True
        return (step % CONFIRM_GAP == 0 or is_in_progression(step)) and self._has_to_confirm(step)

    def rise(self, step: int) -> bool:
        """Notes that the rate has risen before ``step``; returns whether this is a new rise or still the last one."""
        is_new = self.risen_at < 0 or step >= self.risen_at + PHASE
        self.risen_at = step
        return is_new

    def count_invalid(self, status: str) -> None:
        """Counts a row that gives no length."""
        self.invalid[status] = self.invalid.get(status, 0) + 1

    def add(self, found: Measurement) -> str:
        """Adds a measurement; returns ``"lowered"`` or ``"raised"`` if it has changed a longest step that was held.

        Curvature adapts to the steps taken. These are shorter than S if the rate has decayed, if gradients have become
        small, or if momentum averages them. So a measured length is compared with the step that was taken.
        """
        if self.rule.multiple is None:
            return ""
        self.measurements.append(found)
        if self.held_at < 0:
            self.longest = self.factor * median(self.lengths)
            return ""
        since = max(self.held_at, self.lowered_at + 1, self.raised_at + 1)
        later = [m for m in self.measurements if m.step >= since][-LATER:]
        if len(later) == LATER and all(self.factor * m.length < m.taken / LOWER_BY for m in later):
            self.longest, self.lowered_at = self.factor * max(m.length / m.reduction for m in later), found.step
            return "lowered"
        later = later[-RAISING:]
        if len(later) == RAISING and all(map(self._is_held_back, later)):
            longest = self.factor * min(m.length for m in later)
            self.longest, self.raised_at = min(longest, MOST_RISE * self.longest), found.step
            return "raised"
        return ""

    def _is_held_back(self, found: Measurement) -> bool:
        """Returns whether a step was at the cap, while its measurement would have allowed a much longer one."""
        at_cap = found.taken >= AT_CAP * found.reduction * self.longest
        return at_cap and self.factor * found.length > self.raise_by * self.longest

    def _has_to_confirm(self, step: int) -> bool:
        """Returns whether the last row says that S should rise; what the step before said is not known yet."""
        since = max(self.held_at, self.lowered_at + 1, self.raised_at + 1)
        last = next((m for m in reversed(self.measurements) if m.step < step - 1), None)
        return self.confirms and last is not None and last.step >= since and self._is_held_back(last)

    def advance(self, step: int) -> bool:
        """Holds the longest step from ``step`` on, if it is time; returns whether that has just happened."""
        if self.held_at >= 0 or len(self.measurements) < FEWEST or step < self.joined_at + PHASE:
            return False
        self.held_at = step
        return True

    @property
    def changing(self) -> list[Measurement]:
        """The measurements that last lowered or raised S."""
        at, number = max((self.lowered_at, LATER), (self.raised_at, RAISING))
        return [m for m in self.measurements if m.step <= at][-number:]

    @property
    def early(self) -> list[Measurement]:
        """The last measurements of the calibration, which the median is made of."""
        return [m for m in self.measurements if self.held_at < 0 or m.step < self.held_at][-WINDOW:]

    @property
    def last_step(self) -> int:
        """Step of the last measurement, or -1."""
        return self.measurements[-1].step if self.measurements else -1

    @property
    def lengths(self) -> list[float]:
        """Lengths of the early measurements [x]."""
        return [m.length for m in self.early]

    @property
    def signal(self) -> float:
        """Mean signal share of the early gradients; NaN if it is not known."""
        known = [m.signal for m in self.early if not math.isnan(m.signal)]
        return fmean(known) if known else math.nan

    @property
    def factor(self) -> float:
        """The longest step in median lengths."""
        signal = USUAL_SIGNAL if math.isnan(self.signal) else max(self.signal, LEAST_SIGNAL)
        return float((self.rule.multiple or math.nan) * (signal / USUAL_SIGNAL) ** self.rule.noise)

    def wants_signal(self) -> bool:
        """Returns whether a measurement should include the signal share."""
        return self.rule.noise > 0 and self.held_at < 0

    @property
    def is_measured(self) -> bool:
        """Whether measurements alone set the longest step."""
        return len(self.measurements) >= FEWEST and not self.rule.bounded

    def interval(self) -> tuple[float, float]:
        """Returns an interval that contains the true median length 9 times in 10; NaN with fewer than five lengths.

        Units: [x].
        Source: the sign test: each of n independent lengths is below the median with probability 1/2.
        """
        return median_interval(self.lengths)

    def state_dict(self) -> dict[str, Any]:
        """Returns the calibration as numbers."""
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
    """Returns the narrowest pair of opposite order statistics around the median with at least this probability.

    NaN if even the smallest and the largest value are not enough.
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
