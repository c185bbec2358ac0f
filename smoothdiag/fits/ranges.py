"""Ranges: numbers near the ends of what a float holds, kept where products and powers of them are floats too."""

from __future__ import annotations

import math

import numpy as np

from smoothdiag.fits.base import Array

MOST_DECADES = 70
"""Range of gradient norms and of smoothness, so that the third power of one, times the other, is a float."""
BEYOND = 2.0**500
"""Size within which all else is kept, so that products with both of them are floats."""


def check_decades(name: str, values: Array) -> None:
    """Refuses positive values that cover more than `MOST_DECADES`.

    Raises:
        ValueError: where they do.
    """
    least, largest = float(np.min(values)), float(np.max(values))
    if math.log10(largest) - math.log10(least) > MOST_DECADES:
        raise ValueError(
            f"Parameter `data` should have {name} within {MOST_DECADES} powers of ten. Found a range from {least:.4g} "
            f"to {largest:.4g}; leave out the rows at the end that means nothing."
        )


def unit(values: Array) -> int:
    """Power of two next to the median."""
    with np.errstate(over="ignore"):
        middle = np.median(values)
    # Two values in the middle are added, which may be more than a float holds.
    return int(np.frexp(middle)[1]) if np.isfinite(middle) else int(np.frexp(np.median(values / 4))[1]) + 2


def scaled(values: Array, power: int) -> Array:
    """The values times a power of two; what is finite and far beyond the range of any row stays within `BEYOND`."""
    with np.errstate(over="ignore", under="ignore"):
        found = np.asarray(np.ldexp(values, power))
    size = np.abs(found)
    if not ((size > BEYOND) | (size < 1 / BEYOND)).any():
        return found
    found = np.where((size > BEYOND) & np.isfinite(values), np.copysign(BEYOND, values), found)
    return np.where((size < 1 / BEYOND) & (values != 0), np.copysign(1 / BEYOND, values), found)


def ldexp(value: float, power: int) -> float:
    """A number times a power of two; infinite where no float holds it."""
    try:
        return math.ldexp(value, power)
    except OverflowError:
        return math.copysign(math.inf, value)
