"""Schedules: say which optimizer steps a probe measures."""

import math
import time
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from smoothdiag import arguments


class Schedule(Protocol):
    """Decides, before an optimizer step, whether that step is measured.

    Examples:
        Every step of a warm-up, and one in ten later:

        >>> def schedule(step: int) -> bool: return step < 3 or step % 10 == 0
        >>> [step for step in range(25) if schedule(step)]
        [0, 1, 2, 10, 20]
    """

    def __call__(self, step: int) -> bool:
        """Returns whether optimizer step ``step``, counted from 0, is measured."""
        ...


@runtime_checkable
class Adaptive(Protocol):
    """A schedule that adapts to the cost of steps and measurements."""

    next: int

    def interval(self, train_seconds: float, steps: int, probe_seconds: float) -> int:
        """Returns how many steps to wait; the probe then sets ``next``, to the same step on every rank.

        Args:
            train_seconds: Training time since the last measurement.
            steps: Optimizer steps in that time.
            probe_seconds: Duration of the measurement that has just ended.
        """
        ...


@dataclass(frozen=True)
class _Every:
    n: int

    def __call__(self, step: int) -> bool:
        return step % self.n == 0


@dataclass(frozen=True)
class _LogSpaced:
    per_decade: int

    def __call__(self, step: int) -> bool:
        if step == 0:
            return True
        # Step s is due if a point 10^(i / per_decade) lies in (s - 1, s]. log10 rounds; the tolerance keeps 10^k in the
        # interval that ends there.
        index = math.floor(self.per_decade * math.log10(step) + 1e-9)
        return math.ceil(10 ** (index / self.per_decade) - 1e-9) == step


@dataclass
class _Budget:
    fraction: float
    next: int = 0
    train_seconds: float = 0.0
    probe_seconds: float = 0.0

    def __call__(self, step: int) -> bool:
        return step >= self.next

    def interval(self, train_seconds: float, steps: int, probe_seconds: float) -> int:
        self.train_seconds += train_seconds
        self.probe_seconds += probe_seconds
        if train_seconds <= 0 or steps < 1:
            return 1
        # Wait until one more measurement like the last one stays within the share of all time so far. That also pays
        # back the extra cost of the first measurement (self-test, compilation).
        allowed = self.fraction / (1 - self.fraction)
        missing = (self.probe_seconds + probe_seconds) / allowed - self.train_seconds
        return max(1, math.ceil(missing / (train_seconds / steps)))


class Stopwatch:
    """Times steps and measurements for a schedule that adapts to them.

    Attributes:
        steps: Optimizer steps since the last measurement.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._since: float | None = None

    def start(self) -> None:
        """Starts the clock, unless it is running."""
        if self._since is None:
            self._since = time.perf_counter()

    def interval(self, schedule: Adaptive, began: float) -> int:
        """Returns the steps to wait after a measurement that has just ended, and restarts the clock.

        Args:
            schedule: The schedule that asked for the measurement.
            began: When the measurement began.
        """
        now, trained = time.perf_counter(), 0.0 if self._since is None else began - self._since
        steps, self.steps, self._since = self.steps, 0, now
        return schedule.interval(trained, steps, now - began)


def every(n: int) -> Schedule:
    """Measures steps 0, n, 2n, ...

    Args:
        n: Interval in optimizer steps, at least 1.

    Raises:
        ValueError: If ``n`` is not a positive whole number.

    Examples:
        >>> schedule = sd.every(20)
        >>> [step for step in range(50) if schedule(step)]
        [0, 20, 40]
    """
    arguments.whole("n", n, 1)
    return _Every(n)


def log_spaced(per_decade: int = 20) -> Schedule:
    """Measures step 0 and then steps spaced evenly in log(step): most of them early, where training changes most.

    Args:
        per_decade: Steps measured between 10^k and 10^(k+1), at least 1; early decades have fewer steps.

    Raises:
        ValueError: If ``per_decade`` is not a positive whole number.

    Examples:
        >>> schedule = sd.log_spaced(per_decade=3)
        >>> [step for step in range(1001) if schedule(step)]
        [0, 1, 3, 5, 10, 22, 47, 100, 216, 465, 1000]
    """
    arguments.whole("per_decade", per_decade, 1)
    return _LogSpaced(per_decade)


def budget(fraction: float = 0.05) -> Schedule:
    """Measures as often as possible while measurements take at most this share of the run's time.

    The schedule times steps and measurements during the run, and sets the next measurement after each one. Early in the
    run the share can be higher, until the first measurements are paid for. Under data parallelism the first rank
    decides for all.

    Args:
        fraction: Largest share of the run's time that measurements may take, in (0, 1).

    Raises:
        ValueError: If ``fraction`` is not in (0, 1).

    Examples:
        After 4 steps of 1 second each, the first measurement takes 2 seconds. A second one like it makes 4 seconds of
        measuring, which is 20% of the time once training has taken 16 seconds: the probe waits for 12 more steps.

        >>> schedule = sd.budget(0.2)
        >>> schedule.interval(train_seconds=4.0, steps=4, probe_seconds=2.0)
        12
    """
    arguments.number("fraction", fraction, "in (0, 1)", lambda v: 0 < v < 1)
    return _Budget(fraction)
