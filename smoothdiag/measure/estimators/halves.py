"""DebiasedSmoothness: gradient norm and smoothness without the bias from the noise of a batch."""

import math
from dataclasses import dataclass, replace

from smoothdiag import vectors
from smoothdiag.measure.estimators.base import Estimate, Status, Step, noise_columns
from smoothdiag.measure.loss.objective import Evaluation
from smoothdiag.vectors import Vector


@dataclass(frozen=True)
class DebiasedSmoothness:
    """Smoothness along the step from two disjoint halves of the data, so that noise adds no bias.

    A squared norm measured on one batch is too large by the variance of the batch's noise. The inner product of the
    same vector measured on two independent halves A and B is not: <dg_A, dg_B> estimates ||dg||^2 of the full loss
    without bias, and <g_A, g_B> does so for the gradient. The row reports the roots of both. If an inner product is not
    positive, it has no root: noise hides the value, and the status is ``halves_disagree``. The roots of single rows are
    still noisy and, on average, a little low; average ``smoothness_squared`` over rows if that matters.

    The step must not depend on the halves: use ``probe_batches``. On halves of the step's own batch the displacement
    is correlated with the data, which leaves a bias of some per cent. So it is for rows on fixed batches at the steps
    that the optimizer takes on these batches, the first measured one among them.

    An estimate costs four gradients on half of the data. Several micro-batches go to the halves in turn; a single batch
    is cut along the first dimension of its tensors, and ``loss_fn`` should be a mean over that dimension.

    Raises:
        ValueError: On use, if the data cannot be divided into halves.

    Units: smoothness [f/x^2]; extra column ``smoothness_squared`` [f^2/x^4], of either sign.

    Examples:
        The loss w^2 on one half of the data and 4 w^2 on the other have the curvatures 2 and 8, whose product is 16:

        >>> batch = torch.tensor([[1.0], [2.0]])
        >>> loss = sd.objective(nn.Linear(1, 1, bias=False), lambda model, x: model(x).square().mean(), [batch])
        >>> found = sd.DebiasedSmoothness()(sd.Step(0, loss, [torch.ones(1, 1)], [torch.zeros(1, 1)], lr=0.1))
        >>> print(found.estimator, round(found.smoothness, 3), round(found.extra["smoothness_squared"], 3))
        debiased 4.0 16.0
    """

    def __call__(self, step: Step) -> Estimate:
        """Returns the estimate; ``grad_variance`` and ``noise_scale`` come with it."""
        displacement = float(vectors.norm(vectors.sub(step.end, step.start)))
        here = on_halves(step, step.start)
        loss = (here[0].loss + here[1].loss) / 2
        squared_norm = float(vectors.dot(here[0].gradient, here[1].gradient))
        estimate = Estimate("debiased", math.nan, _root(squared_norm), displacement, loss)
        if not (math.isfinite(loss) and math.isfinite(squared_norm)):
            return replace(estimate, status=Status.NON_FINITE)
        # A quarter of the squared distance of two independent halves estimates the variance of their mean.
        variance = float(vectors.norm(vectors.sub(here[0].gradient, here[1].gradient))) ** 2 / 4
        estimate = replace(estimate, extra=noise_columns(variance, squared_norm))
        if displacement == 0:
            return replace(estimate, status=Status.ZERO_STEP)
        there = on_halves(step, step.end)
        changes = [vectors.sub(b.gradient, a.gradient) for a, b in zip(here, there, strict=True)]
        squared = float(vectors.dot(*changes)) / displacement**2
        if not math.isfinite(squared):
            return replace(estimate, status=Status.NON_FINITE)
        far_norm = _root(float(vectors.dot(there[0].gradient, there[1].gradient)))
        smoothness = _root(squared)
        return replace(
            estimate,
            smoothness=smoothness,
            saturation=smoothness * displacement / (estimate.grad_norm + far_norm),
            noise_floor=math.sqrt(2) * step.gradient_error * estimate.grad_norm / displacement,
            status=Status.OK if squared > 0 and squared_norm > 0 else Status.HALVES_DISAGREE,
            extra={**estimate.extra, "smoothness_squared": squared},
        )


def on_halves(step: Step, point: Vector) -> list[Evaluation]:
    """Returns losses and gradients on two disjoint halves of the data; together they count as one gradient.

    Raises:
        ValueError: If the data cannot be divided into halves.
    """
    found = [half.evaluate(point) for half in step.objective.halves()]
    step.objective.num_grads += 1
    return found


def _root(squared: float) -> float:
    return math.sqrt(squared) if squared > 0 else math.nan
