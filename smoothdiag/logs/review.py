"""Review: what gradient norms and losses can tell by themselves, and what they cannot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from smoothdiag.console import counted
from smoothdiag.logs import wording
from smoothdiag.logs.findings import Findings, ThresholdUse
from smoothdiag.logs.outliers import find_pile, find_spikes
from smoothdiag.logs.table import ESTIMATOR, LogTrace
from smoothdiag.tails import Array, Mask

if TYPE_CHECKING:
    from smoothdiag.trace import Trace

USUAL_THRESHOLD: Final = 1.0
"""Default threshold of many trainers, including the Trainer of Hugging Face."""

PERCENTILES: Final = (50, 90, 95, 99)

NUM_DEAD: Final = 3
"""Rows at the end without a finite value that make a run dead; one or two may be batches that a scaler skips."""


@dataclass(frozen=True)
class LogReview(Findings):
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
        dead_since: First step of the rows at the end of which none is finite; None if the run is not dead.
        dead_column: Which values are not finite there, ``loss`` or ``grad_norm``; empty if the run is not dead.
        dead_rows: Number of these rows.
        notes: What the log does not say of its numbers.

    Examples:
        >>> import pandas as pd
        >>> pd.DataFrame({"grad_norm": [1.0, 1.1, 1.2, 1.3] * 10 + [50.0]}).to_csv("log.csv", index=False)
        >>> review = sd.review_log(sd.read_log("log.csv"))
        >>> print(review.num_norms, [spike.step for spike in review.spikes], review.percentiles[90])
        41 [40] 1.3
    """

    def summary(self) -> str:
        """Returns all findings in words, and what a log cannot tell."""
        tell = (wording.dead, wording.head, wording.table, wording.advice, wording.spikes, wording.notes)
        parts = [part(self) for part in tell]
        return "".join(f"{line}\n" for part in parts if part for line in (*part, "")) + wording.NOT_KNOWN

    def to_dict(self) -> dict[str, Any]:
        """Returns the findings as plain values that JSON can hold; inf and NaN become None."""
        plain: dict[str, Any] = _plain(asdict(self) | {"advice": self.advice})
        return plain


def review_log(data: Trace | pd.DataFrame, *, thresholds: Sequence[float] = ()) -> LogReview:
    """Reviews the gradient norms and losses of a log: thresholds, spikes, and whether the norms look clipped.

    A spike is a value above the median of the 50 rows before it, of which there must be at least 20. Gradient norms are
    compared on a logarithmic scale and must be at least twice the median. Losses must lie above the median by at least
    a tenth of its size. Loss and norm of a row must together lie more than 6 robust standard deviations above their
    medians; `SpikeRule` says how these are counted.

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
    rows = _rows(data)
    if not len(rows.step):
        raise ValueError(
            "Parameter `data` should have rows from `read_log` with gradient norms or losses. Found "
            f"{counted(len(data), 'row')}, 0 of them from a log."
        )
    is_known = np.isfinite(rows.grad_norm)
    norm, at = (rows.grad_norm, rows.step) if is_known.all() else (rows.grad_norm[is_known], rows.step[is_known])
    pile = find_pile(norm)
    levels = (*PERCENTILES, 100)
    percentiles = dict(zip(levels, map(float, np.percentile(norm, levels)), strict=True)) if len(norm) else {}
    asked: dict[float, list[str]] = {USUAL_THRESHOLD: ["a usual default"]}
    for value in thresholds:
        asked.setdefault(float(value), []).append("given")
    for p in PERCENTILES:
        if percentiles.get(p, 0.0) > 0:  # nobody clips to 0
            asked.setdefault(percentiles[p], []).append(f"{p}th percentile")
    first, last = int(rows.step[0]), int(rows.step[-1])
    late = at > (first + last) / 2
    dead_since, dead_column, dead_rows = _death(rows)
    return LogReview(
        num_norms=len(norm),
        num_zeros=int((norm == 0).sum()),
        num_losses=int(np.isfinite(rows.loss).sum()),
        first_step=first,
        last_step=last,
        interval=float(np.median(np.diff(at), overwrite_input=True)) if len(norm) > 1 else math.nan,
        percentiles=percentiles,
        thresholds=tuple(
            _use(value, ", ".join(asked[value]), norm, late, pile) for value in sorted(asked) if len(norm)
        ),
        spikes=tuple(find_spikes(rows.step, rows.grad_norm, rows.loss)),
        non_finite=tuple(map(int, rows.step[rows.is_bad])),
        pile_up=float(norm[pile].min()) if pile.any() else math.nan,
        pile_share=float(pile.mean()) if len(norm) else 0.0,
        dead_since=dead_since,
        dead_column=dead_column,
        dead_rows=dead_rows,
        notes=rows.notes,
    )


@dataclass(frozen=True)
class _Rows:
    """The rows of a log in the order of steps; values that the log does not have are NaN, and not bad."""

    step: Array
    grad_norm: Array
    loss: Array
    is_bad: Mask
    notes: tuple[str, ...]


def _rows(data: Trace | pd.DataFrame) -> _Rows:
    if isinstance(data, LogTrace) and data.is_as_read:
        # Ten million rows are no table: the columns are taken as they are.
        missing = np.broadcast_to(np.float32(np.nan), data.step.shape)
        norm, loss = (data.columns.get(name, missing) for name in ("grad_norm", "loss"))
        return _Rows(data.step, norm, loss, data.is_bad, tuple(data.meta.get("notes", ())))
    frame = data if isinstance(data, pd.DataFrame) else data.to_frame()
    rows = frame[frame["estimator"] == ESTIMATOR].sort_values("step", kind="stable")
    is_bad = (rows["status"] == "non_finite").to_numpy(dtype=np.bool_)
    rows = rows[np.isfinite(rows["grad_norm"]) | np.isfinite(rows["loss"]) | is_bad]
    is_bad = (rows["status"] == "non_finite").to_numpy(dtype=np.bool_)
    step, norm, loss = (rows[name].to_numpy() for name in ("step", "grad_norm", "loss"))
    return _Rows(step, norm, loss, is_bad, tuple(frame.attrs.get("notes", ())))


def _death(rows: _Rows) -> tuple[int | None, str, int]:
    """Returns since which step no loss, or without losses no norm, is finite to the end, and how many rows that is."""
    for column, values in (("loss", rows.loss), ("grad_norm", rows.grad_norm)):
        is_finite = np.isfinite(values)
        begin = int(len(values) - np.argmax(is_finite[::-1])) if is_finite.any() else 0
        bad = np.flatnonzero(rows.is_bad[begin:])
        is_logged = bool(is_finite.any()) or not np.isfinite(rows.grad_norm).any()
        if is_logged and len(bad) >= min(NUM_DEAD, len(rows.step)):
            losses = rows.loss[begin:]
            # The Trainer of Hugging Face prints 0 for a loss that is NaN.
            if column == "loss" or not np.any(np.isfinite(losses) & (losses != 0)):
                return int(rows.step[begin + bad[0]]), column, len(bad)
    return None, "", 0


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
