"""LocalSmoothness: how fast the gradient changes over a radius that does not depend on the step taken."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from smoothdiag import arguments, vectors
from smoothdiag.geometry import Euclidean, Geometry
from smoothdiag.measure.estimators.base import Estimate, Step
from smoothdiag.measure.estimators.rays import (
    Ray,
    along_gradient,
    along_minimiser,
    along_update,
    check_norm,
    geometry_of,
)
from smoothdiag.measure.estimators.secants import (
    SATURATED_ABOVE,
    Secants,
    check_start,
    conclude,
    gradient_error,
    secants,
)
from smoothdiag.packing import dtypes_of

Direction = Literal["gradient", "update", "random", "steepest"]

RADIUS = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Radius relative to ||x|| that is tried first. Truncation error grows with the radius, rounding error falls with it.
In float32, secants of small LSTMs agree for radii from 1e-4 to 1e-2; in float64, 1e-6 puts both errors near 1e-8."""

COARSE_RADIUS = 3e-2
"""For narrower dtypes, whose neighbouring numbers are 0.4% (bfloat16) apart."""

LARGEST_CHANGE = 0.2
"""Relative change of the gradient above which a chosen radius is too long to be local: the secant then differs from
the curvature at the point by about that much."""

SMALLEST_SIGNAL = 10.0
"""Least ratio of a secant at a chosen radius to its noise floor; at 10 the noise adds 0.5%."""

MAX_CORRECTIONS = 4
"""Enough to shorten a radius by a factor of 65,000, at one gradient each; usually one is needed."""


@dataclass(frozen=True)
class LocalSmoothness:
    """Secant slope of the gradient over a short displacement from x_k in a chosen direction.

    Neither radius nor direction depends on the length of the step, so the value may steer a clipper. Rows are named
    "local", or "local_update", "local_random" and "local_steepest" for the other directions. Along the gradient and for
    a small radius, the value is ||H g|| / ||g||.

    Args:
        radius: Length of the displacement relative to ||x||, positive. ``None`` chooses it: it begins with 1e-3 in
            float32 and 1e-6 in float64, and corrects that if the gradient changes by more than a fifth, or by hardly
            more than its noise. ``step_norm`` holds the length that was used.
        direction: ``"gradient"`` (downhill), ``"update"`` (x_{k+1} - x_k), ``"random"`` (isotropic, drawn from a
            private generator that depends only on ``seed`` and the step's index) or ``"steepest"`` (the direction v of
            steepest descent in the geometry, the minimiser of <g, v> over ||v|| <= 1).
        geometry: Norm of the displacement; gradients are measured in its dual norm. ``"optimizer"`` takes the norm in
            which the optimizer steps, as in `PathSmoothness`. With ``direction="steepest"`` that is the way in which
            the optimizer would go without momentum, and rows are named "local_steepest_own".
        seed: Seed of the random directions.
        two_scale: Whether to measure at a quarter of the radius too, to tell curvature from kinks and rounding.

    Raises:
        ValueError: If ``radius`` is not a positive number or ``direction`` is unknown; at the first step, if the
            geometry is ``"optimizer"`` and the optimizer has no known norm of its own.

    Units: smoothness [f/x^2].
    Source: the first-order definition in Zhang, Jin, Fang, Wang 2020 (NeurIPS), at one pair of points.

    Examples:
        On x^4 the curvature at x = 1 is 12, however long the step was:

        >>> model = sd.problems.power(4.0).as_module(torch.ones(1, dtype=torch.float64))
        >>> loss = sd.objective(model, lambda model, batch: model(), [None])
        >>> found = sd.LocalSmoothness()(sd.Step(0, loss, start=loss.point(), end=[2 * loss.point()[0]], lr=0.1))
        >>> print(round(found.smoothness, 3), found.estimator, found.status.name)
        12.0 local OK
    """

    radius: float | None = None
    direction: Direction = "gradient"
    geometry: Geometry | Literal["optimizer"] = Euclidean()
    seed: int = 0
    two_scale: bool = True

    @property
    def checks_start(self) -> bool:
        """Whether the estimate checks the gradient at the start, so that it may be that of the training loop."""
        return self.two_scale and type(self.geometry) is Euclidean

    def __post_init__(self) -> None:
        if self.radius is not None:
            arguments.number("radius", self.radius, "positive and finite, or None", lambda v: 0 < v < math.inf)
        arguments.choice("direction", self.direction, get_args(Direction))
        check_norm(self.geometry)
        arguments.whole("seed", self.seed, 0)
        arguments.flag("two_scale", self.two_scale)

    def __call__(self, step: Step) -> Estimate:
        """Returns the estimate; besides the start it costs two gradients, and one per correction of the radius."""
        geometry = geometry_of(self.geometry, step)
        if not step.starts_finite:
            return conclude(self._name, step, [], geometry)
        ray = self._ray(step, geometry)
        is_plain = type(geometry) is Euclidean
        if self.direction in ("gradient", "steepest") and is_plain:
            length = step.norms_of_gradient()["", "all"]
        else:
            length = float(geometry.norm(ray.made()))
        scale = step.norm_of_start() if is_plain else float(geometry.norm(step.start))
        if length == 0 or scale == 0:
            return conclude(self._name, step, [], geometry)

        def at(radius: float) -> Secants | None:
            return secants(ray, radius / length, geometry)

        # The coarsest dtype has the largest rounding, so it decides.
        largest = max(RADIUS.get(dtype, COARSE_RADIUS) for dtype in dtypes_of(step.start))
        radius = scale * (largest if self.radius is None else self.radius)
        found, error = at(radius), gradient_error(step, geometry, next(iter(step.norms_of_gradient(geometry))))
        for _ in range(MAX_CORRECTIONS if self.radius is None else 0):
            better = None if found is None else _corrected(radius, found, error)
            if better is None:
                break
            radius, found = better, at(better)
        if found is None:
            return conclude(self._name, step, [], geometry)
        fine = secants(ray, radius / 4 / length, geometry, beyond=found) if self.two_scale else None
        if self.checks_start:  # otherwise whoever asked for a step with a training gradient does
            check_start(step, fine)
        return conclude(self._name, step, [found], geometry, fine)

    @property
    def _name(self) -> str:
        return "local" if self.direction == "gradient" else f"local_{self.direction}"

    def _ray(self, step: Step, geometry: Geometry) -> Ray:
        if self.direction == "steepest" and type(geometry) is not Euclidean:
            return along_minimiser(step, geometry)
        if self.direction == "update":
            return along_update(step)
        if self.direction in ("gradient", "steepest"):
            return along_gradient(step)
        drawn = vectors.random_like(step.start, seed=self.seed * 1_000_003 + step.index)
        return Ray(step, drawn, lambda v, x, out: out.copy_(v))


def _corrected(radius: float, found: Secants, gradient_error: float) -> float | None:
    """Returns a better radius if the gradient changed by too much or too little."""
    whole = found.whole
    if not (found.finite and math.isfinite(whole.change)):
        return radius / 100
    change = whole.change / max(whole.norm_here, whole.norm_there) if whole.change else 0.0
    least = SMALLEST_SIGNAL * math.sqrt(2) * gradient_error
    if change > LARGEST_CHANGE:
        # A gradient that has changed completely shows that the radius is too long, but not by how much.
        return radius / 16 if whole.saturation > SATURATED_ABOVE else radius * LARGEST_CHANGE / (2 * change)
    if 0 < change < least < LARGEST_CHANGE:
        return radius * min(2 * least / change, 100.0)
    return None
