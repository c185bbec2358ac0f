"""Ranges: keeps very large and very small numbers where their products and powers are floats, too."""

from __future__ import annotations

import math

import numpy as np

from smoothdiag.fits.base import Array

MOST_DECADES = 70
"""Largest range of gradient norms and of smoothness: the third power of one, times the other, is still a float."""
BEYOND = 2.0**500
"""Largest size of all other numbers, so that their products with both of these are floats."""


def check_decades(name: str, values: Array) -> None:
    """Refuses positive values that cover more than `MOST_DECADES`.

    Raises:
        ValueError: if they do.
    """
    least, largest = float(np.min(values)), float(np.max(values))
    if math.log10(largest) - math.log10(least) > MOST_DECADES:
        raise ValueError(
            f"Parameter `data` should have {name} within {MOST_DECADES} powers of ten. Found a range from {least:.4g} "
            f"to {largest:.4g}; leave out the rows whose values at one end of this range cannot be right."
        )


def unit(values: Array) -> int:
    """Power of two next to the median."""
    with np.errstate(over="ignore"):
        middle = np.median(values)
    # The median of an even number of values adds the two in the middle, and their sum may overflow.
    return int(np.frexp(middle)[1]) if np.isfinite(middle) else int(np.frexp(np.median(values / 4))[1]) + 2


def scaled(values: Array, power: int) -> Array:
    """The values times a power of two; finite values far beyond the range of any row are limited to `BEYOND`."""
    with np.errstate(over="ignore", under="ignore"):
        found = np.asarray(np.ldexp(values, power))
    size = np.abs(found)
    if not ((size > BEYOND) | (size < 1 / BEYOND)).any():
        return found
    found = np.where((size > BEYOND) & np.isfinite(values), np.copysign(BEYOND, values), found)
    return np.where((size < 1 / BEYOND) & (values != 0), np.copysign(1 / BEYOND, values), found)


def ldexp(value: float, power: int) -> float:
    """A number times a power of two; infinite if a float cannot hold the result."""
    try:
        return math.ldexp(value, power)
    except OverflowError:
        return math.copysign(math.inf, value)
