"""What an estimator receives and returns: Step, Estimate, Status; and the secants that most estimators use."""

import math
from collections.abc import Hashable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from smoothdiag import vectors
from smoothdiag.adapters import UNKNOWN, StabilityLimit
from smoothdiag.geometry import Diagonal, Geometry
from smoothdiag.measure.loss.objective import Evaluation, Objective
from smoothdiag.rows import Status
from smoothdiag.vectors import Vector

__all__ = ["Estimate", "Estimator", "Secants", "Status", "Step", "conclude", "secants"]

SATURATED_ABOVE = 0.5
"""Saturation above which a row says more about the step than about curvature. Orthogonal gradients of equal length at
both ends give 1/sqrt(2), opposite ones 1."""

SIGNAL_TO_NOISE = 2.0
"""Noise floors up to which a row is marked. Squares of independent errors add up: at two noise floors, noise has raised
the value by 15%."""

KINKS_ABOVE, ROUNDING_ABOVE = math.sqrt(2), 2 * math.sqrt(2)
"""L(h/4)/L(h) is 1 if the gradient is smooth, 2 if it jumps at many small kinks (its change grows like sqrt(h)), and 4
if its change does not depend on h at all. The bounds lie half-way between these on a log scale."""

PRECONDITIONED = "_preconditioned"
"""Suffix of the estimator's name in rows that are measured in the optimizer's own norm."""


@dataclass(frozen=True)
class Step:
    """One optimizer step, frozen: where it started, where it ended, and the loss to measure it with.

    Attributes:
        index: Number of optimizer steps before this one.
        objective: The loss on the data of this step, or on fixed or held-out data.
        start: Parameters x_k before the step.
        end: Parameters x_{k+1} after the step.
        lr: Learning rate of the step [x^2/f]; NaN if parameter groups have different rates.
        gradient_error: Relative error of one gradient evaluation, ||g - g'|| / ||g||.
        groups: For each group with an estimate of its own, the indices of its parameters.
        preconditioner: Diagonal of the matrix P that the optimizer divides by; ``None`` if it has none.
        known_start: Loss and gradient at ``start``, if they are known already.
        memory: What estimators keep from one measured step for the next, each under its own keys.
        stability_limit: Curvature [f/x^2] above which the optimizer diverges on a quadratic at its present learning
            rate, and the norm in which that curvature is measured.
        full_precision: Whether ``known_start`` was evaluated without autocast, as products with the Hessian are. These
            may then use its gradient.
        norms_at_start: Norms of the gradient at ``start`` that estimators have computed already.

    Examples:
        >>> model = sd.problems.quadratic([3.0]).as_module(torch.zeros(1))
        >>> loss = sd.objective(model, lambda model, batch: model(), [None])
        >>> step = sd.Step(0, loss, start=[torch.tensor([2.0])], end=[torch.tensor([1.0])], lr=1 / 6)
        >>> print(step.at_start.loss, step.at_start.gradient[0].item())
        6.0 6.0
    """

    index: int
    objective: Objective = field(repr=False)
    start: Vector = field(repr=False)
    end: Vector = field(repr=False)
    lr: float
    gradient_error: float = 0.0
    groups: Mapping[str, Sequence[int]] = field(default_factory=dict, repr=False)
    preconditioner: Vector | None = field(default=None, repr=False)
    known_start: Evaluation | None = None
    memory: MutableMapping[Hashable, Any] = field(default_factory=dict, repr=False)
    stability_limit: StabilityLimit = UNKNOWN
    full_precision: bool = False
    norms_at_start: dict[Geometry, dict[tuple[str, str], float]] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def at_start(self) -> Evaluation:
        """Loss and gradient at ``start``, evaluated at most once for all estimators."""
        return self.known_start or self.objective.evaluate(self.start)

    @cached_property
    def starts_finite(self) -> bool:
        """Whether loss and gradient at ``start`` are finite; otherwise there is nothing to measure."""
        return math.isfinite(self.at_start.loss) and math.isfinite(float(vectors.norm(self.at_start.gradient)))


@dataclass(frozen=True)
class Estimate:
    """One measurement of local smoothness.

    Attributes:
        estimator: Name of the estimator, as in the column ``estimator`` of a trace.
        smoothness: Local smoothness [f/x^2].
        grad_norm: Dual norm of the gradient at the start of the step [f/x].
        step_norm: Length of the displacement between the two points [x], as really made after rounding.
        loss: Loss at the start of the step [f].
        saturation: smoothness x displacement / (sum of the two gradient norms), in [0, 1].
        noise_floor: Smoothness [f/x^2] that rounding and irreproducible gradients would show without any curvature.
        two_scale: Smoothness over a quarter of the displacement, divided by smoothness over the whole displacement.
        status: How far to trust the estimate.
        group: Parameter group that was measured; "all" for all parameters.
        parts: Estimates for parameter groups and in the optimizer's norm, from the same gradients.
        extra: Further columns of the row.

    Examples:
        Smoothness times step length is the change of the gradient along the step:

        >>> found = sd.Estimate("path", smoothness=3.0, grad_norm=6.0, step_norm=0.5, loss=6.0)
        >>> print(found.smoothness * found.step_norm, found.group, found.status.name)
        1.5 all OK
    """

    estimator: str
    smoothness: float
    grad_norm: float
    step_norm: float
    loss: float
    saturation: float = math.nan
    noise_floor: float = math.nan
    two_scale: float = math.nan
    status: Status = Status.OK
    group: str = "all"
    parts: tuple["Estimate", ...] = ()
    extra: Mapping[str, float | str] = field(default_factory=dict)


class Estimator(Protocol):
    """Measures local smoothness at a step.

    An estimator whose value is about the batch that the step was taken on has an attribute ``of_step`` that is True:
    a probe never measures it on fixed batches.

    Examples:
        An estimator of your own is a function, passed as ``sd.Probe(..., estimators=[loss_of_step])``:

        >>> nan = float("nan")
        >>> def loss_of_step(step: sd.Step) -> sd.Estimate: return sd.Estimate("own", nan, nan, nan, step.at_start.loss)
        >>> loss = sd.objective(nn.Linear(1, 1), lambda model, x: model(x).square(), [torch.zeros(1)])
        >>> start, end = [torch.zeros(1, 1), torch.full((1,), 3.0)], [torch.zeros(1, 1), torch.zeros(1)]
        >>> loss_of_step(sd.Step(0, loss, start, end, lr=0.5)).loss
        9.0
    """

    def __call__(self, step: Step) -> Estimate:
        """Returns one measurement; a numerical problem is a status, not an exception."""
        ...


@dataclass(frozen=True)
class Secant:
    """The change of the gradient from x to y, in numbers.

    Attributes:
        displacement: ||y - x|| [x], after rounding of y to the parameters' dtype.
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
        """The slope ||g(y) - g(x)||_* / ||y - x|| [f/x^2]; NaN if y = x."""
        return self.change / self.displacement if self.displacement else math.nan

    @property
    def saturation(self) -> float:
        """||g(y) - g(x)||_* / (||g(x)||_* + ||g(y)||_*), in [0, 1]; 0 if both gradients vanish."""
        total = self.norm_here + self.norm_there
        return self.change / total if total else 0.0

    def noise_floor(self, gradient_error: float) -> float:
        """The slope [f/x^2] that independent errors of the two gradients would show without any curvature."""
        return math.sqrt(2) * gradient_error * max(self.norm_here, self.norm_there) / self.displacement


@dataclass(frozen=True)
class Secants:
    """The secants from the start of a step to one point: for all parameters, for each group, and in each norm.

    Attributes:
        by_part: Secant by (suffix of the estimator's name, group).
        finite: Whether the loss was finite at the point.
    """

    by_part: Mapping[tuple[str, str], Secant]
    finite: bool

    @property
    def whole(self) -> Secant:
        """The secant of all parameters in the estimator's own geometry."""
        return self.by_part["", "all"]


def secants(step: Step, point: Vector, geometry: Geometry) -> Secants | None:
    """Returns the secants to ``point`` at the cost of one gradient; ``None``, at no cost, if it is the start."""
    parts = _parts(step, geometry)
    displacement = vectors.sub(point, step.start)
    lengths = {key: float(norm.norm(_take(displacement, block))) for key, (norm, block) in parts.items()}
    del displacement  # saves one copy of the parameters while the loss is evaluated
    if lengths["", "all"] == 0:
        return None
    here, there = step.at_start, step.objective.evaluate(point)
    norms_here, change = _norms_at_start(step, geometry), vectors.sub(there.gradient, here.gradient)
    by_part = {}
    for key, (norm, block) in parts.items():
        by_part[key] = Secant(
            displacement=lengths[key],
            change=float(norm.dual_norm(_take(change, block))),
            norm_here=norms_here[key],
            norm_there=float(norm.dual_norm(_take(there.gradient, block))),
        )
    return Secants(by_part, math.isfinite(there.loss))


def conclude(
    name: str, step: Step, found: Sequence[Secants], geometry: Geometry, fine: Secants | None = None
) -> Estimate:
    """Returns the estimate from the steepest of the secants, for all parameters and for every part.

    Args:
        name: Name of the estimator.
        step: The step.
        found: Secants to different points; empty if all points were the start, or if the start is not finite.
        geometry: The estimator's own geometry.
        fine: Secants at a quarter of the displacement of the last of ``found``.
    """
    estimates = []
    for (suffix, group), grad_norm in _norms_at_start(step, geometry).items():
        empty = Estimate(name + suffix, math.nan, grad_norm, math.nan, step.at_start.loss, group=group)
        known = [(s.by_part[suffix, group], s.finite) for s in found]
        quarter = None if fine is None else fine.by_part[suffix, group]
        estimates.append(_estimate(empty, step, known, quarter))
    here = step.at_start
    noise = noise_columns(here.variance, estimates[0].grad_norm ** 2 - here.variance)
    return replace(estimates[0], parts=tuple(estimates[1:]), extra=noise)


def noise_columns(variance: float, squared_norm: float) -> dict[str, float]:
    """Returns the columns of gradient noise, from the variance of the gradient and an unbiased estimate of ||g||^2.

    ``grad_variance`` is the trace of the covariance of the gradient [f^2/x^2]. ``noise_scale`` is its ratio to the
    squared norm of the full gradient: with that many batches like this one, noise and gradient would be equally large.

    Source: McCandlish, Kaplan, Amodei 2018, the simple noise scale, which they count in examples.
    """
    if not math.isfinite(variance):
        return {}
    return {"grad_variance": variance, "noise_scale": variance / squared_norm if squared_norm > 0 else math.inf}


def _estimate(empty: Estimate, step: Step, known: Sequence[tuple[Secant, bool]], quarter: Secant | None) -> Estimate:
    moved = [(secant, finite) for secant, finite in known if secant.displacement != 0]
    if not step.starts_finite or not all(finite and math.isfinite(s.smoothness) for s, finite in moved):
        return replace(empty, status=Status.NON_FINITE)
    if not moved:
        return replace(empty, step_norm=0.0, status=Status.ZERO_STEP)
    steepest = max((secant for secant, _ in moved), key=lambda secant: secant.smoothness)
    noise_floor = steepest.noise_floor(step.gradient_error)
    two_scale = math.nan
    if quarter is not None and moved[-1][0].change > 0:
        two_scale = quarter.smoothness / moved[-1][0].smoothness
    if noise_floor > 0 and steepest.smoothness <= SIGNAL_TO_NOISE * noise_floor:
        status = Status.BELOW_NOISE_FLOOR
    elif steepest.saturation > SATURATED_ABOVE:
        status = Status.SATURATED
    elif two_scale > ROUNDING_ABOVE:
        status = Status.ROUNDING_LIMITED
    elif two_scale > KINKS_ABOVE:
        status = Status.KINK_LIMITED
    else:
        status = Status.OK
    return replace(
        empty,
        smoothness=steepest.smoothness,
        step_norm=steepest.displacement,
        saturation=steepest.saturation,
        noise_floor=noise_floor,
        two_scale=two_scale,
        status=status,
    )


def _norms_at_start(step: Step, geometry: Geometry) -> dict[tuple[str, str], float]:
    """Returns the norm of every part of the gradient at the start; computed once for each geometry."""
    if geometry not in step.norms_at_start:
        step.norms_at_start[geometry] = {
            key: float(norm.dual_norm(_take(step.at_start.gradient, block)))
            for key, (norm, block) in _parts(step, geometry).items()
        }
    return step.norms_at_start[geometry]


def _parts(step: Step, geometry: Geometry) -> dict[tuple[str, str], tuple[Geometry, Sequence[int]]]:
    """Returns norm and parameter indices by (suffix of the estimator's name, group), all parameters first."""
    blocks = {"all": range(len(step.start)), **step.groups}
    parts: dict[tuple[str, str], tuple[Geometry, Sequence[int]]] = {
        ("", group): (geometry, block) for group, block in blocks.items()
    }
    if step.preconditioner is not None:
        for group, block in blocks.items():
            parts[PRECONDITIONED, group] = Diagonal(tuple(_take(step.preconditioner, block))), block
    return parts


def _take(vector: Vector, block: Iterable[int]) -> list[Tensor]:
    return [vector[i] for i in block]
