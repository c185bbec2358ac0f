"""Search: the next point on a line, where the gradient norm has moved."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from smoothdiag import vectors
from smoothdiag.measure.loss.objective import Evaluation
from smoothdiag.measure.scan.arcs import Arcs
from smoothdiag.vectors import Vector

TOLERANCE = 0.25
"""Largest deviation, relative to the spacing, of what log ||g|| moves by from one point to the next."""

LAST = 0.3
"""Smallest move of log ||g|| that makes a last point where a line ends. Closer points are hardly independent."""

NEAREST = 0.04
"""Distance to the last point, relative to ||x||, below which points are copies of each other (first look at scans of
five small nets)."""

LONGER, SHORTER = 4.0, 0.1
"""Largest factor on a distance that turned out too short, and smallest share of a bracket to try next."""

MAX_TRIES = 8
"""Gradients for one point; usually one or two are needed."""

MAX_OUTSIDE = 3
"""Of these, how many look for a point in front of one where the loss is too large or not finite."""

SHORT_STEP = 0.5
"""Step of descent in units of 1/||H||. Gradient descent is stable below 2 and overshoots along no direction below 1."""

STEPS_A_TURN = 40
"""Steps of descent until the other lines get their turn."""

Evaluate = Callable[[Vector], Evaluation]


@dataclass(frozen=True)
class Limits:
    """Where lines end.

    Attributes:
        max_loss: Largest loss [f].
        farthest: Largest distance from x [x]; relative to the norm of what moves before `within` was called.
        nearest: Smallest distance between two points of a line, likewise.
        spacing: How far log ||g|| should move from one point to the next.
    """

    max_loss: float
    farthest: float
    nearest: float
    spacing: float

    def within(self, size: float) -> "Limits":
        """Returns the limits of a line that moves parameters of the norm ``size`` [x]."""
        return replace(self, farthest=self.farthest * size, nearest=self.nearest * size)

    @property
    def least(self) -> float:
        """The smallest move of log ||g|| that makes a new point."""
        return (1 - TOLERANCE) * self.spacing

    @property
    def most(self) -> float:
        """The largest move of log ||g|| that is not shortened."""
        return (1 + TOLERANCE) * self.spacing

    def end(self, found: Evaluation) -> str:
        """Returns why a line ends at a point; nothing if it does not."""
        if not (math.isfinite(found.loss) and math.isfinite(float(vectors.norm(found.gradient)))):
            return "not finite"
        return "loss" if found.loss > self.max_loss else ""


@dataclass(frozen=True)
class Reached:
    """A point that a line has reached.

    Attributes:
        point: The point.
        found: Loss and gradient there.
        ended: Why the line ends here without a measurement; nothing if the point is to be measured.
    """

    point: list[Tensor]
    found: Evaluation
    ended: str = ""


class Straight:
    """A straight line from x, or an arc where blocks keep their norm.

    Args:
        start: x.
        first: Loss and gradient at x.
        direction: u, of length 1.
        arcs: Blocks that keep their norm.
        limits: Where the line ends.
        guess: First distance to try [x].

    Attributes:
        taken: Length of the last way from one point to the next [x].
        ended: Why the line goes no further; nothing as long as it does.
    """

    def __init__(
        self, start: Vector, first: Evaluation, direction: Vector, arcs: Arcs, limits: Limits, guess: float
    ) -> None:
        self._start, self._first, self._direction, self._arcs, self._limits = start, first, direction, arcs, limits
        self._at, self._log = 0.0, _log_norm(first)
        self.taken, self._next = guess, guess
        self.ended = "" if float(vectors.norm(direction)) else "no direction"

    def advance(self, evaluate: Evaluate, smoothness: float) -> Reached | None:
        """Returns the next point, or where the line ends.

        Args:
            evaluate: Returns loss and gradient at a point.
            smoothness: ||H|| at the last point [f/x^2]; a straight line does not need it.
        """
        if self.ended:
            return Reached(list(self._start), self._first, self.ended)
        limits, origin, aim = self._limits, self._at, self._limits.spacing
        low, low_moved, high_moved, t = origin, 0.0, math.inf, origin + self._next
        high: tuple[float, Reached] | None = None
        last: Reached | None = None
        outside = 0
        for _ in range(MAX_TRIES):
            t = min(max(t, origin + limits.nearest), limits.farthest)
            found = evaluate(point := self._point(t))
            reached = Reached(point, found, limits.end(found))
            moved = math.inf if reached.ended else _moved(self._log, found)
            if limits.least <= moved <= limits.most:
                return self._accept(t, reached)
            if moved < limits.least:
                low, low_moved, last = t, moved, reached
                if t >= limits.farthest:
                    break
            else:
                high, high_moved = (t, reached), moved
                outside += bool(reached.ended)
            if high is None:
                t = origin + (t - origin) * min(LONGER, aim / moved if moved else LONGER)
                continue
            if outside > MAX_OUTSIDE or high[0] - max(low, origin + limits.nearest) <= limits.nearest / 2:
                break
            share = (aim - low_moved) / (high_moved - low_moved) if high_moved < math.inf else 0.5
            t = low + (high[0] - low) * max(share, SHORTER)
        if high is not None and not high[1].ended:
            return self._accept(*high)
        why = high[1].ended if high is not None else "distance" if low >= limits.farthest else "flat"
        if last is not None and low_moved >= LAST:
            self.ended = why
            return self._accept(low, last)
        return self._end(high[1] if high is not None else replace(reached, ended=why))

    def _accept(self, t: float, reached: Reached) -> Reached:
        moved = _moved(self._log, reached.found)
        self.taken = t - self._at
        self._next = self.taken * min(max(self._limits.spacing / moved, 0.5), 2.0)
        self._at, self._log = t, _log_norm(reached.found)
        if t >= self._limits.farthest:
            self.ended = "distance"
        return reached

    def _end(self, reached: Reached) -> Reached:
        self.ended = reached.ended
        return reached

    def _point(self, t: float) -> list[Tensor]:
        return self._arcs.bend(vectors.add_scaled(self._start, self._direction, t))


class Descent:
    """Gradient descent on the fixed batch, in steps shorter than 1/||H||, until the gradient norm has moved.

    Args:
        start: x.
        first: Loss and gradient at x.
        arcs: Blocks that keep their norm.
        limits: Where the line ends.

    Attributes:
        taken: Length of the last way from one point to the next [x].
        ended: Why the line goes no further; nothing as long as it does.
    """

    def __init__(self, start: Vector, first: Evaluation, arcs: Arcs, limits: Limits) -> None:
        self._here, self._arcs, self._limits = Reached(list(start), first), arcs, limits
        self._log, self._start = _log_norm(first), start
        self._shortened = 1.0
        self.taken, self.ended = 0.0, ""

    def advance(self, evaluate: Evaluate, smoothness: float) -> Reached | None:
        """Returns the next point, where the descent ends, or ``None`` if it goes on at the next turn.

        Args:
            evaluate: Returns loss and gradient at a point.
            smoothness: ||H|| at the last point [f/x^2].
        """
        for _ in range(STEPS_A_TURN):
            here = self._here
            if not smoothness > 0 or not float(vectors.norm(here.found.gradient)):
                return self._end(Reached(here.point, here.found, "flat"))
            step = SHORT_STEP / smoothness * self._shortened
            point = self._arcs.bend(vectors.add_scaled(here.point, here.found.gradient, -step))
            found = evaluate(point)
            if end := self._limits.end(found):
                return self._end(Reached(point, found, end))
            if found.loss > here.found.loss:  # ||H|| has grown since it was measured
                self._shortened /= 2
                continue
            self._here = Reached(point, found)
            self.taken = float(vectors.norm(vectors.sub(point, self._start)))
            if self.taken >= self._limits.farthest:
                return self._end(Reached(point, found, "distance"))
            if _moved(self._log, found) >= self._limits.least:
                self._log, self._shortened = _log_norm(found), 1.0
                return self._here
        return None

    def _end(self, reached: Reached) -> Reached:
        self.ended = reached.ended
        return reached


def _log_norm(found: Evaluation) -> float:
    length = float(vectors.norm(found.gradient))
    return math.log(length) if length > 0 else -math.inf


def _moved(before: float, found: Evaluation) -> float:
    """Returns how far log ||g|| has moved; 0 from no gradient to none."""
    now = _log_norm(found)
    return 0.0 if now == before else abs(now - before)
