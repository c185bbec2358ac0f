"""What an estimator gets and gives: Step, Estimate, Status."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

from torch import Tensor

from smoothdiag import vectors
from smoothdiag.geometry import Geometry
from smoothdiag.measure.objective import Evaluation, Objective
from smoothdiag.trace import Status
from smoothdiag.vectors import Vector

__all__ = ["Estimate", "Estimator", "Secant", "Status", "Step", "largest_secant"]

SATURATED_ABOVE = 0.5
"""Saturation above which a row says more about the step than about curvature: with orthogonal gradients of
equal length at both ends it is 1/sqrt(2), with opposite ones 1."""

SIGNAL_TO_NOISE = 2.0
"""Rows up to this many noise floors are marked. Independent errors add in squares: at twice the floor noise has
raised the value by 15%."""


@dataclass(frozen=True)
class Step:
    """One optimizer step, frozen: where it started, where it ended, and the loss it was taken on.

    Attributes:
        index: Optimizer steps taken before this one.
        objective: The loss on the data of this step, or on held-out data.
        start: Parameters x_k before the step.
        end: Parameters x_{k+1} after it.
        lr: Learning rate of the step [x^2/f]; NaN where parameter groups differ.
        gradient_error: Relative error of one gradient evaluation, ||g - g'|| / ||g||.
        groups: Indices of the parameters of each group that gets an estimate of its own.
    """

    index: int
    objective: Objective
    start: Vector
    end: Vector
    lr: float
    gradient_error: float = 0.0
    groups: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @cached_property
    def at_start(self) -> Evaluation:
        """Loss and gradient at ``start``, evaluated once and shared by all estimators."""
        return self.objective.evaluate(self.start)


@dataclass(frozen=True)
class Estimate:
    """One measurement of local smoothness.

    Attributes:
        estimator: Name of the estimator, as in the column ``estimator`` of a trace.
        smoothness: Local smoothness [f/x^2].
        grad_norm: Dual norm of the gradient at the start of the step [f/x].
        step_norm: Length of the displacement that was really made [x].
        loss: Loss at the start of the step [f].
        saturation: smoothness x displacement / (sum of the two gradient norms), in [0, 1].
        noise_floor: Smoothness that rounding and irreproducible gradients alone would show [f/x^2].
        status: How far to trust it.
        groups: The same quantities on the blocks of each parameter group, where groups were asked for.
    """

    estimator: str
    smoothness: float
    grad_norm: float
    step_norm: float
    loss: float
    saturation: float = math.nan
    noise_floor: float = math.nan
    status: Status = Status.OK
    groups: Mapping[str, "Estimate"] = field(default_factory=dict)


class Estimator(Protocol):
    """Measures local smoothness at a step."""

    def __call__(self, step: Step) -> Estimate:
        """Returns one measurement; numerical trouble is a status, not an exception."""
        ...


@dataclass(frozen=True)
class Secant:
    """The change of the gradient from x to y, in numbers.

    Attributes:
        displacement: ||y - x|| [x], as really made, after rounding to the parameters' dtype.
        change: ||g(y) - g(x)||_* [f/x].
        norm_here: ||g(x)||_* [f/x].
        norm_there: ||g(y)||_* [f/x].
    """

    displacement: float
    change: float
    norm_here: float
    norm_there: float

    @property
    def smoothness(self) -> float:
        """The slope ||g(y) - g(x)||_* / ||y - x|| [f/x^2]."""
        return self.change / self.displacement

    @property
    def saturation(self) -> float:
        """||g(y) - g(x)||_* / (||g(x)||_* + ||g(y)||_*), in [0, 1]; 0 where both gradients vanish."""
        total = self.norm_here + self.norm_there
        return self.change / total if total else 0.0

    def noise_floor(self, gradient_error: float) -> float:
        """The slope [f/x^2] that two gradients with independent relative errors would show without curvature."""
        return math.sqrt(2) * gradient_error * max(self.norm_here, self.norm_there) / self.displacement


def largest_secant(name: str, step: Step, points: Iterable[Vector], geometry: Geometry) -> Estimate:
    """Returns the estimate that the steepest secant from the start of ``step`` to one of ``points`` gives.

    Costs one gradient for each point that differs from the start, whatever the number of groups. ``points``
    may be lazy: it is not asked for a point when the gradient at the start is not finite.
    """
    everything = range(len(step.start))
    blocks = {"all": everything, **step.groups}
    secants: dict[str, list[Secant]] = {label: [] for label in blocks}
    here = step.at_start
    finite = math.isfinite(here.loss) and math.isfinite(float(vectors.norm(here.gradient)))
    for point in points if finite else ():
        displacement = vectors.sub(point, step.start)
        if not vectors.norm(displacement) > 0:
            continue
        there = step.objective.evaluate(point)
        change = vectors.sub(there.gradient, here.gradient)
        finite = finite and math.isfinite(there.loss)
        for label, block in blocks.items():
            secants[label].append(
                Secant(
                    displacement=float(geometry.norm(_take(displacement, block))),
                    change=float(geometry.dual_norm(_take(change, block))),
                    norm_here=float(geometry.dual_norm(_take(here.gradient, block))),
                    norm_there=float(geometry.dual_norm(_take(there.gradient, block))),
                )
            )
    estimates = {
        label: _steepest(name, step, float(geometry.dual_norm(_take(here.gradient, block))), secants[label], finite)
        for label, block in blocks.items()
    }
    return replace(estimates.pop("all"), groups=estimates)


def _steepest(name: str, step: Step, grad_norm: float, secants: Sequence[Secant], finite: bool) -> Estimate:
    moved = [secant for secant in secants if secant.displacement != 0]
    estimate = Estimate(name, math.nan, grad_norm, math.nan, step.at_start.loss)
    if not finite or not all(math.isfinite(secant.smoothness) for secant in moved):
        return replace(estimate, status=Status.NON_FINITE)
    if not moved:
        return replace(estimate, step_norm=0.0, status=Status.ZERO_STEP)
    steepest = max(moved, key=lambda secant: secant.smoothness)
    noise_floor = steepest.noise_floor(step.gradient_error)
    if noise_floor > 0 and steepest.smoothness <= SIGNAL_TO_NOISE * noise_floor:
        status = Status.BELOW_NOISE_FLOOR
    elif steepest.saturation > SATURATED_ABOVE:
        status = Status.SATURATED
    else:
        status = Status.OK
    return replace(
        estimate,
        smoothness=steepest.smoothness,
        step_norm=steepest.displacement,
        saturation=steepest.saturation,
        noise_floor=noise_floor,
        status=status,
    )


def _take(vector: Vector, block: Iterable[int]) -> list[Tensor]:
    return [vector[i] for i in block]
