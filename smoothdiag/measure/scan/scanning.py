"""Scanning: measures points along lines out of one checkpoint in turn, and appends the rows to a trace."""

import itertools
import math
import time
from collections.abc import Hashable, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from torch import Tensor
from tqdm import tqdm

from smoothdiag import vectors
from smoothdiag.measure.curvature import Choice, choose
from smoothdiag.measure.curvature.spectrum import Spectrum
from smoothdiag.measure.estimators import DirectionalCurvature, Estimate, Estimator, HessianNorm, Status, Step
from smoothdiag.measure.estimators.hessian import WARM_PRODUCTS
from smoothdiag.measure.loss.objective import Evaluation, Objective
from smoothdiag.measure.recording import rows_of
from smoothdiag.measure.scan.arcs import Arcs
from smoothdiag.measure.scan.costs import Budget, Exhausted, cheapest, products_within
from smoothdiag.measure.scan.lines import Targets, direction, reach_of
from smoothdiag.measure.scan.search import Descent, Limits, Reached, Straight
from smoothdiag.trace import Trace
from smoothdiag.vectors import Vector

TOL: Final = 0.03
"""Relative error of ||H|| along a line. A tenth would save one gradient of seven, but then one error in twenty is above
5 to 8% instead of 1 to 2% (benchmarks/scan_cost.py)."""

FAR: Final = 1.5
"""Distance from x, relative to ||x||, beyond which one-sided products may be off by a quarter and look fine, so that
those of x are used (a GPT at initialisation; benchmarks/scan_cost.py)."""

MAX_FAILURES, MAX_FAILED_SHARE = 2, 0.1
"""Points, and share of the points, that one-sided products may fail at before the scan uses those of x everywhere. In
smooth nets they fail at 0 to 5% of the points, and in nets with kinks at most of them (benchmarks/scan_cost.py)."""

MAX_PRODUCTS: Final = 40
MAX_CHEAP_PRODUCTS: Final = 12
"""Most products for one ||H||. Where one-sided products need more than a dozen, their errors keep them from
converging."""

LEAST_FOR_A_POINT: Final = 7
"""Gradients that must be left to begin a point: one or two for the search, and a measurement of five."""

FIRST_GUESS: Final = 0.1
"""First distance to try, relative to the norm of what moves, until another line of the kind has found its own."""


@dataclass
class Track:
    """A line in progress.

    Attributes:
        name: Its name.
        line: The line.
        size: Norm of what moves along it [x].
        memory: What estimators keep from one of its points for the next.
        smoothness: ||H|| at its last point [f/x^2].
        point: Number of its last point.
    """

    name: str
    line: Straight | Descent
    size: float
    memory: MutableMapping[Hashable, Any]
    smoothness: float
    point: int = 0


@dataclass
class Scanning:
    """A scan of one checkpoint, inside ``objective.isolated()``.

    Args:
        objective: The loss on fixed data.
        start: x.
        first: Loss and gradient at x.
        budget: The gradients to use.
        trace: Where rows go.
        step: Training step of the checkpoint.
        estimators: What to measure; ``None`` for ||H|| as cheaply as it is accurate enough.
        arcs: Blocks that keep their norm along lines.
        limits: Where lines end.
        targets: What the user gave to walk towards.
        seed: Seed of the random lines.
        bar: Shows the gradients used.
    """

    objective: Objective
    start: Vector
    first: Evaluation
    budget: Budget
    trace: Trace
    step: int
    estimators: Sequence[Estimator] | None
    arcs: Arcs
    limits: Limits
    targets: Targets
    seed: int
    bar: "tqdm[Any]"
    _exact: Choice = field(init=False)
    _cheap: Choice = field(init=False)
    _memory: MutableMapping[Hashable, Any] = field(default_factory=dict, init=False)
    _smoothness: float = field(default=math.nan, init=False)
    _guesses: dict[str, float] = field(default_factory=dict, init=False)
    _dearest: int = field(default=LEAST_FOR_A_POINT, init=False)
    _num_cheap: int = field(default=0, init=False)
    _num_failed: int = field(default=0, init=False)
    _clock: float = field(default=0.0, init=False)

    @property
    def size(self) -> float:
        """||x|| [x], or 1 if x is zero."""
        return float(vectors.norm(self.start)) or 1.0

    def run(self, names: Sequence[str], at_once: int, points: int, columns: dict[str, Any]) -> None:
        """Measures x, then point 1 of every line, point 2 of every line, and so on.

        Args:
            names: The lines.
            at_once: Lines that advance in turn; where one of them ends, the next line takes its place.
            points: Most points of a line.
            columns: Further columns of the row at x.
        """
        self._clock = time.perf_counter()
        self._begin(columns)
        waiting = iter(names)
        turn: list[str | Track] = list(itertools.islice(waiting, at_once))
        while turn:
            following: list[str | Track] = []
            for line in turn:
                if self.budget.left < self._dearest:
                    return
                track = self._track(line) if isinstance(line, str) else line
                self.bar.set_description(f"scan, {track.name} {track.point + 1}", refresh=False)
                self._advance(track)
                if not track.line.ended and track.point < points:
                    following.append(track)
                else:
                    following.extend(itertools.islice(waiting, 1))
            turn = following

    def _begin(self, columns: dict[str, Any]) -> None:
        """Chooses how products are made, and measures x from nothing and accurately."""
        self._exact = self._cheap = choose(self.objective, self.start, autocast=False)
        here = Reached(list(self.start), self.first)
        step = self._step(here, self._memory)
        names: set[str] = set()
        for estimator in self._at(self._exact, accurate=True):
            estimate = estimator(step)
            if estimate.estimator in names:
                raise ValueError(
                    "Parameter `estimators` should hold estimators whose rows have different names. Found two named "
                    f"`{estimate.estimator}`."
                )
            names.add(estimate.estimator)
            if estimate.estimator == "hessian_norm":
                self._smoothness = estimate.smoothness
                if self.estimators is None:
                    self._cheapen()
            reason = {"hvp_reason": self._cheap.reason} if "hvp" in estimate.extra else {}
            self._record(step, estimate, "start", 0, columns | reason)

    def _cheapen(self) -> None:
        known: Spectrum | None = self._memory.get(("hessian_norm", "", "all"))
        if known is not None:
            v = known.pairs[0].vector
            self._cheap = cheapest(self.objective, self.start, self.first.gradient, v, self._exact)

    def _track(self, name: str) -> Track:
        line: Straight | Descent
        size = reach_of(name, self.start, self.targets)
        limits = self.limits.within(size)
        if name == "descent":
            line = Descent(self.start, self.first, self.arcs, limits)
        else:
            u = direction(name, self.start, self.first.gradient, self.targets, seed=self.seed)
            guess = self._guesses.get(_kind(name), FIRST_GUESS) * size
            line = Straight(self.start, self.first, u, self.arcs, limits, guess)
        return Track(name, line, size, dict(self._memory), self._smoothness)

    def _advance(self, track: Track) -> None:
        """Takes a line to its next point and measures there, or records where it ended."""
        try:
            reached = track.line.advance(self.budget.evaluate, track.smoothness)
        except Exhausted:
            reached = None if self.budget.last is None else Reached(*self.budget.last, "budget")
        if reached is None:
            return
        track.point += 1
        if track.point == 1:
            self._guesses[_kind(track.name)] = track.line.taken / track.size
        if reached.ended:
            self._record_end(track, reached)
            return
        step = self._step(reached, track.memory)
        before = self.budget.spent
        is_far = self._distance(step) > FAR * self.size
        choice = self._exact if is_far or self._fails_often else self._cheap
        self._num_cheap += choice != self._exact
        for estimator in self._at(choice, accurate=False):
            estimate = estimator(step)
            if choice != self._exact and self._may_be_better(estimate):
                self._num_failed += 1
                (again,) = self._at(self._exact, accurate=False)
                estimate = again(step)
            if estimate.estimator == "hessian_norm" and math.isfinite(estimate.smoothness):
                track.smoothness = estimate.smoothness
            self._record(step, estimate, track.name, track.point, {})
        self._dearest = max(self._dearest, self.budget.spent - before + 1)

    @property
    def _fails_often(self) -> bool:
        """Whether one-sided products have failed at so many points that they cost more than they save."""
        return self._num_failed >= MAX_FAILURES and self._num_failed >= MAX_FAILED_SHARE * self._num_cheap

    def _may_be_better(self, estimate: Estimate) -> bool:
        """Whether one-sided products failed at a point, and the budget allows for those that are used at x."""
        fails = estimate.status in (Status.RADIUS_DEPENDENT, Status.NOT_CONVERGED)
        return fails and products_within(self.budget.left, self._exact) >= WARM_PRODUCTS

    def _distance(self, step: Step) -> float:
        """Returns ||y - x|| [x]."""
        return float(vectors.norm(vectors.sub(step.start, self.start)))

    def _at(self, choice: Choice, *, accurate: bool) -> list[Estimator]:
        """Returns the estimators for a point, which choose no backend of their own."""
        if self.estimators is None:
            if accurate:
                return [HessianNorm(backend=choice)]
            limit = MAX_PRODUCTS if choice == self._exact else MAX_CHEAP_PRODUCTS
            most = max(min(limit, products_within(self.budget.left, choice)), 1)
            return [HessianNorm(tol=TOL, max_products=most, backend=choice)]
        return [
            replace(one, backend=choice)
            if isinstance(one, HessianNorm | DirectionalCurvature) and one.backend == "auto" and not one.autocast
            else one
            for one in self.estimators
        ]

    def _step(self, reached: Reached, memory: MutableMapping[Hashable, Any]) -> Step:
        return Step(
            index=self.step,
            objective=self.objective,
            start=reached.point,
            end=reached.point,
            lr=math.nan,
            gradient_error=self._exact.gradient_error or 0.0,
            known_start=reached.found,
            memory=memory,
            full_precision=True,
        )

    def _record(self, step: Step, estimate: Estimate, name: str, point: int, columns: dict[str, Any]) -> None:
        distance, size = self._distance(step), float(vectors.norm(self.start))
        place = {
            "scan": name,
            "point": point,
            "distance": distance,
            "relative_distance": distance / size if size else math.nan,
        }
        now = time.perf_counter()
        cost = {"num_grads": self.budget.book(), "seconds": now - self._clock}
        self._clock = now
        lrs = [math.nan] * len(step.start)
        for row in rows_of(step, estimate, lrs, data="fixed", override=None, cost=cost):
            self.trace.append({**row, **place, **columns})
        self.bar.update(self.budget.spent - self.bar.n)

    def _record_end(self, track: Track, reached: Reached) -> None:
        """Records where a line ended, without a measurement: the gradients of the search belong to this row."""
        status = Status.NON_FINITE if reached.ended == "not finite" else Status.END_OF_LINE
        step = self._step(reached, {})
        size: Tensor = vectors.norm(reached.found.gradient)
        empty = Estimate(
            "hessian_norm" if self.estimators is None else "end",
            math.nan,
            float(size),
            math.nan,
            reached.found.loss,
            status=status,
        )
        self._record(step, empty, track.name, track.point, {"ended": reached.ended})


def _kind(name: str) -> str:
    """Returns the beginning of a line's name that it has in common with lines which go about as far."""
    words = name.split(" ")
    return " ".join(words[:2]) if words[0] == "gradient" else words[0]
