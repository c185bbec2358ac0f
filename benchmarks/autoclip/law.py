"""Clipping by fitted L0 and L1: as a scan or the run itself says, and AutoClip where they say nothing."""

import itertools
import math
from typing import Any

import torch
from measured import Measured
from tasks import Task
from torch.nn.utils import get_total_norm
from training import Loop, data_of

import smoothdiag as sd
from smoothdiag.clipping.trust import power_of
from smoothdiag.fits import SmoothnessFit, Verdict

SCAN_BATCHES, SCAN_GRADIENTS = 1, 500
"""A scan takes the default number of gradients, on the first batch: 1.7 times those of a run of 300 steps."""

EVERY, FIRST_FIT, FIT_EVERY = 3, 60, 30
"""The running fit has a row of three gradients every third step, so it costs as many gradients as the run until there
is a verdict. The first fit has 20 rows, the least that a verdict takes."""

QUANTILE = 0.8
"""Share of the rows below the line of the running fit. The default, .95, takes 80 independent rows."""

_scans: dict[tuple[Task, int], tuple[SmoothnessFit | str, int]] = {}


def scanned(loop: Loop) -> tuple[SmoothnessFit | str, int]:
    """Returns the fit of a scan of the present weights, or why there is none, and the gradients of a batch it took.

    All runs of a task from one seed begin with the same weights and batches, so they share a scan.
    """
    task = loop.workload.task
    if (task, loop.seed) not in _scans:
        batches = itertools.islice(data_of(loop.workload).batches(loop.seed + 1), SCAN_BATCHES)
        trace = sd.scan(loop.model, task.loss_fn, batches, budget=SCAN_GRADIENTS, progress=False)
        _scans[task, loop.seed] = fitted(trace), SCAN_BATCHES * sum(row["num_grads"] for row in trace)
    return _scans[task, loop.seed]


def fitted(trace: sd.Trace, **options: Any) -> SmoothnessFit | str:
    """Returns the fit, or why there is none, such as that no row is usable."""
    try:
        return sd.fit_smoothness(trace, **options)
    except ValueError as error:
        return str(error)


class ByLaw(Measured):
    """AutoClip until a fit says how to clip; from then on what the library advises for its verdict.

    1. ``L0L1``, or ``POWER`` with an exponent of 1 at most: the threshold of ``sd.clip_rule`` at the peak rate.
    2. ``POWER`` with a larger exponent: every gradient is shortened to the rate of ``sd.step_rate`` at its norm.
    3. ``CONSTANT``: no threshold, and a rate of 1 / L0 at most.
    4. Anything else: AutoClip goes on. That includes the loss gap, whose warm-up would overwrite the schedule, and a
       range of gradient norms that is too short, for which ``sd.step_rate`` has a rate inside that range alone.
    """

    said = "NO_FIT: AutoClip"
    follows = False
    shortened = scan_gradients = 0
    threshold = largest_rate = math.inf
    rate: sd.StepRate | sd.LawRate | None = None

    def __init__(self, loop: Loop, **options: Any) -> None:
        super().__init__(loop, mode="set", **options)
        (self.optimizer,) = loop.optimizers
        (self.group,) = self.optimizer.param_groups

    def follow(self, fit: SmoothnessFit | str, step: int) -> None:
        """Clips by the fit from now on, if it says how."""
        if isinstance(fit, str):
            self.said = f"NO_FIT: AutoClip; {fit}"
            return
        try:
            does = self.advised(fit)
        except ValueError as error:
            does = f"AutoClip, because of an error ({error})"
        self.follows = not does.startswith("AutoClip")
        self.said = f"{fit.verdict.name}: {does} from step {step}; {described(fit)}"
        if self.follows:
            self.clip.detach()
            self.group["threshold"] = self.threshold

    def advised(self, fit: SmoothnessFit) -> str:
        """Takes threshold, rate or largest rate from the fit, and returns which of them it was.

        Raises:
            ValueError: If nothing can rest on the constants of the fit, such as an L0 of zero.
        """
        momentum = self.loop.workload.momentum
        if fit.verdict is Verdict.CONSTANT:
            self.largest_rate = float(sd.step_rate(fit)(0.0))
            return f"rate at most {self.largest_rate:.4g}"
        if fit.verdict is Verdict.POWER and power_of(fit).exponent > 1:
            self.rate = sd.step_rate(fit)
            return "rate by the norm"
        if fit.verdict in (Verdict.L0L1, Verdict.POWER):
            rule = sd.clip_rule(fit, lr=self.loop.steady_rate, momentum=momentum, dampening=momentum)
            if rule.source == "fit":
                self.threshold = rule.threshold
                return f"threshold {self.threshold:.4g}"
        return "AutoClip"

    def before(self) -> None:
        self.group["lr"] = lr = min(self.group["lr"], self.largest_rate)
        norm = float(get_total_norm(self.loop.gradients))
        if self.rate is not None and lr > 0 and 0 < norm < math.inf:
            momentum = self.loop.workload.momentum
            scale = float(self.rate.scale(norm, lr, momentum=momentum, dampening=momentum))
            self.shortened += scale < 1
            torch._foreach_mul_(self.loop.gradients, scale)

    def after(self) -> None:
        average = float(get_total_norm([state["momentum_buffer"] for state in self.optimizer.state.values()]))
        self.shortened += average > self.group["threshold"]

    def finish(self) -> None:
        super().finish()
        self.clipped = self.shortened
        self.probe_gradients += self.scan_gradients
        if self.follows:
            self.longest_step = self.loop.steady_rate * self.threshold
        self.reason = self.said if self.follows else f"{self.said}; {self.reason}"


class ByScan(ByLaw):
    """What a scan of the initial weights says, from the first step on."""

    def __init__(self, loop: Loop) -> None:
        super().__init__(loop)
        fit, self.scan_gradients = scanned(loop)
        self.follow(fit, 0)


class ByRun(ByLaw):
    """What the first fit with a verdict says, of the rows that the run has measured so far."""

    def __init__(self, loop: Loop) -> None:
        probing = {"estimators": [sd.LocalSmoothness()], "schedule": self.is_due}
        super().__init__(loop, probing=probing)
        self.taken = 0

    def is_due(self, step: int) -> bool:
        return not self.follows and step % EVERY == 0

    def before(self) -> None:
        if not self.follows and self.taken >= FIRST_FIT and (self.taken - FIRST_FIT) % FIT_EVERY == 0:
            self.follow(fitted(self.probe.trace, estimator="local", quantile=QUANTILE), self.taken)
        self.taken += 1
        super().before()


def described(fit: SmoothnessFit) -> str:
    """Returns constants, exponent and doubts of a fit."""
    low, high = fit.exponent_interval
    flags = ", ".join(flag.name for flag in fit.flags if flag.blocking or flag.fatal) or "no blocking flag"
    return (
        f"L0 {fit.L0:.4g} [{fit.L0_interval[0]:.4g}, {fit.L0_interval[1]:.4g}], "
        f"L1 {fit.L1:.4g} [{fit.L1_interval[0]:.4g}, {fit.L1_interval[1]:.4g}], exponent {low:.2f} to {high:.2f}, "
        f"{fit.num_points} rows, {flags}"
    )
