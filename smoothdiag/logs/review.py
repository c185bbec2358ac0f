"""Review: what gradient norms and losses tell by themselves, and what they cannot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from smoothdiag.clipping.rule import FALLBACK_PERCENTILE
from smoothdiag.logs.outliers import SPIKE_RULE, Array, Mask, Spike, find_pile, find_spikes
from smoothdiag.logs.reading import ESTIMATOR

if TYPE_CHECKING:
    from smoothdiag.trace import Trace

USUAL_THRESHOLD: Final = 1.0
"""The default of many trainers, Hugging Face's among them."""

PERCENTILES: Final = (50, 90, 95, 99)

FEW: Final = 100
"""Norms, below which the 99th percentile lies between the two largest."""

NUM_SHOWN: Final = 10

NOT_KNOWN: Final = """\
NOT KNOWN without measuring: L0 and L1, whether smoothness grows with the gradient norm at all, and which learning rate
or threshold is safe. For that the gradient is needed at a second point of the same loss: attach a Probe to a run.
The shares are of the run as it was; from its first clipped step on, a run with that threshold is another one."""


@dataclass(frozen=True)
class ThresholdUse:
    """How often clipping at a threshold would have acted on the norms of a log.

    Attributes:
        threshold: Largest gradient norm left alone [f/x].
        origin: Where it comes from.
        clipped: Share of the norms above it.
        clipped_late: The same of the later half of the steps.
        clipped_at_most: Share that may have been above it before the run's own clipping; `clipped` where that is known.
    """

    threshold: float
    origin: str
    clipped: float
    clipped_late: float
    clipped_at_most: float


@dataclass(frozen=True)
class LogReview:
    """What a log of gradient norms and losses tells.

    Attributes:
        num_norms: Finite gradient norms in it.
        num_losses: Finite losses in it.
        first_step: Step of the first row.
        last_step: Step of the last row.
        percentiles: Gradient norm by percentile, and the largest as 100 [f/x].
        thresholds: How often each threshold would have acted.
        spikes: Values far above those before them, in order of steps.
        non_finite: Steps where the logged gradient norm or loss was inf or NaN.
        pile_up: Gradient norm that many rows have alike, as after clipping [f/x]; NaN where there is none.
        pile_share: Share of the norms that have it.
    """

    num_norms: int
    num_losses: int
    first_step: int
    last_step: int
    percentiles: dict[int, float]
    thresholds: tuple[ThresholdUse, ...]
    spikes: tuple[Spike, ...]
    non_finite: tuple[int, ...]
    pile_up: float
    pile_share: float

    @property
    def advice(self) -> float:
        """The 90th percentile of the norms, which is no fit [f/x]; NaN where the run's own clipping hides it."""
        value = self.percentiles[FALLBACK_PERCENTILE]
        return math.nan if value >= self.pile_up else value

    def summary(self) -> str:
        """Returns all of it in words, with what a log cannot tell."""
        parts = (_head(self), _table(self), _advice(self), _spikes(self))
        return "".join(f"{line}\n" for part in parts for line in (*part, "")) + NOT_KNOWN


def review_log(data: Trace | pd.DataFrame, *, thresholds: Sequence[float] = ()) -> LogReview:
    """Says what the gradient norms and losses of a log tell: thresholds, spikes, and whether they look clipped.

    A spike is a value more than 6 robust standard deviations (interquartile range / 1.349) above the median of the 50
    rows before it, of which there have to be 20: a gradient norm on a logarithmic scale and at least twice the median,
    a loss at least a tenth of the median's size above it.

    Norms look clipped where at least a twentieth of them, and five, lie within a thousandth of each other, and are more
    than three times as many as those beside them, up to ten thousandths or ten digits of the log away on either side.

    Args:
        data: What `read_log` returns, or its table.
        thresholds: Thresholds to count for, beside 1 and the percentiles 50, 90, 95 and 99.

    Returns:
        LogReview: the findings; ``summary()`` says them.

    Raises:
        ValueError: If ``data`` has no row of a log with a finite gradient norm, or a threshold is not positive.

    Units: thresholds [f/x].
    """
    for threshold in thresholds:
        if not 0 < threshold < math.inf:
            raise ValueError(
                f"Parameter `thresholds` should hold positive, finite numbers. Found `{threshold!r}` in it."
            )
    frame = data if isinstance(data, pd.DataFrame) else data.to_frame()
    rows = frame[frame["estimator"] == ESTIMATOR].sort_values("step", kind="stable")
    known = rows[np.isfinite(rows["grad_norm"])]
    if known.empty:
        raise ValueError(
            "Parameter `data` should have rows from `read_log` with finite gradient norms. Found "
            f"{len(frame)} rows, {len(rows)} of them from a log, and none such."
        )
    norm = known["grad_norm"].to_numpy(dtype=np.float64)
    pile = find_pile(norm)
    percentiles = {p: float(np.percentile(norm, p)) for p in (*PERCENTILES, 100)}
    asked: dict[float, list[str]] = {USUAL_THRESHOLD: ["a usual default"]}
    for value in thresholds:
        asked.setdefault(float(value), []).append("given")
    for p in PERCENTILES:
        asked.setdefault(percentiles[p], []).append(f"{p}th percentile")
    late = known["step"].to_numpy() > (rows["step"].iloc[0] + rows["step"].iloc[-1]) / 2
    spikes = [*find_spikes(rows, "grad_norm"), *find_spikes(rows, "loss")]
    return LogReview(
        num_norms=len(norm),
        num_losses=int(np.isfinite(rows["loss"]).sum()),
        first_step=int(rows["step"].iloc[0]),
        last_step=int(rows["step"].iloc[-1]),
        percentiles=percentiles,
        thresholds=tuple(_use(value, ", ".join(asked[value]), norm, late, pile) for value in sorted(asked)),
        spikes=tuple(sorted(spikes, key=lambda spike: spike.step)),
        non_finite=tuple(int(step) for step in rows["step"][rows["status"] == "non_finite"]),
        pile_up=float(norm[pile].min()) if pile.any() else math.nan,
        pile_share=float(pile.mean()),
    )


def _use(threshold: float, origin: str, norm: Array, late: Mask, pile: Mask) -> ThresholdUse:
    above = norm > threshold
    # Whatever was clipped to less than the threshold may have been above it.
    hidden = pile if pile.any() and threshold >= norm[pile].min() else np.zeros_like(pile)
    return ThresholdUse(
        threshold=threshold,
        origin=origin,
        clipped=float(above.mean()),
        clipped_late=float(above[late].mean()) if late.any() else math.nan,
        clipped_at_most=float((above | hidden).mean()),
    )


def _head(review: LogReview) -> list[str]:
    length = review.last_step - review.first_step + 1
    every = "" if review.num_norms >= 0.9 * length else f", one in about {length / review.num_norms:.3g} steps"
    losses = f"; {review.num_losses} losses" if review.num_losses else "; no losses"
    lines = [f"{review.num_norms} gradient norms in steps {review.first_step} to {review.last_step}{every}{losses}."]
    if review.num_norms < FEW:
        lines.append("With so few norms the upper percentiles hang on single steps.")
    if review.non_finite:
        lines.append(f"Not finite at {_listed(review.non_finite)}.")
    if not math.isnan(review.pile_up):
        lines += [
            f"WARNING: {review.pile_share:.0%} of the norms are {review.pile_up:.4g} within a thousandth, as if logged "
            "after clipping.",
            "How large those gradients were is lost; from this threshold on, the shares below are ranges.",
        ]
    return lines


def _table(review: LogReview) -> list[str]:
    lines = [f"{'threshold':>10}  {'would clip':>11}  {'later half':>10}"]
    for use in review.thresholds:
        hidden = use.clipped_at_most > use.clipped
        share = f"{use.clipped:.0%} to {use.clipped_at_most:.0%}" if hidden else f"{use.clipped:.1%}"
        late = "unknown" if hidden or math.isnan(use.clipped_late) else f"{use.clipped_late:.1%}"
        lines.append(f"{use.threshold:>10.4g}  {share:>11}  {late:>10}  {use.origin}")
    return [*lines, f"{review.percentiles[100]:>10.4g}  the largest norm"]


def _advice(review: LogReview) -> list[str]:
    if math.isnan(review.advice):
        return [f"No advice by percentile: clipping has hidden the {FALLBACK_PERCENTILE}th."]
    return [
        f"ADVICE BY PERCENTILE, not from a fit: {review.advice:.4g}, the {FALLBACK_PERCENTILE}th percentile. "
        "It stops outliers and guarantees nothing."
    ]


def _spikes(review: LogReview) -> list[str]:
    lines = []
    for column, name in (("grad_norm", "gradient norm"), ("loss", "loss")):
        found = [spike for spike in review.spikes if spike.column == column]
        lines.append(f"SPIKES of the {name}: {len(found) or 'none'}")
        lines += [f"  {_said(spike)}" for spike in found[:NUM_SHOWN]]
        if len(found) > NUM_SHOWN:
            lines.append(f"  and {len(found) - NUM_SHOWN} more, at {_listed([s.step for s in found[NUM_SHOWN:]])}")
    return [*lines, SPIKE_RULE]


def _said(spike: Spike) -> str:
    return f"step {spike.step}: {spike.value:.4g}, where {spike.usual:.4g} was usual"


def _listed(steps: Sequence[int]) -> str:
    shown = ", ".join(map(str, steps[:NUM_SHOWN]))
    return f"steps {shown}" + (f" and {len(steps) - NUM_SHOWN} more" if len(steps) > NUM_SHOWN else "")
