"""The upper left part of the convex hull of a cloud, and the few rows among which its corners are."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from smoothdiag.fits.parts import Array

NUM_BINS = 256  # Bins of the first coordinate; the highest row of each makes a first guess of the hull.
ROUNDING = 1e-9  # A row that lies below the guess by less than this share of its height may still be a corner.


def outermost(x: Array, y: Array) -> npt.NDArray[np.intp]:
    """Indices of the rows that may be corners of the upper hull, in order; all other rows lie below a chord.

    Args:
        x: first coordinates.
        y: second coordinates, of any sign.
    """
    if len(x) <= 2 * NUM_BINS:
        return np.arange(len(x))
    low, width = float(np.min(x)), float(np.ptp(x))
    place = np.minimum((x - low) / (width / NUM_BINS), NUM_BINS - 1) if width > 0 else np.zeros(len(x))
    bins = place.astype(np.intp)
    top = np.full(NUM_BINS, -np.inf)
    np.maximum.at(top, bins, y)
    highest = np.flatnonzero(y == top[bins])
    highest = highest[np.unique(bins[highest], return_index=True)[1]]
    ends = [np.flatnonzero(x == end) for end in (low, float(np.max(x)))]
    guess = np.concatenate([highest, *(end[[np.argmax(y[end])]] for end in ends)])
    chain = _chain(x[guess], y[guess])
    height = np.interp(x, *chain.T)
    return np.flatnonzero(y >= height - ROUNDING * np.abs(height))


def upper_hull(x: Array, y: Array) -> Array:
    """Corners of the cloud that determine its frontier, as rows (x, y) in order of falling x.

    They are the corners of the upper left part of the convex hull, from the smallest gradient norm to the largest
    smoothness.
    """
    some = outermost(x, y)
    hull = _chain(x[some], y[some])
    return hull[: int(np.argmax(hull[:, 1])) + 1][::-1]


def _chain(x: Array, y: Array) -> Array:
    """Corners of the upper hull, as rows (x, y) in order of rising x."""
    order = np.lexsort((-y, x))
    hull: list[tuple[float, float]] = []
    for px, py in zip(x[order].tolist(), y[order].tolist(), strict=True):
        if hull and px == hull[-1][0]:
            continue
        while len(hull) > 1 and _bends_up(hull[-2], hull[-1], (px, py)):
            hull.pop()
        hull.append((px, py))
    return np.array(hull)


def _bends_up(first: tuple[float, float], middle: tuple[float, float], last: tuple[float, float]) -> bool:
    left = (middle[1] - first[1]) * (last[0] - middle[0])
    right = (last[1] - middle[1]) * (middle[0] - first[0])
    return left <= right
