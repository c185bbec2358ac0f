"""The walk to the exact minimum of a weighted pinball loss, along the lines through single rows.

A row far from the line matters only by the side on which it lies. So a walk over many rows keeps the nearest ones as
they are and sums up all others in two numbers. Afterwards it checks that each of the others is still on its side. If
so, it has found the exact minimum for all rows; if not, it keeps more rows and walks again.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from smoothdiag.fits.base import Array
from smoothdiag.fits.hull import outermost
from smoothdiag.fits.resamples import Counts, sums

# A residual below this share of height plus smoothness is rounding: the line passes through the point.
TOUCHING = 1e-11
MAX_PIVOTS = 10_000
SMALLEST = 1e-300  # No change of the height is smaller.
MANY = 3000  # Rows from which keeping only some of them is faster.

Start = tuple[float, float]
Mask = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.intp]


def walk(x: Array, y: Array, quantile: float, weights: Array, start: Start, is_close: bool = False) -> Start:
    """Intercept and slope that minimise the weighted pinball loss of all rows, both at zero or above.

    Args:
        x: gradient norms in units that make them about one.
        y: smoothness, likewise.
        quantile: level in (0, 1).
        weights: weight of each row, zero or above.
        start: intercept and slope of the line where the walk begins.
        is_close: whether hardly any row lies between the start and the minimum; it saves time if this is true.

    Source: Portnoy and Koenker, 1997, section 5, for summing up the far rows.
    """
    n = len(x)
    if n <= MANY:
        return _walk_to_vertex(x, y, quantile, weights, start)[0]
    if is_close:
        return Neighbours(x, y, start).walk(quantile, weights, start)
    some = slice(None, None, max(1, int(n ** (1 / 3) / 2)))
    near = walk(x[some], y[some], quantile, weights[some], start)
    return Neighbours(x, y, near).walk(quantile, weights, near)


class Neighbours:
    """Rows in order of their distance from a line, for walks to lines close to it.

    Args:
        x: gradient norms in units that make them about one.
        y: smoothness, likewise.
        line: the line from which distances are measured.
    """

    def __init__(self, x: Array, y: Array, line: Start) -> None:
        height = line[0] + line[1] * x
        self.x, self.y, self.above = x, y, y > height
        self.distance = np.abs(y - height) / (y + height)
        # For independent rows this is enough to reach the lines of nearly all resamples; a failed check doubles it.
        self._keep(int(2 * len(x) ** (2 / 3)) + 10)

    def _keep(self, num_rows: int) -> None:
        """Keeps about as many of the nearest rows, or all."""
        self.wanted = num_rows
        near = np.arange(len(self.x))
        if num_rows < len(self.x):
            near = np.flatnonzero(self.distance <= _about(self.distance, num_rows / len(self.x)))
        self.kept = len(near)
        self.near = near[np.argsort(self.distance[near], kind="stable")]
        self.far = np.ones(len(self.x), dtype=np.bool_)
        self.far[near] = False

    def walk(self, quantile: float, weights: Array, start: Start) -> Start:
        """As the function `walk`."""
        while True:
            rate = self._rate(quantile, weights)
            tilt = float(np.sum(rate)), float(rate @ self.x)
            found, bounded = self._walk_near(quantile, weights[self.near], start, tilt)
            if self.kept == len(self.x) or (bounded and self._still_apart(found)):
                return found
            self._keep(2 * self.wanted)

    def walk_all(self, quantile: float, weights: Array, counts: Counts, start: Start) -> Array:
        """As `walk`, for each row of counts that multiply the weights; one (intercept, slope) per row.

        No walk looks at the far rows: their sums are found for all counts together, and only those of them that a line
        meets first are checked.
        """
        found: list[Start] = []
        tilts, first = self._sums(quantile, weights, counts), self._met_first()
        while len(found) < len(counts):
            number = len(found)
            again = weights[self.near] * counts[number, self.near]
            line, bounded = self._walk_near(quantile, again, start, (float(tilts[number, 0]), float(tilts[number, 1])))
            if self.kept == len(self.x) or (bounded and _apart(line, *first).all()):
                found.append(line)
            else:
                self._keep(2 * self.wanted)
                tilts, first = self._sums(quantile, weights, counts), self._met_first()
        return np.array(found)

    def _walk_near(self, quantile: float, weights: Array, start: Start, tilt: Start) -> tuple[Start, bool]:
        return _walk_to_vertex(self.x[self.near], self.y[self.near], quantile, weights, start, tilt)

    def _rate(self, quantile: float, weights: Array) -> Array:
        """How fast the loss of each far row changes as the line rises; zero for near rows."""
        rate = np.where(self.above, -quantile, 1 - quantile) * weights
        rate[self.near] = 0.0
        return np.asarray(rate)

    def _sums(self, quantile: float, weights: Array, counts: Counts) -> Array:
        """Slopes of the loss of the far rows in intercept and slope, for all counts."""
        rate = self._rate(quantile, weights)
        return sums(counts, np.stack([rate, rate * self.x], axis=1))

    def _still_apart(self, line: Start) -> bool:
        return bool((_apart(line, self.x, self.y, self.above) | ~self.far).all())

    def _met_first(self) -> tuple[Array, Array, Mask]:
        """The far rows of which a line meets one first: the corners of those above and of those below it."""
        above, below = np.flatnonzero(self.far & self.above), np.flatnonzero(self.far & ~self.above)
        corners = [part[outermost(self.x[part], sign * self.y[part])] for part, sign in ((above, -1), (below, 1))]
        rows = np.concatenate(corners)
        return self.x[rows], self.y[rows], self.above[rows]


def _apart(line: Start, x: Array, y: Array, above: Mask) -> Mask:
    """Whether each row is on its side of the line."""
    height = line[0] + line[1] * x
    distance = np.where(above, y - height, height - y)
    return np.asarray(distance > TOUCHING * (height + y))


class _Loss(NamedTuple):
    """Pinball loss of weighted rows plus a linear one, and its units: a rate, and where the gradient norms lie."""

    x: Array
    quantile: float
    weights: Array
    tilt: Start
    scale: float
    middle: float
    spread: float


def _walk_to_vertex(
    x: Array, y: Array, quantile: float, weights: Array, start: Start, tilt: Start = (0.0, 0.0)
) -> tuple[Start, bool]:
    """Minimiser of the weighted pinball loss plus a linear one, by line searches along the kinks of the loss.

    The loss is convex and piecewise linear in (intercept, slope). Each row makes one kink: the set of lines through
    that row. So the loss is minimal where it does not fall along any kink through the current point, nor along the two
    axes, which are needed if fewer than two kinks meet.

    Returns:
        tuple[Start, bool]: the minimiser, and whether there is one: with a tilt the loss may fall for ever.
    """
    a, b = start
    loss = _Loss(
        x,
        quantile,
        weights,
        tilt,
        float(weights @ np.abs(x)) + float(np.sum(weights)),
        float(np.mean(x)),
        float(np.std(x)),
    )
    for _ in range(MAX_PIVOTS):
        rise = b * x
        residual = y - a - rise
        touching = np.abs(residual) <= TOUCHING * (a + rise + y)
        direction, descent = _steepest_kink(loss, residual, touching, (a, b))
        if direction is None:
            return (float(a), float(b)), True
        da, db = direction
        length = _line_search(residual, da + db * x, ~touching, weights, descent)
        to_zero = min((-v / change for v, change in ((a, da), (b, db)) if change < 0), default=np.inf)
        if to_zero <= length:  # A step that ends on a bound ends exactly there, not a rounding error away.
            if to_zero == np.inf:
                return (float(a), float(b)), False
            length = to_zero
            a, b = (
                0.0 if change < 0 and -v / change == length else v + length * change for v, change in ((a, da), (b, db))
            )
        else:
            a, b = a + length * da, b + length * db
    return (float(a), float(b)), False


def _steepest_kink(loss: _Loss, residual: Array, touching: Mask, at: Start) -> tuple[Start | None, float]:
    """The direction along a kink or an axis in which the loss falls fastest, and its (negative) rate.

    Fastest means per mean change of the height of the line, so it does not depend on where gradient norms begin. Per
    change of intercept and slope, a walk over gradient norms that hardly vary would take thousands of small steps.
    """
    x, quantile, weights, tilt = loss.x, loss.quantile, loss.weights, loss.tilt
    signs = np.where(touching, 0.0, np.where(residual > 0, quantile, quantile - 1)) * weights
    slope_a, slope_b = tilt[0] - float(np.sum(signs)), tilt[1] - float(signs @ x)
    touched = np.flatnonzero(touching)
    touched = touched[np.argsort(x[touched], kind="stable")]
    xt, wt = x[touched], weights[touched]
    below_w, below_wx = np.cumsum(wt), np.cumsum(wt * xt)
    total_w, total_wx = (float(below_w[-1]), float(below_wx[-1])) if len(xt) else (0.0, 0.0)
    # A turn about row j moves the touched rows on its left and on its right in opposite directions.
    left = below_w * xt - below_wx
    right = (total_wx - below_wx) - (total_w - below_w) * xt
    turn = slope_b - xt * slope_a
    up = turn + quantile * left + (1 - quantile) * right
    down = -turn + (1 - quantile) * left + quantile * right
    axes = (
        slope_a + (1 - quantile) * total_w,
        -slope_a + quantile * total_w,
        slope_b + (1 - quantile) * total_wx,
        -slope_b + quantile * total_wx,
    )
    rate = np.concatenate([up, down, axes])
    da = np.concatenate([-xt, xt, (1.0, -1.0, 0.0, 0.0)])
    db = np.concatenate([np.ones(len(xt)), np.full(len(xt), -1.0), (0.0, 0.0, 1.0, -1.0)])
    feasible = ((at[0] > 0) | (da >= 0)) & ((at[1] > 0) | (db >= 0))
    falls = feasible & (rate < -1e-12 * loss.scale * (np.abs(da) + np.abs(db)))
    if not falls.any():
        return None, 0.0
    size = np.abs(da + db * loss.middle) + np.abs(db) * loss.spread
    best = int(np.argmin(np.where(falls, rate / np.maximum(size, SMALLEST), 0.0)))
    return (float(da[best]), float(db[best])), float(rate[best])


def _line_search(residual: Array, movement: Array, apart: Mask, weights: Array, descent: float) -> float:
    """Length along a descent direction at which the loss stops falling (a weighted quantile of crossings)."""
    moving = np.flatnonzero((residual * movement > 0) & apart)
    pace = movement[moving]
    crossings, gains = residual[moving] / pace, weights[moving] * np.abs(pace)
    if len(crossings) > 400:  # The end is mostly among the first crossings, and then only these need an order.
        found, _ = _end(crossings, gains, np.flatnonzero(crossings <= _about(crossings, 1 / 8)), descent)
        if found is not None:
            return found
    found, gained = _end(crossings, gains, np.arange(len(crossings)), descent)
    if found is not None:
        return found
    flat = len(crossings) > 0 and gained >= -descent * (1 - 1e-9)  # The last crossing is the end, up to rounding.
    return float(np.max(crossings)) if flat else np.inf


def _end(crossings: Array, gains: Array, some: Indices, descent: float) -> tuple[float | None, float]:
    """Where the loss stops falling if it does so at one of some crossings, and what all of these gain."""
    some = some[np.argsort(crossings[some])]
    gained = np.cumsum(gains[some])
    stop = int(np.searchsorted(gained, -descent * (1 - 1e-13)))
    total = float(gained[-1]) if len(gained) else 0.0
    return (float(crossings[some[stop]]) if stop < len(some) else None), total


def _about(values: Array, share: float) -> float:
    """A number below which about this share of the values lies, from one in eleven."""
    some = values[::11]
    return float(np.partition(some, at := int(share * (len(some) - 1)))[at])
