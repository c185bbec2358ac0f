"""Benefit: whether clipping a step would have been worth it, from losses at both ends, by forward passes alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from smoothdiag import vectors
from smoothdiag.autoclip.acting import Action
from smoothdiag.autoclip.books import Books
from smoothdiag.measure.estimators import Estimate, Status, Step
from smoothdiag.measure.loss.batches import MicroBatch
from smoothdiag.measure.loss.faults import NothingToSay
from smoothdiag.measure.loss.objective import Objective
from smoothdiag.measure.probe import Probe
from smoothdiag.rows import BENEFIT_HELD_OUT, CLIP_BENEFIT
from smoothdiag.vectors import Vector

EVERY = 10
"""A shadow looks at most at one step in this many."""


def benefit(objective: Objective, start: Vector, end: Vector | None, share: float) -> float:
    """Returns how much lower the loss would be, had a step been shorter [f]; negative where that would do harm.

    It is f(end) - f(start + share (end - start)), by two forward passes.

    Args:
        objective: The loss f on the data that judge.
        start: Where the step began.
        end: Where it led; ``None`` if that is where the parameters are.
        share: Length of the shorter step, as a share of the step taken.
    """
    with objective.isolated():
        there = objective.end if end is None else end
        shorter = vectors.add_scaled(start, vectors.sub(there, start), share)
        return objective.value(there) - objective.value(shorter)


@dataclass(eq=False)
class Benefit:
    """What clipping would have been worth at a step that a shadow would have shortened: an estimator of its rows.

    It is about the step's own batch, and about held-out batches if there are any. At steps that are short enough it has
    nothing to say, and costs no forward pass.

    Args:
        probe: The probe, whose measured steps it looks at.
        action: How AutoClip would act.
        books: How long a step may be.
        held_out: Held-out micro-batches; none by default.

    Attributes:
        last: The last step that it looked at, or -EVERY.
    """

    probe: Probe
    action: Action
    books: Books
    held_out: Sequence[MicroBatch] = ()
    last: int = -EVERY

    def is_due(self, step: int) -> bool:
        """Returns whether it looks at a step: one at which something else is measured, and at most one in ten."""
        is_measured = self.probe.is_own_due or self.books.calibration.due(step)
        return is_measured and step - self.last >= EVERY

    def __call__(self, step: Step) -> Estimate:
        """Returns the row of a step that would have been shortened.

        Raises:
            NothingToSay: If the step is short enough.
        """
        self.last = step.index
        share = float(self.books.longest()) / float(self.action.unclipped())
        if not self.probe.on_any_rank(0 < share < 1):
            raise NothingToSay
        own = CLIP_BENEFIT if self.probe.needs_batches else BENEFIT_HELD_OUT
        found: dict[str, float | str] = {"clip_share": share}
        found[own] = benefit(step.objective, step.start, step.end, share)
        if self.held_out:
            others = step.objective.on(self.held_out)
            found[BENEFIT_HELD_OUT] = benefit(others, step.start, step.end, share)
        length = float(vectors.norm(vectors.sub(step.end, step.start)))
        return Estimate(CLIP_BENEFIT, math.nan, math.nan, length, math.nan, status=Status.NOT_MEASURED, extra=found)


class Judged(NamedTuple):
    """A step that would have been clipped.

    Attributes:
        step: Number of the step.
        share: Length of the shortened step, as a share of the step taken.
        clip_benefit: How much lower the loss of the step's batch would be [f]; NaN if it was not evaluated.
        clip_benefit_held_out: The same on held-out batches.
    """

    step: int
    share: float
    clip_benefit: float
    clip_benefit_held_out: float


def judged(rows: Iterable[Mapping[str, Any]]) -> list[Judged]:
    """Returns the steps that were judged, from the rows of a trace."""
    columns = ("clip_share", CLIP_BENEFIT, BENEFIT_HELD_OUT)
    return [
        Judged(row["step"], *(float(row.get(name, math.nan)) for name in columns))
        for row in rows
        if row["estimator"] == CLIP_BENEFIT
    ]


def mean_before(found: Sequence[Judged], step: int) -> float:
    """Returns the mean benefit at the steps before one [f]: on held-out batches, if there are any."""
    is_held_out = any(not math.isnan(each.clip_benefit_held_out) for each in found)
    known = [e.clip_benefit_held_out if is_held_out else e.clip_benefit for e in found if e.step < step]
    known = [value for value in known if not math.isnan(value)]
    return fmean(known) if known else math.nan


def worth(found: Sequence[Judged]) -> str:
    """Returns whether clipping would have been worth it, in words that end with a semicolon; empty if nobody knows."""
    said = []
    for column, data in ((CLIP_BENEFIT, "the step's own batch"), (BENEFIT_HELD_OUT, "held-out batches")):
        known = [value for each in found if not math.isnan(value := getattr(each, column))]
        if known:
            mean = fmean(known)
            number = sum(value > 0 for value in known)
            side = f"{abs(mean):.3g} {'lower' if mean > 0 else 'higher'}"
            said.append(f"at {number} of {len(known)} on {data} (on average it would be {side})")
    return f"where looked at, clipping would have lowered the loss {' and '.join(said)}; " if said else ""
