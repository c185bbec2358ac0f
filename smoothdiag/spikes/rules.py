"""Rules: what a guard takes for a spike. `smoothdiag.spiking` has the rule that logs are read by, too."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from smoothdiag import arguments
from smoothdiag.spikes.robust import Robust, Usual
from smoothdiag.spikes.statistics import Averages, Moments, Statistics
from smoothdiag.spiking import SpikeRule


@dataclass(frozen=True)
class SixSigma:
    """Loss or gradient norm lies more than six standard deviations from the mean of the last 128 steps.

    Deviations from the published code, in which one value that is not finite makes every comparison false, so that the
    next 128 steps are skipped, too: values that are not finite, and norms of 0, are left out of mean and deviation. If
    all values of the window are equal, an equal value is no spike.

    Args:
        window: How many of the last values count.
        sigmas: Least distance from the mean, on either side, in standard deviations.

    Raises:
        ValueError: If an argument is out of its range.

    Source: OLMo-core, ``SkipStepOptimizer`` (``optim/skip_step_optimizer.py``), which skips such steps from its
    max(20, window / 2)-th on.

    Examples:
        >>> optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)
        >>> print(sd.SpikeGuard(optimizer, rule=sd.SixSigma(), action="skip"))
        <SpikeGuard of SGD, action 'skip'; `events` lists the spikes>
    """

    window: int = 128
    sigmas: float = 6.0

    def __post_init__(self) -> None:
        arguments.whole("window", self.window, 4)
        arguments.positive("sigmas", self.sigmas)


@dataclass(frozen=True)
class ZClip:
    """The gradient norm lies more than 2.5 standard deviations above a running average.

    With the action "clip", a spike with z standard deviations is clipped to mean + 2.5 std / (z / 2.5). The running
    averages count a spike with this norm, whatever the action is. The loss is never a spike.

    Deviations from the published code: it also clips every gradient to norm 1; here nothing else is clipped. Norms that
    are not finite, and norms of 0, are left out.

    Args:
        alpha: Weight of the past in the running averages of norm and variance, in (0, 1).
        z: Least distance above the average, in standard deviations.
        warm_up: Number of values that the averages start from. Nothing is a spike among them.

    Raises:
        ValueError: If an argument is out of its range.

    Source: Kumar et al. 2025, *ZClip: Adaptive Spike Mitigation for LLM Pre-Training*, and their code with its defaults
    (``mode="zscore"``, ``clip_option="adaptive_scaling"``).

    Examples:
        >>> optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)
        >>> print(sd.SpikeGuard(optimizer, rule=sd.ZClip(), action="clip"))
        <SpikeGuard of SGD, action 'clip'; `events` lists the spikes>
    """

    alpha: float = 0.97
    z: float = 2.5
    warm_up: int = 25

    def __post_init__(self) -> None:
        arguments.number("alpha", self.alpha, "in (0, 1)", lambda v: 0 < v < 1)
        arguments.positive("z", self.z)
        arguments.whole("warm_up", self.warm_up, 2)


@dataclass(frozen=True)
class SPAM:
    """An element of the gradient is a spike if its square exceeds 5000 times its second moment in the optimizer.

    With the action "clip", these elements become sign(g) sqrt(theta v), and all others stay as they are; "log" counts
    them, "skip" leaves out the step. In an event, ``elements`` is their number, and ``largest_element`` the largest
    |g| / sqrt(v). Loss and gradient norm are spikes only if they are not finite.

    The second moment v is that of the steps before, without a correction for its start at 0, as in the released code.
    So a young v is too small, and the rule the stricter: at a steady gradient and beta2 = .999 an element has to be
    10 times as large as usual at step 20, 22 times at step 100, and 71 times in the end.

    Deviations from the released code: elements with v = 0 are left out, because nobody knows yet what is usual; the
    released code makes them zero, and so weights that have not seen a gradient when it begins to clip stay as they are
    until it resets the moments. The optimizer is yours, so its moments are never reset, its rate has no warm-up after
    resets, and no moment is sparse.

    Args:
        theta: Least square of an element, in second moments.
        warm_up: Number of the guard's first steps at which nothing is a spike. The released code clips from the 20th
            step on.

    Raises:
        ValueError: If an argument is out of its range.

    Source: Huang et al. 2025 (ICLR), *SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training*
    (arXiv 2501.06842), and the code that they released (``galore_torch/SPAM.py``, ``threshold=5000``,
    ``grad_accu_steps=20``).

    Examples:
        >>> optimizer = torch.optim.AdamW([torch.ones(1, requires_grad=True)])
        >>> print(sd.SpikeGuard(optimizer, rule=sd.SPAM(), action="clip"))
        <SpikeGuard of AdamW, action 'clip'; `events` lists the spikes>
    """

    theta: float = 5000.0
    warm_up: int = 19

    def __post_init__(self) -> None:
        arguments.positive("theta", self.theta)
        arguments.whole("warm_up", self.warm_up, 0)


Rule = SpikeRule | SixSigma | ZClip | SPAM
"""What a guard takes for a spike."""

Make = Callable[[int, int, torch.device], Statistics]
"""Makes statistics of some norms and losses on a device."""


def statistics_of(rule: Rule, multiple: float) -> Make:
    """Returns what makes the statistics of a rule.

    Args:
        rule: The rule.
        multiple: What a spike is clipped to, in usual norms, where the rule does not say that itself.
    """
    if isinstance(rule, ZClip):
        return partial(Averages, alpha=rule.alpha, z=rule.z, warm_up=rule.warm_up)
    if isinstance(rule, SixSigma):
        return partial(Moments, window=rule.window, sigmas=rule.sigmas, multiple=multiple)
    if isinstance(rule, SPAM):
        return partial(Usual, rule=SpikeRule(), multiple=math.inf)
    return partial(Robust, rule=rule, multiple=multiple)
