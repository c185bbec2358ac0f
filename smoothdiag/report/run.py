"""run: what the report says of one trace, in numbers and words."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from smoothdiag.clipping import ClipRule, clip_rule
from smoothdiag.diverged import why_diverged
from smoothdiag.fits import GroupFits, SmoothnessFit, fit_groups, fit_smoothness
from smoothdiag.fits.columns import largest_rate
from smoothdiag.fits.decision import SHADOW
from smoothdiag.plots.clipping import recorded
from smoothdiag.plots.spikes import recorded as spikes_of
from smoothdiag.report.answer import Answer, Clipped, answer, floored, no_answer
from smoothdiag.report.snippets import Snippet, snippets
from smoothdiag.rows import CLIP_SUFFIX, NO_ROWS, NOTES, USABLE_STATUSES, Status, plain_fact, printable

if TYPE_CHECKING:
    import pandas as pd

    from smoothdiag.trace import Trace

MOST_FACT: Final = 400
"""Characters of a fact about the run that the page shows."""


class Options(NamedTuple):
    """How to fit the rows, and what the trace does not say about the optimizer.

    Attributes:
        fit: options of `fit_smoothness`.
        lr: learning rate [x^2/f]; None takes the largest one recorded.
        momentum: momentum; None takes the recorded one, or 0.
        dampening: dampening; None takes the recorded one, or 0.
    """

    fit: Mapping[str, Any]
    lr: float | None = None
    momentum: float | None = None
    dampening: float | None = None


class Kind(NamedTuple):
    """Rows of one status: how many, whether fits use them, what happened, and what to change."""

    status: str
    number: int
    is_used: bool
    cause: str
    remedy: str


@dataclass(frozen=True)
class Run:
    """One trace, fitted.

    Attributes:
        name: name on the page.
        trace: the trace.
        frame: its rows.
        fit: the fit; None if the rows cannot be fitted.
        refusal: why they cannot; empty if they can.
        rule: the clip rule; None without one.
        said_of_rule: the learning rate and momentum that the rule is for, in words.
        groups: the fits of the parameter groups; None if there are no groups.
        history: the state of an AutoClip at its measurements; None without an AutoClip.
        clipped: the last such state; None likewise.
        spikes: the spikes that a SpikeGuard has seen, one line for each signal; None without any.
        answer: the answer.
        kinds: the rows by status.
    """

    name: str
    trace: Trace
    frame: pd.DataFrame
    fit: SmoothnessFit | None
    refusal: str
    rule: ClipRule | None
    said_of_rule: str
    groups: GroupFits | None
    history: pd.DataFrame | None
    clipped: Clipped | None
    spikes: pd.DataFrame | None
    answer: Answer
    kinds: tuple[Kind, ...]

    @property
    def snippets(self) -> tuple[Snippet, ...]:
        """The lines to paste."""
        return snippets(self.answer.threshold)

    @property
    def is_scan(self) -> bool:
        """Whether the rows are points around one checkpoint, and not steps of a run."""
        return "scan" in self.frame.columns

    @property
    def facts(self) -> dict[str, str]:
        """The facts about the run in the header, as text."""
        return {name: _shown(value) for name, value in self.trace.meta.items()}


def read_run(name: str, trace: Trace, options: Options) -> Run:
    """Returns a trace with all that the page says about it.

    Raises:
        ValueError: if the trace has no rows, or an option is wrong.
    """
    if not len(trace):
        raise ValueError(f"Trace `{printable(name)}` should have rows. {NO_ROWS}")
    frame = trace.to_frame()
    kinds, measured = _kinds(frame), _kinds(frame[~frame["estimator"].isin(NOTES)])
    fit, refusal = _fitted(frame, options)
    history = recorded(frame)
    history = None if history is None or history.empty else history
    clipped = None if history is None else _clipped(frame, history)
    noted = spikes_of(frame)
    spikes = None if noted.empty else noted
    of_fit = {} if fit is None else {"estimator": fit.estimator, "group": fit.group}
    lr = options.lr if options.lr is not None else largest_rate(frame, **of_fit)
    if fit is None:
        statuses = {kind.status: kind.number for kind in measured}
        remedy = next((kind.remedy for kind in measured if not kind.is_used), "")
        found = no_answer(refusal, statuses, remedy, clipped)
        return Run(name, trace, frame, None, refusal, None, "", None, history, clipped, spikes, found, kinds)
    rule = _rule(fit, lr, options)
    said = "" if rule is None else _said(rule, lr, is_known=options.momentum is not None or fit.momentum >= 0)
    groups = _groups(frame, fit, options)
    found = answer(fit, rule, clipped, lr)
    if rule is not None and rule.source == "fit" and not math.isnan(rule.better_lr):
        # A threshold belongs to a rate, so the page gives the one of the rate that it advises.
        lower = _rule(fit, floored(rule.better_lr), options)
        rule = lower if lower is not None and math.isnan(lower.better_lr) else rule
        found, said = answer(fit, rule, clipped, lr), _said(rule, rule.lr, is_known=True)
    return Run(name, trace, frame, fit, "", rule, said, groups, history, clipped, spikes, found, kinds)


def _fitted(frame: pd.DataFrame, options: Options) -> tuple[SmoothnessFit | None, str]:
    """Returns the fit, or None and why there is none; wrong options are errors."""
    try:
        return fit_smoothness(frame, **options.fit), ""
    except ValueError as error:
        asked = {"quantile", "num_boot", "seed"} | {n for n in ("estimator",) if options.fit.get(n) is not None}
        asked |= {"group"} if options.fit.get("group", "all") != "all" else set()
        if any(f"Parameter `{name}`" in str(error) for name in asked):
            raise
        return None, str(error)


def _groups(frame: pd.DataFrame, fit: SmoothnessFit, options: Options) -> GroupFits | None:
    """Returns the fits of all groups, to rows of the estimator of the whole; None if there are no groups."""
    rows = frame[frame["estimator"] == fit.estimator]
    if rows["group"].nunique() < 2 or "scan" in frame.columns:
        return None
    asked = {name: value for name, value in options.fit.items() if name != "group"}
    return fit_groups(frame, **asked | {"estimator": fit.estimator})


def _rule(fit: SmoothnessFit, lr: float, options: Options) -> ClipRule | None:
    rate = None if math.isnan(lr) else lr
    try:
        return clip_rule(fit, lr=rate, momentum=options.momentum, dampening=options.dampening)
    except ValueError:  # a scan without constants to use has no steps either whose norms could serve
        return None


def _said(rule: ClipRule, lr: float, *, is_known: bool) -> str:
    momentum, dampening = rule.momentum, rule.dampening
    rate = "a learning rate that the rule chose" if math.isnan(lr) else f"the learning rate {lr:.4g}"
    averaging = f" and dampening {dampening:.3g}" if momentum and dampening else ""
    said = f"{rate} and momentum {momentum:g}{averaging}" if momentum else f"{rate}, without momentum"
    return said if is_known else f"{said}; the trace does not say whether there was momentum, but `--momentum` can"


def _clipped(frame: pd.DataFrame, history: pd.DataFrame) -> Clipped:
    last = history.iloc[-1]
    modes = frame["clip_mode"].dropna().tolist() if "clip_mode" in frame.columns else []
    longest, threshold, fraction = (float(last[name]) for name in ("longest_step", "threshold", "clip_fraction"))
    acts = modes[-1:] != [SHADOW]
    rows = frame[frame["estimator"].astype(str).str.endswith(CLIP_SUFFIX)]
    saturated = float((rows["status"][rows["status"].isin(USABLE_STATUSES)] == Status.SATURATED.name.lower()).mean())
    return Clipped(longest, threshold, fraction, acts, "" if acts else why_diverged(rows.to_dict("records")), saturated)


def _kinds(frame: pd.DataFrame) -> tuple[Kind, ...]:
    known = {status.name.lower(): status for status in Status}
    found = []
    for status, number in Counter(frame["status"].tolist()).most_common():
        cause, _, remedy = known[status].value.partition(". ") if status in known else (_UNKNOWN, "", "")
        cause = f"{cause[0].upper()}{cause[1:].rstrip('.')}."
        found.append(Kind(status, number, status in USABLE_STATUSES, cause, remedy))
    return tuple(found)


_UNKNOWN: Final = "this version of smoothdiag does not know this status"


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(plain_fact(value), ensure_ascii=False, default=str)
    text = printable(text)
    return text if len(text) <= MOST_FACT else f"{text[:MOST_FACT]} … ({len(text)} characters)"
