"""Secants: how much the gradient changes from the start of a step to another point, in numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from smoothdiag import vectors
from smoothdiag.geometry import Diagonal, Euclidean, Geometry, Parts
from smoothdiag.geometry.vector import whitened
from smoothdiag.measure.estimators.base import OWN, Contradicted, Estimate, Status, Step, noise_columns
from smoothdiag.measure.estimators.rays import Ray
from smoothdiag.tally import Tally
from smoothdiag.vectors import Vector

SATURATED_ABOVE = 0.5
"""Saturation above which a row says more about the step than about curvature. Orthogonal gradients of equal length at
both ends give 1/sqrt(2), opposite ones 1."""

SIGNAL_TO_NOISE = 2.0
"""Noise floors up to which a row is marked. Squares of independent errors add up: at two noise floors, noise has raised
the value by 15%."""

KINKS_ABOVE, ROUNDING_ABOVE = math.sqrt(2), 2 * math.sqrt(2)
"""L(h/4)/L(h) is 1 if the gradient is smooth, 2 if it jumps at many small kinks (its change grows like sqrt(h)), and 4
if its change does not depend on h at all. The bounds lie half-way between these on a log scale."""


OFF = 0.05
"""Largest relative error of the smoothness that the training gradient may cause, in place of an evaluated one."""


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
        loss: The loss at the point [f].
        change: The change of the gradient, piece by piece, if it is kept to check the gradient at the start.
        residue: How far the gradient at the start is from the one that this point and an earlier one extrapolate to,
            as a share of the change of the gradient up to the earlier one: the largest of all parts; NaN if there is
            none.
    """

    by_part: Mapping[tuple[str, str], Secant]
    loss: float
    change: Mapping[int, Tensor] = field(default_factory=dict)
    residue: float = math.nan

    @property
    def finite(self) -> bool:
        """Whether the loss was finite at the point."""
        return math.isfinite(self.loss)

    @property
    def whole(self) -> Secant:
        """The secant of all parameters, or of those with a norm, in the estimator's own geometry."""
        return next(iter(self.by_part.values()))


def _off(there: Tensor, start: Tensor, change: Tensor, *weights: Tensor) -> list[Tensor]:
    """Returns the gradient at the start less the one that those at 1/4 and 1 of the way extrapolate to."""
    off = (change - 4 * (vectors.wide(there) - vectors.wide(start))) / 3
    return [off, *(whitened(off, p) for p in weights)]


def check_start(step: Step, fine: Secants | None) -> None:
    """Checks the training gradient that stands in for the gradient at the start, if it does.

    Losses could not tell: they see the part of an error that lies along the line, and nothing of the rest.

    Args:
        step: The step.
        fine: Secants at a quarter of the displacement, with their residue.

    Raises:
        Contradicted: If the measured smoothness could be off by more than `OFF`.
    """
    if step.training is not None and (fine is None or not fine.residue <= OFF):
        raise Contradicted


def secants(ray: Ray, t: float, geometry: Geometry, *, beyond: Secants | None = None) -> Secants | None:
    """Returns the secants to x + t v at the cost of one gradient; ``None`` if the point is the start.

    Args:
        ray: The line.
        t: The point on it.
        geometry: Norm of the displacement; gradients are measured in its dual norm.
        beyond: The secants to x + 4 t v, to check the gradient at the start if it is that of the training loop.
    """
    step = ray.step
    if type(geometry) is not Euclidean:
        return _whole_secants(step, ray.point(t), geometry)
    here, kept = step.at_start, dict[int, Tensor]()

    def take(tally: Tally, k: int, found: list[Tensor]) -> None:
        packing = tally.packing
        there, start = packing.pieces[k].of(found), packing.piece(k, here.gradient)

        def compare(there: Tensor, start: Tensor, *weights: Tensor) -> list[Tensor]:
            there = vectors.wide(there)
            change = there - vectors.wide(start)
            return [change, there, *(whitened(x, p) for p in weights for x in (change, there))]

        names = [name + suffix for suffix in step.suffixes for name in ("change", "there")]
        tally.squares(k, names, compare, there, start, *step.weights(packing, k))
        if step.training is not None and beyond is None:
            kept[k] = vectors.wide(there) - vectors.wide(start)
        elif step.training is not None and beyond is not None:
            weights = step.weights(packing, k)
            tally.squares(k, ["residue" + s for s in step.suffixes], _off, there, start, beyond.change[k], *weights)

    tally = step.objective.sweep(lambda tally, k, targets: ray.go(t, tally, k, targets), take)
    norms_here = step.norms_of_gradient(geometry)
    by_part = {}
    for suffix, group in norms_here:
        way, change, there = (
            math.sqrt(tally.total(name + suffix, step.block(group))) for name in ("way", "change", "there")
        )
        by_part[suffix, group] = Secant(way, change, norms_here[suffix, group], there)
    residue = math.nan
    if step.training is not None and beyond is not None:
        residue = _residue(step, tally, beyond)
    found = Secants(by_part, tally.total("loss"), kept, residue)
    return None if found.whole.displacement == 0 else found


def _residue(step: Step, tally: Tally, beyond: Secants) -> float:
    """Returns ``Secants.residue``: an error that hardly shows among all parameters may be all of a group's change."""
    shares = []
    for (suffix, group), secant in beyond.by_part.items():
        off = math.sqrt(tally.total("residue" + suffix, step.block(group)))
        shares.append(off / secant.change if secant.change else math.inf if off else 0.0)
    return float(np.max(shares))  # NaN if one is


def _whole_secants(step: Step, point: Vector, geometry: Geometry) -> Secants | None:
    """Returns secants in a geometry that has to see whole vectors."""
    parts = {part.name: part for part in geometry.parts} if isinstance(geometry, Parts) else {}
    keys = [(OWN, name) for name in parts] or step.keys

    def norm(vector: Vector, key: tuple[str, str], *, dual: bool) -> float:
        suffix, group = key
        if part := parts.get(group):
            return part.dual_norm(vector) if dual else part.norm(vector)
        chosen, used = [vector[i] for i in step.block(group)], geometry
        if suffix and step.preconditioner is not None:
            used = Diagonal(tuple(step.preconditioner[i] for i in step.block(group)))
        return float(used.dual_norm(chosen) if dual else used.norm(chosen))

    way = vectors.sub(point, step.start)
    lengths = {key: norm(way, key, dual=False) for key in keys}
    del way  # saves one copy of the parameters while the loss is evaluated
    if lengths[keys[0]] == 0:
        return None
    here, there = step.at_start, step.objective.evaluate(point)
    norms_here, change = step.norms_of_gradient(geometry), vectors.sub(there.gradient, here.gradient)
    by_part = {}
    for key in keys:
        ends = (norm(change, key, dual=True), norms_here[key], norm(there.gradient, key, dual=True))
        by_part[key] = Secant(lengths[key], *ends)
    return Secants(by_part, there.loss)


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
    for (suffix, group), grad_norm in step.norms_of_gradient(geometry).items():
        empty = Estimate(name + suffix, math.nan, grad_norm, math.nan, step.at_start.loss, group=group)
        known = [(s.by_part[suffix, group], s.finite) for s in found]
        quarter = None if fine is None else fine.by_part[suffix, group]
        error = gradient_error(step, geometry, (suffix, group))
        estimates.append(_estimate(empty, step, known, quarter, error))
    here = step.at_start
    # The variance is of the Euclidean norm.
    length = estimates[0].grad_norm if type(geometry) is Euclidean else step.norms_of_gradient()["", "all"]
    noise = noise_columns(here.variance, length**2 - here.variance)
    return replace(estimates[0], parts=tuple(estimates[1:]), extra=noise)


def gradient_error(step: Step, geometry: Geometry, key: tuple[str, str]) -> float:
    """Returns the relative error of a gradient in a dual norm, which noise fills more than most gradients do.

    A gradient of few directions has a small nuclear norm beside its Euclidean one, and noise, which has all of them, a
    large one. So the error of the Euclidean norm is multiplied by the ratio of the two norms for a random vector, and
    divided by that ratio for the gradient.

    Args:
        step: The step, with the relative error of the Euclidean norm.
        geometry: The estimator's own geometry.
        key: Suffix of the estimator's name, and group.
    """
    suffix, group = key
    parts = {part.name: part.geometry for part in geometry.parts} if isinstance(geometry, Parts) else {}
    used = parts.get(group, geometry)
    if step.gradient_error == 0 or suffix not in ("", OWN) or isinstance(used, Euclidean | Diagonal):
        return step.gradient_error
    here = [step.at_start.gradient[i] for i in step.block(group)]
    if (kept := ("noise", used, group)) not in step.memory:
        noise = vectors.random_like(here, seed=0)
        step.memory[kept] = float(used.dual_norm(noise)) / float(vectors.norm(noise))
    full, norm = float(vectors.norm(here)), step.norms_of_gradient(geometry)[key]
    return step.gradient_error * max(1.0, step.memory[kept] * full / norm if norm else 1.0)


def _estimate(
    empty: Estimate, step: Step, known: Sequence[tuple[Secant, bool]], quarter: Secant | None, error: float
) -> Estimate:
    moved = [(secant, finite) for secant, finite in known if secant.displacement != 0]
    if not step.starts_finite or not all(finite and math.isfinite(s.smoothness) for s, finite in moved):
        return replace(empty, status=Status.NON_FINITE)
    if not moved:
        return replace(empty, step_norm=0.0, status=Status.ZERO_STEP)
    steepest = max((secant for secant, _ in moved), key=lambda secant: secant.smoothness)
    noise_floor = steepest.noise_floor(error)
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
