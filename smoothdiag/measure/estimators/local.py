"""LocalSmoothness: how fast the gradient changes over a radius that does not depend on the step taken."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from smoothdiag import vectors
from smoothdiag.geometry import Euclidean, Geometry
from smoothdiag.measure.estimators.base import Estimate, Step, largest_secant
from smoothdiag.vectors import Vector

Direction = Literal["gradient", "update", "random"]

RADIUS = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Radius relative to ||x||. Truncation grows with the radius and rounding falls with it. In float32 secants of
small LSTMs agree between 1e-4 and 1e-2; in float64 1e-6 puts both errors near 1e-8."""

COARSE_RADIUS = 3e-2
"""For narrower dtypes, whose parameters are 0.4% (bfloat16) apart from each other."""


@dataclass(frozen=True)
class LocalSmoothness:
    """Secant slope of the gradient over a short displacement from x_k in a chosen direction.

    Because neither radius nor direction depends on the length of the step, the value may feed a clipper.
    Along the gradient it is, for a small radius, the length of H g / ||g||.

    Args:
        radius: Length of the displacement relative to ||x||, positive; ``None`` chooses it for the dtype of
            the parameters (1e-3 in float32, 1e-6 in float64).
        direction: ``"gradient"`` (downhill), ``"update"`` (x_{k+1} - x_k) or ``"random"`` (isotropic, drawn
            from a private generator that depends on ``seed`` and the step's index alone).
        geometry: Norm of the displacement; the gradients are measured in its dual norm.
        seed: Seed of the random directions.

    Raises:
        ValueError: If ``radius`` is not a positive number or ``direction`` is unknown.

    Units: smoothness [f/x^2].
    Source: the first-order definition in Zhang, Jin, Fang, Wang 2020 (NeurIPS), at one pair of points.
    """

    radius: float | None = None
    direction: Direction = "gradient"
    geometry: Geometry = Euclidean()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.radius is not None and not (0 < self.radius < math.inf):
            raise ValueError(
                f"Parameter `radius` should be positive and finite, or None. Found `radius = {self.radius!r}`."
            )
        if self.direction not in get_args(Direction):
            raise ValueError(
                f"Parameter `direction` should be one of {get_args(Direction)}. Found `direction = {self.direction!r}`."
            )

    def __call__(self, step: Step) -> Estimate:
        """Returns the estimate; it costs one gradient beside the one at the start."""
        return largest_secant("local", step, self._displaced(step), self.geometry)

    def _displaced(self, step: Step) -> Iterator[Vector]:
        direction = self._direction(step)
        length = self.geometry.norm(direction)
        if length > 0:
            radius = self._radius(step) * self.geometry.norm(step.start)
            yield vectors.add_scaled(step.start, direction, float(radius / length))

    def _radius(self, step: Step) -> float:
        if self.radius is not None:
            return self.radius
        # The coarsest dtype decides: its rounding is the largest.
        return max(RADIUS.get(x.dtype, COARSE_RADIUS) for x in step.start)

    def _direction(self, step: Step) -> Vector:
        if self.direction == "update":
            return vectors.sub(step.end, step.start)
        if self.direction == "gradient":
            return [-g for g in step.at_start.gradient]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step.index)
        return [torch.randn(x.shape, generator=generator).to(x) for x in step.start]
