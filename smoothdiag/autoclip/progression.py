"""Progression: the steps of a run at which AutoClip measures and checks, ever further apart."""

from collections.abc import Iterator

GROWTH = 1.3
"""Ratio of one measured step number to the one before."""


def progression() -> Iterator[int]:
    """Yields the steps to measure: 0, 1, 2, 3, 4, 5, 6, 8, 10, 13, 17, 22, 29, 38, ..."""
    step = 0
    while True:
        yield step
        step = max(step + 1, round(GROWTH * step))


def is_in_progression(step: int, every: int = 1) -> bool:
    """Returns whether ``step`` is in the progression, or among every second, third, ... of its steps."""
    for number, found in enumerate(progression()):
        if found >= step:
            return found == step and number % every == 0
    raise AssertionError
