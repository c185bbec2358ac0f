"""Schedules: which optimizer steps a probe measures."""

import math
from dataclasses import dataclass
from typing import Protocol


class Schedule(Protocol):
    """Decides, before an optimizer step, whether that step is measured."""

    def __call__(self, step: int) -> bool:
        """Returns whether optimizer step ``step``, counted from 0, is measured."""
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
        # Step s is due if a point 10^(i / per_decade) falls into (s - 1, s]. The tolerance keeps 10^k in the
        # interval that ends at it although log10 rounds.
        index = math.floor(self.per_decade * math.log10(step) + 1e-9)
        return math.ceil(10 ** (index / self.per_decade) - 1e-9) == step


def every(n: int) -> Schedule:
    """Measures steps 0, n, 2n, ...

    Args:
        n: Interval in optimizer steps, at least 1.

    Raises:
        ValueError: If ``n`` is not a positive whole number.
    """
    return _Every(_positive_int("n", n))


def log_spaced(per_decade: int = 20) -> Schedule:
    """Measures step 0 and then steps spaced evenly in log(step): densely early, where training changes most.

    Args:
        per_decade: Steps measured between 10^k and 10^(k+1), at least 1; early decades have fewer steps.

    Raises:
        ValueError: If ``per_decade`` is not a positive whole number.
    """
    return _LogSpaced(_positive_int("per_decade", per_decade))


def _positive_int(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"Parameter `{name}` should be a whole number of at least 1. Found `{name} = {value!r}`.")
    return value
