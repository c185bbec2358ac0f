"""Words: what a launch check says to people."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from smoothdiag.console import counted
from smoothdiag.launch.result import ASK, Clip, LaunchCheck

FAR: Final = 2.0
"""Factor from which on a threshold and the suggested one are called different: measurements scatter as much."""

MOST: Final = 0.9
"""Share of clipped steps from which on the text says that gradients no longer count."""

_OF_LOSS: Final = ("The loss ", "The loop ", "Nothing shows ")
"""Begins of reasons that a loss_fn would remove."""


def as_text(found: LaunchCheck) -> str:
    """Returns the result in words; what is wrong with the script, the doctor says."""
    parts = (_head(found), _clips(found), _longest(found), _rates(found), _habits(found), _gaps(found))
    return "\n\n".join("\n".join(lines) for part in parts if (lines := list(part)))


def _head(found: LaunchCheck) -> Iterator[str]:
    rate = "" if math.isnan(found.lr) else f" at learning rate {found.lr:.3g}"
    taken = f" of {found.optimizer}{rate}" if found.optimizer else ""
    yield f"smoothdiag launch-check: {counted(found.steps, 'step')}{taken}"
    if found.steps >= found.asked:
        yield (
            f"The run was stopped after step {found.steps}: its last lines did not run, and what it writes at its end "
            "was not written."
        )
    else:
        yield f"The script ended by itself before it had taken {found.asked} steps, so less is known."


def _clips(found: LaunchCheck) -> Iterator[str]:
    if not found.clips:
        yield "CLIPPING: no clip by the norm with a positive, finite threshold was seen."
    for clip in found.clips:
        share = clip.clipped / clip.number
        yield (
            f"CLIPPING: max_norm={clip.threshold:g} at {clip.file}:{clip.line} shortened {clip.clipped} of "
            f"{counted(clip.number, 'gradient')} ({share:.0%}). Their norms before: median {clip.median_norm:.3g}, "
            f"largest {clip.largest_norm:.3g}."
        )
        if not math.isnan(clip.longest_steps):
            yield f"  Your max_norm={clip.threshold:g} is {_times(clip.longest_steps)}: {_meaning(clip)}."


def _meaning(clip: Clip) -> str:
    if clip.longest_steps > FAR:
        return "a step at that norm is much longer than curvature allows, so it stops less than it could"
    if clip.longest_steps < 1 / FAR:
        return "it keeps steps much shorter than curvature allows"
    return "it fits what was measured"


def _longest(found: LaunchCheck) -> Iterator[str]:
    if math.isnan(found.longest_step):
        yield "LONGEST STEP: not known, so no threshold is suggested."
        return
    low, high = found.longest_step_interval
    sure = "" if math.isnan(low) else f", 9 times in 10 within {low:.3g} to {high:.3g}"
    yield f"LONGEST STEP: {found.longest_step:.3g} from {counted(found.measurements, 'measurement')}{sure}."
    if not math.isnan(found.threshold):
        low, high = found.threshold_interval
        sure = "" if math.isnan(low) else f" ({low:.3g} to {high:.3g})"
        yield (
            f"  SUGGESTED: max_norm={found.threshold:.3g}{sure} at learning rate {found.lr:.3g}. It would have clipped "
            f"{found.threshold_share:.0%} of these steps."
        )
        if found.threshold_share >= MOST:
            yield "  With nearly every step clipped, the threshold alone would set how long steps are; see RATE."
    else:
        yield (
            f"  {found.optimizer} rescales its gradients, so no max_norm keeps its steps that short. "
            "sd.AutoClip(optimizer, probe) shortens the updates themselves."
        )
    if not math.isnan(found.step_lengths):
        yield (
            f"  The median step of this run was {_times(found.step_lengths)} long; {found.over:.0%} of the measured "
            "steps were longer than one."
        )
    yield _sureness(found)


def _sureness(found: LaunchCheck) -> str:
    low, high = found.longest_step_interval
    if math.isnan(low):
        return "  HOW SURE: fewer than five measurements give no interval; run more steps."
    ratio = high / low
    said = "good to a factor of" if ratio < 4 else "only good to a factor of"
    return (
        f"  HOW SURE: {said} {math.sqrt(ratio):.2g} either way, for the first steps. Curvature changes as training "
        "goes on; AutoClip follows it."
    )


def _rates(found: LaunchCheck) -> Iterator[str]:
    if math.isnan(found.critical_lr):
        if not math.isnan(found.critical_multiple):  # groups or optimizers have rates of their own
            longer = f"{found.critical_multiple:.2g} times as long"
            yield f"RATE: steps {longer} would have raised the loss of their own batch."
        return
    low, high = found.critical_lr_interval
    now = "" if math.isnan(found.lr) else f" The rate is {found.lr:.3g}, {found.lr / found.critical_lr:.2g} of it."
    yield (
        f"RATE: above {found.critical_lr:.3g} (median; {low:.3g} to {high:.3g}) a step would have raised the loss of "
        f"its own batch.{now}"
    )
    if not math.isnan(found.suggested_lr):
        yield (
            f"  At {found.suggested_lr:.3g} a step of median length is the best one along the gradient, on its batch; "
            "shorter steps need no clip."
        )


def _habits(found: LaunchCheck) -> Iterator[str]:
    if not found.habits:
        return
    yield "PUBLISHED HABITS, on the norms of these steps:"
    for habit in found.habits:
        longest = "" if math.isnan(habit.longest_steps) else f", {_times(habit.longest_steps)}"
        yield f"  max_norm={habit.threshold:g} ({habit.who}): clips {habit.share:.0%}{longest}"


def _gaps(found: LaunchCheck) -> Iterator[str]:
    for reason in found.not_measured:
        yield f"NOT MEASURED: {reason}"
    if any(reason.startswith(_OF_LOSS) for reason in found.not_measured):
        yield ASK
    for warning in found.warnings:
        yield f"WARNING: {warning}"


def _times(number: float) -> str:
    if number >= 10:
        return f"{number:.0f} longest steps"
    return f"{number:.2g} longest step{'' if f'{number:.2g}' == '1' else 's'}"
