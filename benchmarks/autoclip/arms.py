"""The ways of clipping that are compared, by name."""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from clippers import AdaptiveGradientClipping, MaxNorm, Percentile, StepCap, ZClip, relative_cap
from measured import (
    autoclip,
    bounded,
    clip_percentage,
    fed_with,
    for_momentum,
    mean_scale,
    multiple,
    other_batch,
    path,
    shuffled,
    wide,
)
from training import Arm, Clipper, Loop, typical_step
from workloads import Workload

from smoothdiag import ClippedMomentum
from smoothdiag.autoclip import StepRule

EXPONENTS, RATIO = range(-3, 4), 3.0
"""The oracle's longest steps: the typical first step at the smallest rate times these powers."""

MULTIPLES = (0.15, 0.5, 1.0, 1.5, 2.0, 3.0, 6.0, 15.0)

SGD: Any = ("sgd",)


def fixed(loop: Loop, exponent: int) -> Clipper:
    """A threshold that is the same at every step; across rates the grid keeps the lengths of steps."""
    longest = typical_step(loop.workload) * RATIO**exponent
    return StepCap(loop, lambda: longest)


def normalized(workload: Workload, parameters: Any, lr: float) -> torch.optim.Optimizer:
    """Steps of the length that a gradient of norm 1 would lead to."""
    return ClippedMomentum.nsgd_m(parameters, lr * workload.gain, momentum=workload.momentum)


def mixture(workload: Workload, parameters: Any, lr: float) -> torch.optim.Optimizer:
    """Averages where SGD adds up, so its rate is larger by the gain."""
    longest = workload.published_step
    return ClippedMomentum.mix_clip(parameters, lr * workload.gain, longest_step=longest, clip="soft")


def averaged(workload: Workload, parameters: Any, lr: float) -> torch.optim.Optimizer:
    return ClippedMomentum(parameters, lr * workload.gain, longest_step=math.inf, momentum=workload.momentum)


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
    "normalized": Arm(nothing, normalized, SGD),
    "mixclip": Arm(nothing, mixture, SGD),
}

DOSES = {f"autoclip_x{factor:g}": Arm(autoclip(multiple(factor))) for factor in MULTIPLES}

WIDE = {f"wide_x{factor:g}": Arm(wide(multiple(factor)), kinds=SGD) for factor in MULTIPLES}

AUTOCLIP = {
    "autoclip": Arm(autoclip()),
    "autoclip_bounded_0.03": Arm(autoclip(bounded(0.03))),
    "autoclip_relative_0.03": Arm(autoclip(lambda workload: StepRule(multiple=None, relative=0.03))),
    "momentum_wide": Arm(wide(for_momentum(0.03, bounded=False)), kinds=SGD),
    "momentum_wide_bounded_0.1": Arm(wide(for_momentum(0.1, bounded=True)), kinds=SGD),
    "autoclip_set": Arm(autoclip(mode="set"), averaged, SGD),
}

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
    "rules": AUTOCLIP,
    "doses": DOSES,
    "wide": WIDE,
    "controls": CONTROLS,
}

ARMS = {name: arm for group in GROUPS.values() for name, arm in group.items()}


def named(names: Iterable[str]) -> list[str]:
    """Returns names of arms in order, groups spelt out.

    Raises:
        ValueError: If a name is neither that of an arm nor of a group.
    """
    found: dict[str, None] = {}
    for name in names:
        if name not in ARMS and name not in GROUPS:
            raise ValueError(f"Parameter `arms` should name arms or groups of them. Found `{name}`.")
        found |= dict.fromkeys([name] if name in ARMS else GROUPS[name])
    return list(found)
