"""Result: what the first steps of a run tell about its clipping and its rate, as numbers and in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Final

from smoothdiag.adapters import name_of
from smoothdiag.autoclip.calibration import FEWEST, median_interval
from smoothdiag.console import counted
from smoothdiag.diverged import why_diverged
from smoothdiag.launch.attaching import Attached
from smoothdiag.rows import CLIP_SUFFIX, USABLE_STATUSES, Status

HABITS: Final = (
    (0.1, "DETR"),
    (0.25, "AWD-LSTM"),
    (0.5, "PPO in Stable-Baselines3"),
    (1.0, "GPT-3, Llama, nanoGPT; default of the Hugging Face Trainer"),
    (5.0, "Sutskever et al. 2014, sequence to sequence"),
)
"""Thresholds on the gradient norm that are published: Carion et al. 2020 (main.py), Merity et al. 2018 (main.py),
Raffin et al. 2021 (ppo.py), Brown et al. 2020 (appendix B), Touvron et al. 2023 (section 2.3), nanoGPT (train.py)."""

ASK: Final = (
    "To have this measured, attach it in the script, with a loss_fn(model, batch) that returns the loss of one batch: "
    'probe = sd.Probe(model, optimizer, loss_fn); clipper = sd.AutoClip(optimizer, probe, mode="shadow").'
)


_ANOTHER: Final = (
    "The loss that was computed again is another one than the loop trains: their gradients differ. Something that the "
    "loss depends on has changed between forward pass and step, so nothing is reported that follows from it."
)
_UNTESTED: Final = (
    "Nothing shows whether the loss that was computed again is the one that the loop trains, because there was no "
    "gradient of backward() to compare with. So nothing is reported that follows from it."
)


@dataclass(frozen=True)
class Clip:
    """The clips of one line.

    Attributes:
        file: Its file.
        line: Its number.
        threshold: Largest norm that it leaves alone [f/x].
        number: How many clips there were.
        clipped: How many of them shortened the gradient.
        median_norm: Median of the norms before clipping [f/x].
        largest_norm: The largest of them [f/x].
        longest_steps: How many longest steps long a step at the threshold is; NaN if norms do not set the steps.
    """

    file: str
    line: int
    threshold: float
    number: int
    clipped: int
    median_norm: float
    largest_norm: float
    longest_steps: float


@dataclass(frozen=True)
class Habit:
    """A published threshold, at this run.

    Attributes:
        threshold: The threshold [f/x].
        who: Who uses it.
        share: Share of the gradient norms of these steps that it would clip.
        longest_steps: How many longest steps long a step at the threshold is; NaN if norms do not set the steps.
    """

    threshold: float
    who: str
    share: float
    longest_steps: float


@dataclass(frozen=True)
class LaunchCheck:
    """What the first steps of a run tell.

    Attributes:
        steps: Steps that the run took.
        asked: Steps that it was to take.
        optimizer: Its optimizer; empty if none was seen.
        lr: The largest learning rate, or the peak that its schedule plans [x^2/f].
        clips: Its clips by the norm, by line.
        norms: Gradient norm of each step, before clipping, where it is known [f/x].
        measurements: How many measurements the suggestion rests on.
        longest_step: The longest step that they suggest [x]; NaN with too few.
        longest_step_interval: Interval that contains it 9 times in 10, as far as measurements scatter [x].
        threshold: The gradient norm at which steps are that long [f/x]; NaN if norms do not set the steps.
        threshold_interval: The same for the threshold [f/x].
        threshold_share: Share of the norms above the threshold.
        over: Share of the steps that were longer than the longest step.
        step_lengths: Median length of the steps, in longest steps.
        suggested_lr: Rate at which a step of median length is as long as ||g||/L [x^2/f].
        critical_lr: Median rate above which a step would have raised the loss of its batch [x^2/f].
        critical_lr_interval: The smallest and the largest of them [x^2/f].
        critical_multiple: Median factor by which a step could have been longer before it raised the loss of its batch.
        habits: Published thresholds, at this run.
        not_measured: What was not measured, and why.
        warnings: What the measurement has warned of.
    """

    steps: int
    asked: int
    optimizer: str
    lr: float
    clips: Sequence[Clip]
    norms: Sequence[float]
    measurements: int
    longest_step: float
    longest_step_interval: tuple[float, float]
    threshold: float
    threshold_interval: tuple[float, float]
    threshold_share: float
    over: float
    step_lengths: float
    suggested_lr: float
    critical_lr: float
    critical_lr_interval: tuple[float, float]
    critical_multiple: float
    habits: Sequence[Habit]
    not_measured: Sequence[str]
    warnings: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as numbers and strings."""
        return asdict(self)


def result_of(found: Attached, steps: int, asked: int) -> LaunchCheck:
    """Returns what a run tells that has ended."""
    norms = [norm for norm in found.norms.of_steps() if math.isfinite(norm)]
    doubt = _doubt(found)
    lengths, factor, refusals = ([], math.nan, [doubt]) if doubt else _measured(found)
    clipper, probe = found.clipper, found.probe
    is_known = clipper is not None and len(lengths) >= FEWEST
    longest = clipper.longest_step if clipper is not None and is_known else math.nan
    threshold = clipper.threshold if clipper is not None and is_known else math.nan
    low, high = (factor * bound for bound in median_interval(lengths))
    scale = threshold / longest
    critical, multiples = _finite(found, "critical_lr"), _finite(found, "critical_multiple")
    taken = _lengths_taken(found)
    return LaunchCheck(
        steps=steps,
        asked=asked,
        optimizer="" if probe is None else name_of(probe.optimizer),
        lr=_rate(found),
        clips=[_clip(clips, threshold) for clips in found.norms.clips.values()],
        norms=norms,
        measurements=len(lengths),
        longest_step=longest,
        longest_step_interval=(low, high),
        threshold=threshold,
        threshold_interval=(scale * low, scale * high),
        threshold_share=_share(norms, threshold),
        over=sum(length > longest for length in taken) / len(taken) if taken and is_known else math.nan,
        step_lengths=median(taken) / longest if taken else math.nan,
        suggested_lr=clipper.suggest_lr() if clipper is not None and is_known else math.nan,
        critical_lr=median(critical) if critical else math.nan,
        critical_lr_interval=(min(critical), max(critical)) if critical else (math.nan, math.nan),
        critical_multiple=median(multiples) if multiples else math.nan,
        habits=[Habit(t, who, _share(norms, t), t / threshold) for t, who in HABITS] if norms else [],
        not_measured=[*found.refusals, *refusals],
        warnings=[each for each in found.warnings if not _is_said_better(each)],
    )


def _doubt(found: Attached) -> str:
    """Returns why the loss that was measured may not be the trained one; empty if nothing speaks against it."""
    if found.probe is None or not (rows := _usable(found)):
        return ""
    if any(row["status"] == "not_reproduced" for row in rows):
        return _ANOTHER
    if why := why_diverged(found.probe.trace):
        return (
            f"The run itself went wrong: {why}. Its steps tell no longest step and no threshold; lower the rate first."
        )
    test = found.probe.self_test
    return _UNTESTED if test is None or math.isnan(test.angle) else ""


def _measured(found: Attached) -> tuple[list[float], float, list[str]]:
    """Returns the measured lengths, the longest step in median lengths, and what is not known, in sentences."""
    if found.clipper is None:
        return [], math.nan, []
    calibration = found.clipper.state_dict()["calibration"]
    held = calibration["held_at"]
    lengths = [each[1] for each in calibration["measurements"] if held < 0 or each[0] < held]
    refusals = []
    if len(lengths) < FEWEST and not found.refusals:
        why = ""
        for status, number in sorted(calibration["invalid"].items(), key=lambda item: -item[1]):
            cause = Status[status.upper()].value if status.upper() in Status.__members__ else status
            why += f" {counted(number, 'measurement')} could not be used: {cause}"
        least = f"The longest step is not known: it needs {FEWEST} measurements, and there are {len(lengths)}.{why}"
        refusals.append(least)
    return lengths, calibration["longest"] / median(lengths) if lengths else math.nan, refusals


def _finite(found: Attached, column: str) -> list[float]:
    return [row[column] for row in _steps(found) if math.isfinite(row[column])]


def _lengths_taken(found: Attached) -> list[float]:
    """Returns the lengths of the measured steps [x]."""
    lengths = [row["step_norm"] / row["critical_multiple"] for row in _steps(found) if row["critical_multiple"] > 0]
    return [length for length in lengths if math.isfinite(length)]


def _rate(found: Attached) -> float:
    rows = [] if found.probe is None else list(found.probe.trace)
    peaks = [row["peak_lr"] for row in rows if row["estimator"].endswith(CLIP_SUFFIX) and "peak_lr" in row]
    rates = [row["lr"] for row in rows if "lr" in row and math.isfinite(row["lr"])]
    if peaks or rates:
        return float(peaks[-1] if peaks else max(rates))
    groups = [] if found.probe is None else found.probe.optimizer.param_groups
    return max((float(group["lr"]) for group in groups), default=math.nan)


def _usable(found: Attached) -> list[Mapping[str, Any]]:
    rows = [] if found.probe is None else list(found.probe.trace)
    return [row for row in rows if row["status"] in USABLE_STATUSES]


def _steps(found: Attached) -> list[Mapping[str, Any]]:
    """Returns the rows of CriticalStep that can be used."""
    return [] if _doubt(found) else [row for row in _usable(found) if row["estimator"] == "critical_step"]


def _clip(clips: Any, threshold: float) -> Clip:
    norms = [float(norm) for norm in clips.norms]
    finite = [norm for norm in norms if math.isfinite(norm)] or [math.nan]
    site, limit = clips.site, clips.threshold
    return Clip(site.file, site.line, limit, len(norms), clips.clipped, median(finite), max(finite), limit / threshold)


def _share(norms: Sequence[float], threshold: float) -> float:
    return sum(norm > threshold for norm in norms) / len(norms) if norms and not math.isnan(threshold) else math.nan


def _is_said_better(warning: str) -> bool:
    """Returns whether the result itself says what a warning does."""
    known = ("Something else seems to clip first", "was not measured: Unknown", "The gradient of loss_fn points")
    return any(part in warning for part in known)
