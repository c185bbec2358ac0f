"""PathSmoothness: how fast the gradient changes along the step that was taken."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from smoothdiag import arguments
from smoothdiag.geometry import Euclidean, Geometry
from smoothdiag.measure.estimators.base import Estimate, Step
from smoothdiag.measure.estimators.rays import along_update, check_norm, geometry_of
from smoothdiag.measure.estimators.secants import check_start, conclude, secants


@dataclass(frozen=True)
class PathSmoothness:
    """Largest secant slope of the gradient between x_k and points on the way to x_{k+1}.

    The value is a lower bound on the largest curvature along the step. It cannot exceed
    (||g_k|| + ||g_{k+1}||) / ||d||. Where ``saturation`` is high, the value therefore follows the length of the step:
    do not steer a clipper by it.

    Args:
        points: Fractions of the step, in (0, 1], at one gradient each. ``(1.0,)`` gives the secant of the whole step;
            several points give the maximum over their secants.
        geometry: Norm of the displacement; gradients are measured in its dual norm. ``"optimizer"`` takes the norm in
            which the optimizer steps: spectral norms for Muon, the largest entry for Lion, the geometries of `GGNC` and
            `ClippedScion`, ||.||_P for Adam. Rows are then named "path_own", and docs/measuring.md has the details.
        two_scale: Whether to measure at a quarter of the last point too, to tell curvature from kinks and rounding.

    Raises:
        ValueError: If ``points`` is empty or holds a number outside (0, 1]; at the first step, if the geometry is
            ``"optimizer"`` and the optimizer has no known norm of its own.

    Units: smoothness [f/x^2].
    Source: Zhang, He, Sra, Jadbabaie 2020 (ICLR), whose experiments take the maximum over fractions of the step.

    Examples:
        On x^4 the gradient is 4 x^3, so from x = 1 to x = 2 it changes by 32 - 4:

        >>> model = sd.problems.power(4.0).as_module(torch.ones(1, dtype=torch.float64))
        >>> loss = sd.objective(model, lambda model, batch: model(), [None])
        >>> found = sd.PathSmoothness()(sd.Step(0, loss, start=loss.point(), end=[2 * loss.point()[0]], lr=0.1))
        >>> print(round(found.smoothness, 3), round(found.step_norm, 3), round(found.saturation, 3))
        28.0 1.0 0.778
    """

    points: tuple[float, ...] = (1.0,)
    geometry: Geometry | Literal["optimizer"] = Euclidean()
    two_scale: bool = True

    @property
    def checks_start(self) -> bool:
        """Whether the estimate checks the gradient at the start, so that it may be that of the training loop."""
        return self.two_scale and len(self.points) == 1 and type(self.geometry) is Euclidean

    def __post_init__(self) -> None:
        if isinstance(self.points, str) or not isinstance(self.points, Sequence):
            raise arguments.wrong("points", "a tuple of fractions in (0, 1]", self.points)
        for point in self.points:
            arguments.number("points", point, "fractions in (0, 1]", lambda v: True)
        check_norm(self.geometry)
        arguments.flag("two_scale", self.two_scale)
        if not self.points or not all(0 < t <= 1 for t in self.points):
            raise ValueError(f"Parameter `points` should hold fractions in (0, 1]. Found `points = {self.points!r}`.")

    def __call__(self, step: Step) -> Estimate:
        """Returns the estimate; besides the start it costs one gradient per point and one for the second scale."""
        geometry = geometry_of(self.geometry, step)
        if not step.starts_finite:
            return conclude("path", step, [], geometry)

        ray = along_update(step)

        found = [s for s in (secants(ray, t, geometry) for t in self.points) if s is not None]
        fine = secants(ray, self.points[-1] / 4, geometry, beyond=found[-1]) if self.two_scale and found else None
        if found:
            check_start(step, fine)
        return conclude("path", step, found, geometry, fine)
