"""AutoClip in the loop, and the rows that the controls feed it with."""

import itertools
import math
import random
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from tasks import Batch
from torch.nn.utils import get_total_norm
from training import Arm, Clipper, Loop, data_of, train
from workloads import Workload

import smoothdiag as sd
from smoothdiag.autoclip import AutoClip, StepRule
from smoothdiag.autoclip.rates import raise_rates, suggested
from smoothdiag.autoclip.rows import ALONG_GRADIENT
from smoothdiag.autoclip.warm_ups import WarmUp
from smoothdiag.measure.estimators import Estimate, Step

NOTHING: Mapping[str, Any] = {"schedule": lambda step: False}
"""Options of a probe that measures nothing by itself."""

SELF_TEST = 2
"""Number of gradients of the probe's self-test, which no row counts."""


class Measured(Clipper):
    """AutoClip with a probe that measures only what AutoClip asks for, unless ``probing`` has other options for it."""

    def __init__(self, loop: Loop, *, probing: Mapping[str, Any] = NOTHING, **options: Any) -> None:
        warnings.simplefilter("ignore", sd.SmoothdiagWarning)
        self.loop = loop
        loss_fn = loop.workload.task.loss_fn
        self.probe = sd.Probe(loop.model, loop.optimizers, loss_fn, **probing)
        self.clip = AutoClip(loop.optimizers, self.probe, **options)

    def observe(self, batch: Batch) -> None:
        self.probe.observe(batch)

    def finish(self) -> None:
        self.clipped = self.clip.state_dict()["clipped"]
        self.longest_step, self.reason = self.clip.longest_step, self.clip.reason.split("\n")[-1]
        rows = {(row["step"], row["estimator"]): row["num_grads"] + 2 * row["num_hvps"] for row in self.probe.trace}
        self.probe_gradients = sum(rows.values()) + (SELF_TEST if rows else 0)


class Watched(Measured):
    """AutoClip that also records the measured lengths and what happened to the gradients."""

    def __init__(self, loop: Loop) -> None:
        super().__init__(loop)
        self.norms: list[tuple[float, float]] = []
        self._norm = 0.0

    def before(self) -> None:
        self._norm = float(get_total_norm(self.loop.gradients))

    def after(self) -> None:
        self.norms.append((self._norm, float(get_total_norm(self.loop.gradients))))

    @property
    def lengths(self) -> list[float]:
        rows = self.probe.trace.to_frame()
        lengths = rows["grad_norm"] / rows["smoothness"]
        return [float(length) for length in lengths if length > 0]

    @property
    def mean_scale(self) -> float:
        scales = [after / before for before, after in self.norms if before > 0]
        return sum(scales) / len(scales)


def autoclip(rule: Callable[[Workload], StepRule | None] = lambda workload: None, **options: Any) -> Callable:
    """Returns a function that attaches AutoClip, with a given rule or its own."""
    return lambda loop: Measured(loop, rule=rule(loop.workload), **options)


def scaled(factor: float) -> Callable[[Workload], StepRule]:
    """AutoClip's own rule with another longest step."""

    def rule(workload: Workload) -> StepRule:
        own = StepRule.for_momentum(workload.momentum if workload.kind == "sgd" else 0.0)
        return replace(own, multiple=factor * own.multiple)

    return rule


def without_noise(workload: Workload) -> StepRule:
    """AutoClip's own rule as it would be if the noise of batches did not count."""
    return replace(scaled(1.0)(workload), noise=0.0)


def without_schedule(loop: Loop) -> Measured:
    """AutoClip as it would be if it did not know which peak a schedule has planned."""
    found = Measured(loop)
    peaks = found.clip._peaks
    peaks.warm_ups = [WarmUp(believed=False) for _ in peaks.warm_ups]
    return found


def without_rise(loop: Loop) -> Measured:
    """AutoClip as it would be if a longest step that is held could only fall."""
    found = Measured(loop)
    found.clip._calibration.raise_by = math.inf
    return found


def as_judged(loop: Loop) -> Measured:
    """AutoClip as the final part judged it: shortened updates never rise, and nothing is confirmed sooner."""
    found = Measured(loop)
    found.clip._calibration.confirms = False
    if loop.workload.kind != "sgd":
        found.clip._calibration.raise_by = math.inf
    return found


def raised(share: Callable[[int], float]) -> Callable[[Loop], Measured]:
    """Returns a function that attaches AutoClip with ``set_lr``, but a share of its own rate, given the step."""

    def attach(loop: Loop) -> Measured:
        found = Measured(loop, set_lr=True)
        clip, optimizer = found.clip, found.probe.optimizer

        def set_lr() -> None:
            rule = clip._calibration
            lr = suggested(rule, optimizer, rule.factor, clip._action.reach, cautious=True)
            if raise_rates(optimizer, share(clip._books.steps) * lr, clip._action.reach, most=math.inf):
                clip._peaks.update()

        clip._stepping._set_lr = set_lr
        return found

    return attach


def bounded(workload: Workload) -> StepRule:
    return replace(StepRule.for_momentum(workload.momentum), relative=0.1, bounded=True)


def fed_with(make: Callable[[Loop], Callable[[Step], Estimate]]) -> Callable[[Loop], Measured]:
    """Returns a function that attaches AutoClip to rows of another origin."""
    return lambda loop: Measured(loop, estimator=make(loop))


def path(loop: Loop) -> Callable[[Step], Estimate]:
    """Secants along the steps taken, which depend on what the controller does."""
    return sd.PathSmoothness(two_scale=False)


def other_batch(loop: Loop) -> Callable[[Step], Estimate]:
    """Secants along the steps taken with another batch at each end, which are mostly noise."""
    others = data_of(loop.workload).batches(loop.seed + 10_001)

    def measure(step: Step) -> Estimate:
        there = sd.objective(loop.model, loop.workload.task.loss_fn, [next(others)]).evaluate(step.end).gradient
        estimate = sd.PathSmoothness(two_scale=False)(step)
        change = get_total_norm([a - b for a, b in zip(there, step.at_start.gradient, strict=True)])
        return replace(estimate, smoothness=float(change) / estimate.step_norm)

    return measure


def shuffled(loop: Loop) -> Callable[[Step], Estimate]:
    """The lengths that AutoClip measures in this run, in another order."""
    lengths = _watch(loop.workload, loop.lr, loop.seed, loop.steps).lengths
    random.Random(loop.seed).shuffle(lengths)
    remaining = itertools.cycle(lengths)
    local = ALONG_GRADIENT

    def measure(step: Step) -> Estimate:
        estimate = local(step)
        return replace(estimate, smoothness=estimate.grad_norm / next(remaining), status=sd.Status.OK)

    return measure


def clip_percentage(loop: Loop) -> float:
    """Returns how many steps AutoClip clips in this run [%]."""
    watched = _watch(loop.workload, loop.lr, loop.seed, loop.steps)
    return 100 * watched.clipped / max(1, len(watched.norms))


def mean_scale(workload: Workload, lr: float, seed: int, steps: int) -> float:
    """Returns the average factor by which AutoClip multiplies gradients in this run."""
    return _watch(workload, lr, seed, steps).mean_scale


def _watch(workload: Workload, lr: float, seed: int, steps: int) -> Watched:
    kept: list[Watched] = []

    def attach(loop: Loop) -> Watched:
        kept.append(Watched(loop))
        return kept[0]

    train(workload, lr, seed, Arm(attach), steps)
    return kept[0]
