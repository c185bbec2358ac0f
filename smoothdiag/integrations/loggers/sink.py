"""Sink: the place that a writer writes numbers, texts and figures to."""

import sys
from collections.abc import Mapping
from typing import Protocol

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


def is_failing() -> bool:
    """Whether an exception is under way, as when a ``with`` block ends by one; trackers mark such runs as failed."""
    return sys.exc_info()[0] is not None
