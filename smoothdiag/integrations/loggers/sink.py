"""Sink: the place that a writer writes numbers, texts and figures to."""

import sys
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]


class Sink(Protocol):
    """The place that a writer writes numbers, texts and figures to."""

    def start(self, steps: int) -> None:
        """Called once before anything is written, with the number of optimizer steps taken so far."""
        ...

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the numbers of one optimizer step, by name; all of them are finite."""
        ...

    def text(self, step: int, name: str, text: str) -> None:
        """Writes a text, which replaces the earlier one of this name. A sink without texts does nothing."""
        ...

    def image(self, step: int, name: str, pixels: Pixels) -> None:
        """Writes a figure of shape (height, width, 4), 8-bit RGBA. A sink without images does nothing."""
        ...

    def close(self) -> None:
        """Writes the rest and closes; also called once at the end if an earlier call has failed."""
        ...


def check_new(name: str, options: Mapping[str, Any], make: str, *, is_new: bool) -> None:
    """Makes sure that options for a new run are given only where one is made.

    Args:
        name: Name of the parameter that holds the options.
        options: The options.
        make: The function that makes a run.
        is_new: Whether a run is made.

    Raises:
        ValueError: If there are options for a run that is there already.
    """
    if options and not is_new:
        raise ValueError(
            f"Parameter `{name}` should be empty if there is a run already. Found {', '.join(options)}. "
            f"Pass these arguments to the `{make}` that makes the run."
        )


def is_failing() -> bool:
    """Whether an exception is under way, as when a ``with`` block ends by one; trackers mark such runs as failed."""
    return sys.exc_info()[0] is not None
