"""Review: what gradient norms and losses can tell by themselves, and what they cannot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from smoothdiag.clipping.rule import FALLBACK_PERCENTILE
from smoothdiag.console import counted
from smoothdiag.logs.outliers import RULE, Spike, find_pile, find_spikes
from smoothdiag.logs.reading import ESTIMATOR
from smoothdiag.spiking import Array, Mask

if TYPE_CHECKING:
    from smoothdiag.trace import Trace

USUAL_THRESHOLD: Final = 1.0
"""Default threshold of many trainers, including the Trainer of Hugging Face."""

PERCENTILES: Final = (50, 90, 95, 99)

FEW: Final = 100
"""Number of norms below which the 99th percentile lies between the two largest norms."""

NUM_SHOWN: Final = 10

NOT_KNOWN: Final = """\
NOT KNOWN without measuring: L0 and L1, whether smoothness grows with the gradient norm at all, and which learning rate
or threshold is safe. To know this, the gradient is needed at a second point of the same loss: attach a Probe to a run.
The shares count the run as it was. A run with such a threshold would have become another run at its first clip."""


@dataclass(frozen=True)
class ThresholdUse:
    """How often clipping at a threshold would have acted on the norms of a log.

    Attributes:
        threshold: Largest gradient norm left alone [f/x].
        origin: Where the threshold comes from.
        clipped: Share of the norms above the threshold.
        clipped_late: Share of the norms above the threshold in the later half of the steps.
        clipped_at_most: Largest share of norms that can have been above the threshold before the run's own clipping;
            equal to `clipped` if that clipping hides none.
    """

    threshold: float
    origin: str
    clipped: float
    clipped_late: float
    clipped_at_most: float


@dataclass(frozen=True)
class LogReview:
    """The findings of `review_log`: what a log of gradient norms and losses tells.

    Attributes:
        num_norms: Number of finite gradient norms.
        num_zeros: Number of gradient norms that are 0.
        num_losses: Number of finite losses.
        first_step: Step of the first row.
        last_step: Step of the last row.
        interval: Median distance between steps with a finite gradient norm; NaN if there are fewer than two.
        percentiles: Gradient norm by percentile; 100 is the largest [f/x]; empty without gradient norms.
        thresholds: How often each threshold would have acted; empty without gradient norms.
        spikes: Values far above the values before them, in order of steps.
        non_finite: Steps where the logged gradient norm or loss was inf or NaN.
        pile_up: Gradient norm that many rows share, as after clipping [f/x]; NaN if there is none.
        pile_share: Share of the norms that are equal to ``pile_up``.

    Examples:
        >>> import pandas as pd
        >>> pd.DataFrame({"grad_norm": [1.0, 1.1, 1.2, 1.3] * 10 + [50.0]}).to_csv("log.csv", index=False)
        >>> review = sd.review_log(sd.read_log("log.csv"))
        >>> print(review.num_norms, [spike.step for spike in review.spikes], review.percentiles[90])
        41 [40] 1.3
    """

    num_norms: int
    num_zeros: int
    num_losses: int
    first_step: int
    last_step: int
    interval: float
    percentiles: dict[int, float]
    thresholds: tuple[ThresholdUse, ...]
    spikes: tuple[Spike, ...]
    non_finite: tuple[int, ...]
    pile_up: float
    pile_share: float

    @property
    def advice(self) -> float:
        """The 90th percentile of the norms, which does not come from a fit [f/x].

        NaN if there are fewer than 20 norms, if the percentile is 0, or if the run's own clipping hides it.
        """
        if self.num_norms < RULE.fewest:
            return math.nan
        value = self.percentiles[FALLBACK_PERCENTILE]
        return math.nan if value == 0 or value >= self.pile_up else value

    def summary(self) -> str:
        """Returns all findings in words, and what a log cannot tell."""
        parts = (_head(self), _table(self), _advice(self), _spikes(self))
        return "".join(f"{line}\n" for part in parts if part for line in (*part, "")) + NOT_KNOWN

    def to_dict(self) -> dict[str, Any]:
        """Returns the findings as plain values that JSON can hold; inf and NaN become None."""
        plain: dict[str, Any] = _plain(asdict(self) | {"advice": self.advice})
        return plain


def review_log(data: Trace | pd.DataFrame, *, thresholds: Sequence[float] = ()) -> LogReview:
    """Reviews the gradient norms and losses of a log: thresholds, spikes, and whether the norms look clipped.

    A spike is a value more than 6 robust standard deviations (interquartile range / 1.349) above the median of the 50
    rows before it, of which there must be at least 20. Gradient norms are compared on a logarithmic scale and must be
    at least twice the median. Losses must lie above the median by at least a tenth of its size.

    Norms look clipped if at least a twentieth of them, and at least five, lie within a thousandth of each other, and
    these are more than three times as many as their neighbours. Neighbours are norms up to ten thousandths, or ten
    units of the last digit of the log, away on either side.

    Args:
        data: The trace that `read_log` returns, or its table.
        thresholds: Thresholds to count for, in addition to 1 and the percentiles 50, 90, 95 and 99.

    Returns:
        LogReview: the findings; ``summary()`` returns them in words.

    Raises:
        ValueError: If ``data`` has no row of a log with a finite gradient norm or loss, or a threshold is not positive
            and finite.

    Units: thresholds [f/x].

    Examples:
        >>> import pandas as pd
        >>> pd.DataFrame({"grad_norm": range(1, 101)}).to_csv("log.csv", index=False)
        >>> review = sd.review_log(sd.read_log("log.csv"), thresholds=[75])
        >>> [(use.threshold, use.clipped) for use in review.thresholds if use.origin == "given"]
        [(75.0, 0.25)]
    """
    for threshold in thresholds:
        if not 0 < threshold < math.inf:
            raise ValueError(
                f"Parameter `thresholds` should hold positive, finite numbers. Found `{threshold!r}` in it."
            )
    frame = data if isinstance(data, pd.DataFrame) else data.to_frame()
    rows = frame[frame["estimator"] == ESTIMATOR].sort_values("step", kind="stable")
    known = rows[np.isfinite(rows["grad_norm"])]
    num_losses = int(np.isfinite(rows["loss"]).sum())
    if known.empty and not num_losses:
        raise ValueError(
            "Parameter `data` should have rows from `read_log` with finite gradient norms or losses. Found "
            f"{counted(len(frame), 'row')}, {len(rows)} of them from a log, and none with a finite value."
        )
    norm = known["grad_norm"].to_numpy(dtype=np.float64)
    pile = find_pile(norm)
    percentiles = {p: float(np.percentile(norm, p)) for p in (*PERCENTILES, 100)} if len(norm) else {}
    asked: dict[float, list[str]] = {USUAL_THRESHOLD: ["a usual default"]}
    for value in thresholds:
        asked.setdefault(float(value), []).append("given")
    for p in PERCENTILES:
        if percentiles.get(p, 0.0) > 0:  # nobody clips to 0
            asked.setdefault(percentiles[p], []).append(f"{p}th percentile")
    late = known["step"].to_numpy() > (rows["step"].iloc[0] + rows["step"].iloc[-1]) / 2
    spikes = [*find_spikes(rows, "grad_norm"), *find_spikes(rows, "loss")]
    return LogReview(
        num_norms=len(norm),
        num_zeros=int((norm == 0).sum()),
        num_losses=num_losses,
        first_step=int(rows["step"].iloc[0]),
        last_step=int(rows["step"].iloc[-1]),
        interval=float(np.median(np.diff(known["step"]))) if len(norm) > 1 else math.nan,
        percentiles=percentiles,
        thresholds=tuple(
            _use(value, ", ".join(asked[value]), norm, late, pile) for value in sorted(asked) if len(norm)
        ),
        spikes=tuple(sorted(spikes, key=lambda spike: spike.step)),
        non_finite=tuple(int(step) for step in rows["step"][rows["status"] == "non_finite"]),
        pile_up=float(norm[pile].min()) if pile.any() else math.nan,
        pile_share=float(pile.mean()) if len(norm) else 0.0,
    )


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _use(threshold: float, origin: str, norm: Array, late: Mask, pile: Mask) -> ThresholdUse:
    above = norm > threshold
    # A norm that the run itself clipped to less than the threshold may have been above the threshold.
    hidden = pile if pile.any() and threshold >= norm[pile].min() else np.zeros_like(pile)
    return ThresholdUse(
        threshold=threshold,
        origin=origin,
        clipped=float(above.mean()),
        clipped_late=float(above[late].mean()) if late.any() else math.nan,
        clipped_at_most=float((above | hidden).mean()),
    )


def _head(review: LogReview) -> list[str]:
    steps = f"in steps {review.first_step} to {review.last_step}"
    if review.first_step == review.last_step:
        steps = f"at step {review.first_step}"
    if not review.num_norms:
        lines = [f"NO GRADIENT NORMS, so no thresholds and no advice. {_losses(review)} {steps}."]
        return [*lines, *([f"Inf or NaN at {_listed(review.non_finite)}."] if review.non_finite else [])]
    every = f", usually {review.interval:g} steps apart" if review.interval > 1 else ""
    losses = f"; {_losses(review)}" if review.num_losses else "; no losses"
    lines = [f"{counted(review.num_norms, 'gradient norm')} {steps}{every}{losses}."]
    if review.num_zeros:
        lines.append(
            f"{counted(review.num_zeros, 'of the norms is', 'of the norms are')} 0, as if there was no gradient when "
            "they were logged."
        )
    if review.num_norms < FEW:
        lines.append("With so few norms, the upper percentiles depend on single steps.")
    if review.non_finite:
        lines.append(f"Inf or NaN at {_listed(review.non_finite)}.")
    if not math.isnan(review.pile_up):
        lines += [
            f"WARNING: {review.pile_share:.0%} of the norms are {review.pile_up:.4g} to within a thousandth, as if "
            "logged after clipping.",
            "The log does not show how large those gradients were, so from this threshold on the shares are ranges.",
            "Next time, log the norm that clip_grad_norm_ returns: it is the norm before clipping.",
        ]
    return lines


def _table(review: LogReview) -> list[str]:
    if not review.num_norms:
        return []
    lines = [f"{'threshold':>10}  {'would clip':>11}  {'later half':>10}"]
    for use in review.thresholds:
        hidden = use.clipped_at_most > use.clipped
        share = f"{use.clipped:.0%} to {use.clipped_at_most:.0%}" if hidden else f"{use.clipped:.1%}"
        late = "unknown" if hidden or math.isnan(use.clipped_late) else f"{use.clipped_late:.1%}"
        lines.append(f"{use.threshold:>10.4g}  {share:>11}  {late:>10}  {use.origin}")
    return [*lines, f"{review.percentiles[100]:>10.4g}  the largest norm"]


def _advice(review: LogReview) -> list[str]:
    if not review.num_norms:
        return []
    if math.isnan(review.advice):
        percentile = f"the {FALLBACK_PERCENTILE}th percentile"
        if review.num_norms < RULE.fewest:
            return [f"No advice by percentile: it needs at least {RULE.fewest} norms."]
        if review.percentiles[FALLBACK_PERCENTILE] == 0:
            return [f"No advice by percentile: {percentile} of the norms is 0."]
        return [f"No advice by percentile: the run's own clipping hides {percentile}."]
    return [
        f"ADVICE BY PERCENTILE, not from a fit: {review.advice:.4g}, the {FALLBACK_PERCENTILE}th percentile. "
        "This threshold stops outliers and guarantees nothing."
    ]


def _spikes(review: LogReview) -> list[str]:
    lines = []
    columns = (("grad_norm", "gradient norm", review.num_norms), ("loss", "loss", review.num_losses))
    for column, name, count in columns:
        if not count:
            continue
        found = [spike for spike in review.spikes if spike.column == column]
        none = "none" if count > RULE.fewest else f"none, because no row has {RULE.fewest} rows before it"
        lines.append(f"SPIKES of the {name}: {len(found) or none}")
        lines += [f"  {_said(spike)}" for spike in found[:NUM_SHOWN]]
        if len(found) > NUM_SHOWN:
            lines.append(f"  and {len(found) - NUM_SHOWN} more, at {_listed([s.step for s in found[NUM_SHOWN:]])}")
    return [*lines, RULE.text]


def _said(spike: Spike) -> str:
    return f"step {spike.step}: {spike.value:.4g}; the median before it was {spike.usual:.4g}"


def _losses(review: LogReview) -> str:
    return counted(review.num_losses, "loss", "losses")


def _listed(steps: Sequence[int]) -> str:
    shown = ", ".join(map(str, steps[:NUM_SHOWN]))
    more = f" and {len(steps) - NUM_SHOWN} more" if len(steps) > NUM_SHOWN else ""
    return f"{'step' if len(steps) == 1 else 'steps'} {shown}{more}"
