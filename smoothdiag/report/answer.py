"""Answers: what a fit means for the run in one sentence, and what to do next."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from smoothdiag.fits import Verdict
from smoothdiag.fits.decision import OPEN, SHADOW, Decision, Do, exponent_of
from smoothdiag.fits.text import minutes

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
        diverged: why a run in shadow mode does not say where to clip; empty if it does.
        saturated: share of its measurements that were saturated.
    """

    longest_step: float
    threshold: float
    fraction: float
    acts: bool
    diverged: str = ""
    saturated: float = 0.0

    @property
    def as_norm(self) -> str:
        """The threshold as one sets it; empty if there is none."""
        return f"max_grad_norm={short(self.threshold)}" if math.isfinite(self.threshold) else ""


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
    """Returns the answer of a fit, which says what `fits.decision` decided.

    Args:
        fit: the fit.
        rule: the threshold that follows from it; None if there is none at all, as for some scans.
        clipped: what an AutoClip did in the run; None without one.
        lr: the learning rate of the run [x^2/f]; NaN if it is unknown.
    """
    plan = fit.plan()
    decision = plan.decision
    because = sentence(fit.verdict_reason)
    if decision.do is Do.THRESHOLD:
        if rule is None or rule.source != "fit":
            headline = "A threshold follows as soon as the learning rate is known: give it with `--lr`."
            return Answer(headline, because, ("Call `sd.clip_rule(fit, lr=...)`, or `smoothdiag report --lr`.",))
        return Answer(_set(rule, lr), rule.reason, tuple(_after_threshold(fit, rule, lr, plan)), rule.threshold)
    if decision.do is Do.KEEP:
        return Answer(_kept(clipped), f"{_WITHOUT} {because}", (*_keep(clipped), *_advice(fit, plan)))
    if decision.do is Do.ACT and clipped is not None and clipped.diverged:  # rows of such a run need no more of them
        return Answer(_would(clipped), f"{_WITHOUT} {because}", (_AGAIN,))
    if decision.do is Do.ACT:
        return Answer(_would(clipped), f"{_WITHOUT} {because}", (_ACT, *_advice(fit, plan)))
    if decision.do is Do.AUTOCLIP:
        because = f"L0 and L1 bound a step only if it is the rate times an average of gradients. Of the law: {because}"
    return Answer(_no_threshold(fit, decision), because, tuple(_advice(fit, plan)))


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
    if clipped is not None:
        if clipped.acts:
            return Answer(_kept(clipped), refusal, (*_keep(clipped), *steps))
        return Answer(_would(clipped), refusal, (_AGAIN,) if clipped.diverged else (_ACT, *steps))
    return Answer("No threshold follows from this, because its rows cannot be fitted.", refusal, tuple(steps))


def short(value: float) -> str:
    """Returns a number with three digits, as code and people read it."""
    return f"{float(f'{value:.3g}'):g}"


def floored(value: float) -> float:
    """Returns a positive number rounded down to three digits."""
    unit = 10 ** (math.floor(math.log10(value)) - 2)
    return float(f"{math.floor(value / unit) * unit:.3g}")


def sentence(text: str) -> str:
    """Returns a text with a capital at its begin and a stop at its end."""
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def percent(share: float) -> str:
    """Returns a share in percent."""
    return f"{share:.0%}" if share >= 0.01 or share == 0 else f"{share:.1%}"


_KEEP: Final = (
    "Keep AutoClip in the loop, and clip nowhere else. `clipper.reason` says where its longest step comes from."
)
_ACT: Final = (
    'Give AutoClip `mode="clip"` in place of `mode="shadow"`, and clip nowhere else. `clipper.threshold` and '
    "`clipper.reason` say by which threshold it would clip, and why."
)
_AGAIN: Final = (
    'Begin again with AutoClip(mode="clip") and clip nowhere else: AutoClip then keeps the steps short from the first '
    "one on, and measures a run that trains."
)
_WITHOUT: Final = "No threshold follows from a fit to these rows."


def _set(rule: ClipRule, lr: float) -> str:
    with_rate = f" and the learning rate to {short(rule.lr)}" if _moves(rule, lr) else ""
    low, high = rule.threshold_interval
    if math.isnan(low):
        sure = "how sure that is, these rows cannot say"
    elif math.isinf(high):
        sure = f"sure only to be above {short(low)}" if low > 0 else "these rows bound it on neither side"
    elif short(low) == short(high):
        sure = "sure to three digits"
    else:
        sure = f"sure to within {short(low)} to {short(high)}"
    return f"Set max_grad_norm={short(rule.threshold)}{with_rate}; {sure}."


def _moves(rule: ClipRule, lr: float) -> bool:
    """Whether the threshold asks for another learning rate than the run had."""
    return math.isnan(lr) or rule.lr < lr * (1 - 1e-9)


def _kept(clipped: Clipped | None) -> str:
    if clipped is None:
        return "Nothing to set: AutoClip keeps the steps of this run short."
    as_norm = f", which is {clipped.as_norm} at this rate" if clipped.as_norm else ""
    return f"Nothing to set: AutoClip keeps steps within {short(clipped.longest_step)}{as_norm}."


def _keep(clipped: Clipped | None) -> Iterator[str]:
    yield _KEEP
    if clipped is not None and clipped.saturated > 0.5:
        yield (
            f"Compare the loss with a run in shadow mode: {percent(clipped.saturated)} of AutoClip's measurements are "
            "saturated, so its longest step is a guess: it tells how far AutoClip looked, and hardly the "
            "curvature of the loss."
        )


def _would(clipped: Clipped | None) -> str:
    if clipped is None:
        return "Nothing was clipped: AutoClip was in shadow mode."
    if clipped.diverged:
        return (
            f"The run went wrong while AutoClip was in shadow mode: {clipped.diverged}. Where to clip does not follow."
        )
    if clipped.as_norm:
        return f"Nothing was clipped: AutoClip was in shadow mode, and would clip at {clipped.as_norm} at this rate."
    within = short(clipped.longest_step)
    return f"Nothing was clipped: AutoClip was in shadow mode, and would keep steps within {within}."


def _after_threshold(fit: SmoothnessFit, rule: ClipRule, lr: float, plan: Plan) -> Iterator[str]:
    where = "Paste the line for your framework from “Configuration to paste” below."
    of_run = "" if _moves(rule, lr) else " of this run"
    yield where if math.isnan(lr) else f"{where} It holds for the learning rate {short(rule.lr)}{of_run}."
    if not math.isnan(lr) and _moves(rule, lr):
        yield (
            f"Lower the learning rate from {short(lr)} to {short(rule.lr)}: this run's is too large for any threshold, "
            "by this fit."
        )
    if fit.clip_mode not in ("", SHADOW):
        yield "AutoClip kept the steps of this run short. Set the threshold, or keep AutoClip, but do not use both."
    if not math.isnan(rule.clip_rate):
        yield f"Expect to clip about {percent(rule.clip_rate)} of the steps, if later ones are like the recorded ones."
    yield from _advice(fit, plan)


def _no_threshold(fit: SmoothnessFit, decision: Decision) -> str:
    """The sentence where no threshold follows."""
    none = "No threshold follows from this"
    there = "another" if fit.num_scans else "this"
    cost = f", {_about(decision.minutes)}" if math.isfinite(decision.minutes) else ""
    more = f"{decision.more:.0f} " if math.isfinite(decision.more) else ""
    said = {
        Do.RATE: f"{none}: {_why_a_rate(fit)}; let `sd.step_rate` set the learning rate",
        Do.WARMUP: f"{none}: the loss sets smoothness; let `sd.LossGapWarmup` set the learning rate",
        Do.AUTOCLIP: f"{none}{_why_autoclip(fit)}; {_AUTOCLIP}",
        Do.PROBE: f"{none}; record rows with `sd.Probe`, because these could not be checked for artefacts",
        Do.REMEDY: f"{none}; first {decision.remedy}",
        Do.LINES: f"{none}; scan this checkpoint again along lines of other kinds{cost}",
        Do.ROWS: f"{none}; record {more}more rows like these{cost}",
        Do.SCAN: f"{none}; scan {there} checkpoint with `sd.scan`{cost}",
    }
    if fit.verdict is Verdict.CONSTANT and decision.do is Do.RATE:
        keep = f", at most {short(fit.max_lr)}" if math.isfinite(fit.max_lr) else ""
        return (
            "No threshold is needed, because smoothness does not grow with the gradient norm here; let `sd.step_rate` "
            f"set the learning rate{keep}."
        )
    return f"{said[decision.do]}."


def _why_a_rate(fit: SmoothnessFit) -> str:
    if fit.verdict is Verdict.POWER:
        return f"smoothness grows with the power {exponent_of(fit):.2g} of the gradient norm"
    return "smoothness may not grow with the gradient norm at all"


def _why_autoclip(fit: SmoothnessFit) -> str:
    optimizer = fit.optimizer or "the optimizer"
    if fit.follows_gradients is None:
        return f": the rows do not say how {optimizer} makes its steps"
    return f", because {optimizer} rescales its gradients, so that their norm does not set the step"


def _advice(fit: SmoothnessFit, plan: Plan) -> Iterator[str]:
    """What the plan says, and what does without measuring."""
    decision = plan.decision
    if decision.do is Do.AUTOCLIP:
        # What is missing would be measured for a threshold, and there is none to have.
        yield f"{sentence(_AUTOCLIP)[:-1]}: it shortens the updates of any optimizer."
        return
    if decision.do is Do.RATE and fit.verdict is Verdict.CONSTANT and math.isfinite(fit.max_lr):
        yield f"Keep the learning rate, times what momentum adds to it, below 1/L0 = {short(fit.max_lr)}."
    if decision.do is Do.RATE:
        yield "`sd.step_rate(fit)` gives a learning rate for every gradient norm."
    elif decision.do is Do.WARMUP:
        yield "Let `sd.LossGapWarmup(optimizer, fit)` raise the learning rate as the loss falls."
    elif decision.do is Do.PROBE:
        yield "Record rows with `sd.Probe`: it notes how far the step length set the smoothness (`saturation`)."
    if plan.missing:
        yield from map(sentence, plan.advice)
    if fit.verdict in OPEN and decision.do not in (Do.KEEP, Do.ACT):
        yield _MEANWHILE


def _about(time: float) -> str:
    said = minutes(time)
    return said if said.startswith("less") else f"about {said}"
