"""Answers: what a fit means for the run in one sentence, and what to do next."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from smoothdiag.clipping.trust import power_of
from smoothdiag.fits import Verdict
from smoothdiag.fits.wording import OF_TIME, follows_gradients

if TYPE_CHECKING:
    from smoothdiag.clipping import ClipRule
    from smoothdiag.fits import SmoothnessFit
    from smoothdiag.fits.plan import Plan

_AUTOCLIP: Final = "let `AutoClip` keep the steps short"
_MEANWHILE: Final = f"If you want to train now, {_AUTOCLIP}: it needs no law."


@dataclass(frozen=True)
class Clipped:
    """What an AutoClip did in a run, as its rows say.

    Attributes:
        longest_step: the longest step at the last measurement [x].
        threshold: the gradient norm above which it clipped then [f/x]; NaN if it shortened updates.
        fraction: share of the steps that were shortened; NaN if unknown.
        acts: whether it changed anything: not in shadow mode.
    """

    longest_step: float
    threshold: float
    fraction: float
    acts: bool


@dataclass(frozen=True)
class Answer:
    """What to tell somebody who reads one sentence.

    Attributes:
        headline: the sentence.
        because: why, in a sentence or two.
        steps: what to do next, most important first.
        threshold: the value to paste [f/x]; NaN if none follows.
    """

    headline: str
    because: str
    steps: tuple[str, ...]
    threshold: float = math.nan


def answer(fit: SmoothnessFit, rule: ClipRule | None, clipped: Clipped | None, lr: float) -> Answer:
    """Returns the answer of a fit.

    Args:
        fit: the fit.
        rule: the threshold that follows from it; None if there is none at all, as for some scans.
        clipped: what an AutoClip did in the run; None without one.
        lr: the learning rate of the run [x^2/f]; NaN if it is unknown.
    """
    if rule is not None and rule.source == "fit":
        return Answer(_set(rule, lr), rule.reason, tuple(_after_threshold(fit, rule, lr)), rule.threshold)
    plan = fit.plan()
    if clipped is not None and clipped.acts:
        because = f"{_no_threshold(fit, plan)} {sentence(fit.verdict_reason)}"
        return Answer(_kept(clipped), because, (_KEEP, *(step for step in _advice(fit, plan) if step != _MEANWHILE)))
    return Answer(_no_threshold(fit, plan), sentence(fit.verdict_reason), tuple(_advice(fit, plan)))


def no_answer(refusal: str, statuses: dict[str, int], remedy: str, clipped: Clipped | None) -> Answer:
    """Returns the answer where the rows cannot be fitted.

    Args:
        refusal: why not.
        statuses: number of rows by status, the most frequent first.
        remedy: what to do about the most frequent status that fits may not use; empty without such rows.
        clipped: what an AutoClip did in the run; None without one.
    """
    steps = [remedy] if remedy else []
    if "not_measured" in statuses:
        headline = "No threshold follows from a log; attach a `Probe` to a run to measure smoothness."
        return Answer(headline, refusal, (f"In the meantime, {_AUTOCLIP}.",))
    if clipped is not None and clipped.acts:
        return Answer(_kept(clipped), refusal, (_KEEP, *steps))
    return Answer("No threshold follows from this, because its rows cannot be fitted.", refusal, tuple(steps))


def short(value: float) -> str:
    """Returns a number with three digits, as code and people read it."""
    return f"{float(f'{value:.3g}'):g}"


def sentence(text: str) -> str:
    """Returns a text with a capital at its begin and a stop at its end."""
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def percent(share: float) -> str:
    """Returns a share in percent."""
    return f"{share:.0%}" if share >= 0.01 or share == 0 else f"{share:.1%}"


_KEEP: Final = (
    "Keep AutoClip in the loop, and clip nowhere else. `clipper.reason` says where its longest step comes from."
)


def _set(rule: ClipRule, lr: float) -> str:
    with_rate = f" and the learning rate to {short(rule.lr)}" if math.isnan(lr) else ""
    low, high = rule.threshold_interval
    if math.isnan(low):
        sure = "how sure that is, these rows cannot say"
    elif math.isinf(high):
        sure = f"sure only to be above {short(low)}" if low > 0 else "these rows bound it on neither side"
    else:
        sure = f"sure to within {short(low)} to {short(high)}"
    return f"Set max_grad_norm={short(rule.threshold)}{with_rate}; {sure}."


def _kept(clipped: Clipped) -> str:
    as_norm = (
        "" if math.isnan(clipped.threshold) else f", which is max_grad_norm={short(clipped.threshold)} at this rate"
    )
    return f"Nothing to set: AutoClip keeps steps within {short(clipped.longest_step)}{as_norm}."


def _after_threshold(fit: SmoothnessFit, rule: ClipRule, lr: float) -> Iterator[str]:
    where = "Paste the line for your framework from “Configuration to paste” below."
    yield where if math.isnan(lr) else f"{where} It holds for the learning rate {short(lr)} of this run."
    if not math.isnan(lr) and lr > rule.max_lr:
        yield (
            f"Lower the learning rate: it is {short(lr)}, and by this fit small gradients allow at most "
            f"{short(rule.max_lr)}."
        )
    if not math.isnan(rule.clip_rate):
        yield f"Expect to clip about {percent(rule.clip_rate)} of the steps, if later ones are like the recorded ones."
    yield from _advice(fit, fit.plan())


def _no_threshold(fit: SmoothnessFit, plan: Plan) -> str:
    """The sentence for a fit that makes no threshold."""
    if not follows_gradients(fit):
        if fit.follows_gradients is None:
            return f"No threshold follows from this: the rows do not say how {fit.optimizer} makes its steps."
        return (
            f"No threshold follows from this, because {fit.optimizer} rescales its gradients, so that their norm does "
            f"not set the step; {_AUTOCLIP}."
        )
    if fit.verdict is Verdict.CONSTANT:
        keep = f"; keep the learning rate below {short(fit.max_lr)}" if math.isfinite(fit.max_lr) else ""
        return f"No threshold is needed: smoothness does not grow with the gradient norm here{keep}."
    if fit.verdict is Verdict.LOSS_GAP:
        return "No threshold follows from this: the loss sets smoothness; let `sd.LossGapWarmup` set the learning rate."
    if fit.verdict is Verdict.POWER:
        return (
            f"No threshold follows from this: smoothness grows with the power {power_of(fit).exponent:.2g} of the "
            "gradient norm; let `sd.step_rate` set the learning rate."
        )
    return f"No threshold follows from this; {_measure(fit, plan)}."


def _measure(fit: SmoothnessFit, plan: Plan) -> str:
    """What to measure, and how long that takes."""
    scan = f"measure {'another' if fit.num_scans else 'this'} checkpoint with `sd.scan`{_time(plan.scan_minutes)}"
    blocking = [flag for flag in fit.flags if flag.fatal or flag.blocking]
    if "lines" in plan.missing:
        return f"scan this checkpoint again along more lines{_time(plan.minutes)}"
    if "remedy" in plan.missing and not any(flag.name in OF_TIME for flag in blocking):
        remedy = next(flag.remedy for flag in blocking if flag.name not in ("range", "few points"))
        return f"first {remedy.rstrip('.')}"
    if plan.missing == ("rows",) and math.isfinite(plan.rows):
        more = max(plan.rows - plan.rows_now, 0) * fit.num_points / max(fit.num_effective, 1.0)
        return f"measure {more:.0f} more steps like these{_time(plan.minutes)}"
    if plan.missing == ("rows",):
        return "measure more steps like these"
    return scan


def _advice(fit: SmoothnessFit, plan: Plan) -> Iterator[str]:
    """What the plan says, and what does without measuring."""
    if not follows_gradients(fit):
        # What is missing would be measured for a threshold, and there is none to have.
        yield f"{sentence(_AUTOCLIP)[:-1]}: it shortens the updates of any optimizer."
        return
    if fit.verdict is Verdict.CONSTANT and math.isfinite(fit.max_lr):
        yield f"Keep the learning rate, times what momentum adds to it, below 1/L0 = {short(fit.max_lr)}."
    elif fit.verdict is Verdict.LOSS_GAP:
        yield "Let `sd.LossGapWarmup(optimizer, fit)` raise the learning rate as the loss falls."
    elif fit.verdict is Verdict.POWER:
        yield "`sd.step_rate(fit)` gives a learning rate for every gradient norm."
    if plan.missing:
        yield from map(sentence, plan.advice)
    if fit.verdict in (Verdict.NOT_IDENTIFIED, Verdict.ARTEFACT):
        yield _MEANWHILE


def _time(minutes: float) -> str:
    if not math.isfinite(minutes):
        return ""
    return f", about {short(max(60 * minutes, 1))} seconds" if minutes < 2 else f", about {minutes:.0f} minutes"
