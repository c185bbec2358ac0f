"""Alarms: what a log shows to be wrong, for machines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Final

from smoothdiag.console import counted
from smoothdiag.logs.outliers import RULE
from smoothdiag.logs.review import LogReview
from smoothdiag.machines import Finding

if TYPE_CHECKING:
    from smoothdiag.trace import Trace

FEWEST_NORMS: Final = 30
"""Norms needed to say that a threshold always or never acts: if none of 30 is above it, at most one in ten is (95%)."""

MOST: Final = 0.9
"""Share of the norms above a threshold from which on it sets the length of nearly every step."""

NUM_STEPS: Final = 10
"""Steps that a finding lists."""


def findings_of(review: LogReview, file: str) -> list[Finding]:
    """Returns what is wrong in a log, worst first.

    Args:
        review: The review of its rows.
        file: The log.
    """
    return [
        *_dead(review, file),
        *_non_finite(review, file),
        *_clipped(review, file),
        *_spikes(review, file),
        *_thresholds(review, file),
    ]


def news_of(trace: Trace, review: LogReview, file: str, thresholds: Sequence[float]) -> Iterator[Finding]:
    """Yields what a growing log shows: as `findings_of`, but each spike by itself, and clip rates of the last rows.

    Two findings are the same if name, step and threshold are.
    """
    yield from _dead(review, file)
    for spike in review.spikes:
        yield from _spikes(replace(review, spikes=(spike,)), file)
    yield from _non_finite(review, file)
    yield from _clipped(review, file)
    last = (float(trace[i]["grad_norm"]) for i in range(len(trace) - 1, -1, -1))
    norms = list(islice(filter(math.isfinite, last), RULE.window))
    for threshold in thresholds:
        clipped = sum(norm > threshold for norm in norms)
        if len(norms) >= FEWEST_NORMS and clipped >= MOST * len(norms):
            yield Finding(
                "threshold-clips-most",
                "note",
                f"{clipped} of the last {len(norms)} norms are above the threshold {threshold:g}: the learning rate "
                "alone sets the length of nearly every step.",
                "Raise the threshold above the usual norm, or lower the learning rate.",
                file,
                count=clipped,
                of=len(norms),
                unit="norms",
                more={"threshold": threshold},
            )


def _dead(review: LogReview, file: str) -> Iterator[Finding]:
    if review.dead_since is not None:
        what = "loss" if review.dead_column == "loss" else "gradient norm"
        yield Finding(
            "dead-run",
            "error",
            f"The run is dead: from step {review.dead_since} to the end no {what} of the log is finite.",
            "Go on from a checkpoint before that step, with a lower learning rate or with AutoClip, which leaves out "
            "gradients that are not finite.",
            file,
            count=review.dead_rows,
            of=max(review.num_norms, review.num_losses) + len(review.non_finite),
            unit="rows",
            more={"step": review.dead_since},
        )


def _non_finite(review: LogReview, file: str) -> Iterator[Finding]:
    end = review.dead_since if review.dead_since is not None else review.last_step
    steps = [step for step in review.non_finite if step < end]
    # Rows at the very end may be the begin of a dead run.
    gap = 1.5 * (1.0 if math.isnan(review.interval) else review.interval)
    while review.dead_since is None and review.last_step in review.non_finite and steps and steps[-1] >= end - gap:
        end = steps.pop()
    if steps:
        yield Finding(
            "non-finite",
            "warning",
            f"A gradient norm or loss was inf or NaN at {listed(steps)}, and the run went on.",
            "If a GradScaler skips such steps, nothing is wrong. Otherwise let AutoClip or SpikeGuard leave them out.",
            file,
            count=len(steps),
            of=max(review.num_norms, review.num_losses) + len(review.non_finite),
            unit="rows",
            more={"step": steps[0]},
        )


def _clipped(review: LogReview, file: str) -> Iterator[Finding]:
    if not math.isnan(review.pile_up):
        yield Finding(
            "logged-after-clipping",
            "warning",
            f"Many norms are {review.pile_up:.4g} to within a thousandth, as if they were logged after clipping. The "
            "log does not show how large those gradients were.",
            "Log the norm that clip_grad_norm_ returns: it is the norm before clipping.",
            file,
            count=round(review.pile_share * review.num_norms),
            of=review.num_norms,
            unit="norms",
        )


def _spikes(review: LogReview, file: str) -> Iterator[Finding]:
    for column, name, number in (
        ("grad_norm", "gradient norm", review.num_norms),
        ("loss", "loss", review.num_losses),
    ):
        if found := [spike for spike in review.spikes if spike.column == column]:
            worst = max(found, key=lambda spike: spike.value / abs(spike.usual) if spike.usual else math.inf)
            where = "," if len(found) == 1 else f" at {listed([s.step for s in found])},"
            yield Finding(
                "spike-of-norm" if column == "grad_norm" else "spike-of-loss",
                "note",
                f"The {name} rose far above the values before it{where} to {worst.value:.4g} at step {worst.step}; "
                f"usual was {worst.usual:.4g}.",
                "Look at the batches of these steps. A threshold near the usual norm stops such steps: AutoClip sets "
                "one by itself.",
                file,
                count=len(found),
                of=number,
                unit="rows",
                more={"step": found[0].step},
            )


def _thresholds(review: LogReview, file: str) -> Iterator[Finding]:
    if review.num_norms < FEWEST_NORMS:
        return
    for use in review.thresholds:
        if "given" not in use.origin:
            continue
        number = round(use.clipped * review.num_norms)
        if use.clipped >= MOST:
            text = f"The threshold {use.threshold:g} is below {use.clipped:.0%} of the norms: the learning rate alone "
            text += "sets the length of nearly every step."
            remedy = "Raise the threshold above the usual norm, or say that you normalise gradients."
            name = "threshold-clips-most"
        elif use.clipped_at_most == 0:
            name, text = "threshold-never-clips", f"No norm of the log is above the threshold {use.threshold:g}."
            remedy = "Lower it below the largest norm if it should act, or keep it as a safety net."
        else:
            continue
        yield Finding(name, "note", text, remedy, file, count=number, of=review.num_norms, unit="norms")


def listed(steps: Sequence[int]) -> str:
    """Returns some steps in words, and how many more there are."""
    shown = ", ".join(map(str, steps[:NUM_STEPS]))
    more = f" and {counted(len(steps) - NUM_STEPS, 'more step')}" if len(steps) > NUM_STEPS else ""
    return f"{'step' if len(steps) == 1 else 'steps'} {shown}{more}"
