"""The ways of clipping that are compared, by name."""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from clippers import AdaptiveGradientClipping, MaxNorm, Percentile, StepCap, ZClip, relative_cap
from law import ByRun, ByScan
from measured import (
    as_judged,
    autoclip,
    bounded,
    clip_percentage,
    fed_with,
    mean_scale,
    other_batch,
    path,
    raised,
    scaled,
    shuffled,
    without_noise,
    without_rise,
    without_schedule,
)
from rivals import AdaGC, SkipStep, Spectral, prodigy, schedule_free, stable
from torch import nn
from training import Arm, Clipper, Loop, typical_step
from workloads import Workload

from smoothdiag import ClippedMomentum, DirectionalCurvature, LocalSmoothness
from smoothdiag.autoclip import StepRule
from smoothdiag.autoclip.calibration import PHASE

EXPONENTS, RATIO = range(-3, 4), 3.0
"""The oracle's longest steps: the typical first step at the smallest rate times these powers."""

FACTORS = (0.1, 0.25, 0.5, 2.0, 4.0, 10.0)
"""Doses, in AutoClip's own longest steps."""

SGD: Any = ("sgd",)


def fixed(loop: Loop, exponent: int) -> Clipper:
    """A fixed threshold; the grid of thresholds gives the same lengths of steps at every rate."""
    longest = typical_step(loop.workload) * RATIO**exponent
    return StepCap(loop, lambda: longest)


def normalized(workload: Workload, model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Steps of the length that a gradient of norm 1 would lead to."""
    return [ClippedMomentum.nsgd_m(model.parameters(), lr * workload.gain, momentum=workload.momentum)]


def mixture(workload: Workload, model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """An optimizer that averages gradients while SGD adds them up, so its rate is larger by the gain."""
    longest = workload.published_step
    return [ClippedMomentum.mix_clip(model.parameters(), lr * workload.gain, longest_step=longest, clip="soft")]


def averaged(workload: Workload, model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """A threshold and no longest step, which AutoClip would set to zero, a value that is refused, at a rate of zero."""
    threshold, momentum = math.inf, workload.momentum
    return [ClippedMomentum(model.parameters(), lr * workload.gain, threshold=threshold, momentum=momentum)]


def half(workload: Workload) -> StepRule:
    """Updates of half the measured length, the best multiple along updates in earlier experiments."""
    return StepRule(multiple=0.5)


def nothing(loop: Loop) -> Clipper:
    return Clipper()


ORACLE = {
    "none": Arm(nothing),
    **{f"fixed{i}": Arm(partial(fixed, exponent=exponent)) for i, exponent in enumerate(EXPONENTS, start=1)},
}

CAPS = {f"relative_{share:g}": Arm(partial(relative_cap, share=share)) for share in (0.01, 0.03)}

BASELINES = {
    "max_norm_1": Arm(partial(MaxNorm, max_norm=1.0)),
    **CAPS,
    "percentile_10": Arm(partial(Percentile, percent=10.0)),
    "zclip": Arm(ZClip),
    "agc": Arm(AdaptiveGradientClipping),
    "adagc": Arm(AdaGC),
    "spectral": Arm(Spectral),
    "skip_step": Arm(SkipStep),
    "stable_adamw": Arm(nothing, stable, ("adamw",)),
    "normalized": Arm(nothing, normalized, SGD),
    "mixclip": Arm(nothing, mixture, SGD),
}

FREE = {"prodigy": Arm(nothing, prodigy), "schedule_free": Arm(nothing, schedule_free)}
"""Optimizers without a rate, which say nothing of clipping."""

AUTOCLIP = {"autoclip": Arm(autoclip()), "autoclip_set": Arm(autoclip(mode="set"), averaged, SGD)}

LAW = {"law_scan": Arm(ByScan, averaged, SGD), "law_run": Arm(ByRun, averaged, SGD)}
"""Thresholds from fitted L0 and L1."""

ABLATIONS = {
    "without_noise": Arm(autoclip(without_noise)),
    "without_schedule": Arm(without_schedule),
    "without_rise": Arm(without_rise),
    "as_judged": Arm(as_judged),
}
"""AutoClip with a part of its rule left out."""

DOSES = {f"autoclip_x{factor:g}": Arm(autoclip(scaled(factor))) for factor in FACTORS}

SET_DOSES = {f"set_x{factor:g}": Arm(autoclip(scaled(factor), mode="set"), averaged, SGD) for factor in FACTORS}

TRIED = {
    "tried_bounded": Arm(autoclip(bounded), kinds=SGD),
    "tried_one_multiple": Arm(autoclip(lambda workload: StepRule()), kinds=SGD),
    "tried_short_secants": Arm(autoclip(estimator=LocalSmoothness(two_scale=False)), kinds=SGD),
    "tried_along_update": Arm(
        autoclip(half, estimator=LocalSmoothness(0.01, "update", two_scale=False)), kinds=("adamw",)
    ),
    "tried_quotient": Arm(autoclip(half, estimator=DirectionalCurvature("update")), kinds=("adamw",)),
}

RAISING = {
    "set_lr": Arm(autoclip(set_lr=True)),
    "set_lr_half": Arm(raised(lambda step: 0.5)),
    "set_lr_line": Arm(raised(lambda step: min(1.0, (step + 1) / PHASE))),
    "set_lr_late": Arm(raised(lambda step: float(step >= PHASE))),
}
"""AutoClip that raises a rate that is too small, half as far, along a straight line, and when its calibration ends."""

CONTROLS = {
    "control_shuffled": Arm(fed_with(shuffled), kinds=SGD),
    "control_path": Arm(fed_with(path), kinds=SGD),
    "control_other_batch": Arm(fed_with(other_batch), kinds=SGD),
    "control_percentile": Arm(lambda loop: Percentile(loop, 100 - clip_percentage(loop)), kinds=SGD),
    "control_lower_rate": Arm(nothing, kinds=SGD, rate=mean_scale),
}

GROUPS = {
    "oracle": ORACLE,
    "baselines": BASELINES,
    "free": FREE,
    "rules": AUTOCLIP,
    "law": LAW,
    "ablations": ABLATIONS,
    "doses": DOSES,
    "set_doses": SET_DOSES,
    "tried": TRIED,
    "controls": CONTROLS,
    "raising": RAISING,
}

ARMS = {name: arm for group in GROUPS.values() for name, arm in group.items()}


def named(names: Iterable[str]) -> list[str]:
    """Returns the names of arms in order, with groups replaced by their members.

    Raises:
        ValueError: If a name belongs neither to an arm nor to a group.
    """
    found: dict[str, None] = {}
    for name in names:
        if name not in ARMS and name not in GROUPS:
            raise ValueError(f"Parameter `arms` should name arms or groups of them. Found `{name}`.")
        found |= dict.fromkeys([name] if name in ARMS else GROUPS[name])
    return list(found)
