"""Trust: lets the gradient of the training loop stand in for one to evaluate, as long as measurements go with it."""

from dataclasses import replace

from smoothdiag import vectors
from smoothdiag.measure.estimators import Estimate, Estimator, Step
from smoothdiag.measure.estimators.base import Contradicted
from smoothdiag.measure.loss.selftest import SelfTest
from smoothdiag.measure.probe.accumulation import Beginning

MOST = 3
"""Times that the gradients of a row may contradict the gradient of the training loop, and three times as many may go
with it, before it is no longer used: where the loss has kinks they always do. Each time costs two or three gradients,
and saves most of one if they go with it."""


class Trust:
    """Counts how often measurements have gone with the gradient of the training loop."""

    def __init__(self) -> None:
        self._num_confirmed = self._num_contradicted = 0

    def step(self, step: Step, begun: Beginning, test: SelfTest | None) -> Step | None:
        """Returns a step with the gradient of the training loop in place of one to evaluate, where that is safe.

        That gradient has to be what backward left, of a loss that is known to repeat it bit for bit. Now and then the
        gradient is evaluated all the same, and compared.
        """
        is_left = begun.is_marked and begun.is_complete and begun.scale == 1
        if not is_left or begun.training is None or test is None or not test.reproduced or test.loss_scale != 1:
            return None
        # Measurements in another precision than training have another gradient; several micro-batches show its noise.
        if any(map(vectors.is_half, begun.training)) or step.objective.num_micro_batches > 1:
            return None
        return replace(step, training=begun.training)

    def estimate(self, step: Step, trusting: Step | None, estimator: Estimator) -> tuple[Step, Estimate]:
        """Returns the estimate, and the step that it was taken at."""
        checks = getattr(estimator, "checks_start", False) and "at_start" not in step.__dict__
        if trusting is not None and checks and self._num_contradicted < max(MOST, self._num_confirmed / 3):
            try:
                estimate = estimator(trusting)
            except Contradicted:
                self._num_contradicted += 1
            else:
                self._num_confirmed += 1
                return trusting, estimate
        return step, estimator(step)
