"""AutoClip in the loop, and what it is fed with in the controls."""

import itertools
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch.nn.utils import get_total_norm
from training import Arm, Clipper, Loop, data_of, train
from workloads import Batch, Workload

import smoothdiag as sd
from smoothdiag.autoclip import AutoClip, StepRule
from smoothdiag.measure.estimators import Estimate, Estimator, LocalSmoothness, Step

MULTIPLE = {"sgd": 1.5, "adamw": 0.5}
"""Of the measured length: AutoClip's own for SGD; for AdamW, where AutoClip measures nothing by itself, that which did
best in earlier experiments."""

SHARE = {"sgd": 0.03, "adamw": 0.01}
"""Of ||x||, until there are measurements."""


class Measured(Clipper):
    """AutoClip with a probe that measures what AutoClip asks for, and nothing else."""

    def __init__(self, loop: Loop, rule: StepRule | None, estimators: Sequence[Estimator], mode: str = "clip") -> None:
        warnings.simplefilter("ignore", sd.SmoothdiagWarning)
        self.loop = loop
        self.probe = sd.Probe(
            loop.model, loop.optimizer, loop.workload.loss_fn, estimators=estimators, schedule=lambda step: False
        )
        self.clip = AutoClip(loop.optimizer, self.probe, rule=rule, mode=mode)

    def observe(self, batch: Batch) -> None:
        self.probe.observe(batch)

    def finish(self) -> None:
        self.clipped = self.clip.state_dict()["clipped"]
        self.longest_step, self.reason = self.clip.longest_step, self.clip.reason
        rows = {(row["step"], row["estimator"]): row["num_grads"] + 2 * row["num_hvps"] for row in self.probe.trace}
        self.probe_gradients = sum(rows.values())


class Watched(Measured):
    """The same, with the lengths that were measured and what became of the gradients."""

    def __init__(self, loop: Loop) -> None:
        super().__init__(loop, None, (LocalSmoothness(),))
        self.norms: list[tuple[float, float]] = []
        self._norm = 0.0

    def before(self) -> None:
        self._norm = float(get_total_norm(self.loop.gradients))

    def after(self) -> None:
        self.norms.append((self._norm, float(get_total_norm(self.loop.gradients))))

    @property
    def lengths(self) -> list[float]:
        rows = self.probe.trace.to_frame()
        lengths = rows.loc[rows["estimator"] == "local", "grad_norm"] / rows["smoothness"]
        return [float(length) for length in lengths if length > 0]

    @property
    def mean_scale(self) -> float:
        scales = [after / before for before, after in self.norms if before > 0]
        return sum(scales) / len(scales)


def autoclip(rule: Callable[[Workload], StepRule | None] = lambda workload: None, **options: str) -> Callable:
    """Returns what attaches AutoClip with a rule, or with its own."""

    def attach(loop: Loop) -> Measured:
        chosen = rule(loop.workload)
        along_update = loop.workload.kind == "adamw" and chosen is not None and chosen.multiple is not None
        estimator = sd.DirectionalCurvature(direction="update") if along_update else LocalSmoothness()
        return Measured(loop, chosen, (estimator,), **options)

    return attach


def multiple(factor: float) -> Callable[[Workload], StepRule]:
    return lambda workload: StepRule(multiple=factor, relative=SHARE[workload.kind])


def bounded(share: float) -> Callable[[Workload], StepRule]:
    return lambda workload: StepRule(multiple=MULTIPLE[workload.kind], relative=share, bounded=True)


def for_momentum(share: float, *, bounded: bool) -> Callable[[Workload], StepRule]:
    """A rule that knows of momentum.

    Steps of uncorrelated gradients are shorter than those of equal ones by sqrt((1 - momentum) / (1 + momentum)): 4.4
    times at 0.9. Doses that are best differ by half of that on a log scale: 1.5 without momentum and 3 with it.
    """

    def rule(workload: Workload) -> StepRule:
        shorter = ((1 - workload.momentum) / (1 + workload.momentum)) ** 0.5
        return StepRule(multiple=MULTIPLE["sgd"] / shorter**0.5, relative=share, bounded=bounded)

    return rule


def wide(rule: Callable[[Workload], StepRule]) -> Callable[[Loop], Measured]:
    """Returns what attaches AutoClip to secants over a hundredth of ||x||, about as long as the steps they are for."""
    return lambda loop: Measured(loop, rule(loop.workload), (LocalSmoothness(radius=0.01, two_scale=False),))


@dataclass(frozen=True)
class InsteadOfLocal(LocalSmoothness):
    """Rows of another origin under the name that AutoClip reads."""

    measure: Callable[[Step], Estimate] | None = None

    def __call__(self, step: Step) -> Estimate:
        assert self.measure is not None
        return replace(self.measure(step), estimator="local", parts=())


def fed_with(make: Callable[[Loop], Callable[[Step], Estimate]]) -> Callable[[Loop], Measured]:
    """Returns what attaches AutoClip to rows of another origin."""
    return lambda loop: Measured(loop, None, (InsteadOfLocal(measure=make(loop)),))


def path(loop: Loop) -> Callable[[Step], Estimate]:
    """Secants along the steps taken: they depend on what the controller does."""
    return sd.PathSmoothness(two_scale=False)


def other_batch(loop: Loop) -> Callable[[Step], Estimate]:
    """Secants along the steps taken whose ends are on different batches: they are mostly noise."""
    others = data_of(loop.workload).batches(loop.seed + 10_001)

    def measure(step: Step) -> Estimate:
        there = sd.objective(loop.model, loop.workload.loss_fn, [next(others)]).evaluate(step.end).gradient
        estimate = sd.PathSmoothness(two_scale=False)(step)
        change = get_total_norm([a - b for a, b in zip(there, step.at_start.gradient, strict=True)])
        return replace(estimate, smoothness=float(change) / estimate.step_norm)

    return measure


def shuffled(loop: Loop) -> Callable[[Step], Estimate]:
    """The lengths that AutoClip measures in this run, in another order."""
    lengths = _watch(loop.workload, loop.lr, loop.seed, loop.steps).lengths
    random.Random(loop.seed).shuffle(lengths)
    remaining = itertools.cycle(lengths)
    local = LocalSmoothness(two_scale=False)

    def measure(step: Step) -> Estimate:
        estimate = local(step)
        return replace(estimate, smoothness=estimate.grad_norm / next(remaining), status=sd.Status.OK)

    return measure


def clip_percentage(loop: Loop) -> float:
    """Returns how many steps AutoClip clips in this run [%]."""
    watched = _watch(loop.workload, loop.lr, loop.seed, loop.steps)
    return 100 * watched.clipped / max(1, len(watched.norms))


def mean_scale(workload: Workload, lr: float, seed: int, steps: int) -> float:
    """Returns what AutoClip multiplies gradients by in this run, on average."""
    return _watch(workload, lr, seed, steps).mean_scale


def _watch(workload: Workload, lr: float, seed: int, steps: int) -> Watched:
    kept: list[Watched] = []

    def attach(loop: Loop) -> Watched:
        kept.append(Watched(loop))
        return kept[0]

    train(workload, lr, seed, Arm(attach), steps)
    return kept[0]
