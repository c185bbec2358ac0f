"""Trust: lets the gradient of the training loop stand in for one to evaluate, as long as measurements go with it."""

from collections import defaultdict
from dataclasses import dataclass, replace

from smoothdiag import vectors
from smoothdiag.measure.estimators import Estimate, Estimator, Step
from smoothdiag.measure.estimators.base import Contradicted
from smoothdiag.measure.loss.selftest import SelfTest
from smoothdiag.measure.probe.accumulation import Beginning

PAUSE = 10
"""Rows of an estimator without trust after its gradients have contradicted that of the training loop; after every
further time twice as many. Such a row costs two or three gradients more, and saves most of one otherwise; where the
loss has kinks all of them would contradict."""


@dataclass
class _Record:
    """Rows of one estimator: how many are still to be without trust, and how long the last pause was."""

    left: int = 0
    pause: int = 0


class Trust:
    """Decides at which steps the gradient of the training loop may stand in.

    Attributes:
        is_lost: Whether the measured loss has been seen not to be the trained one, after which nothing is trusted.
    """

    def __init__(self) -> None:
        self.is_lost = False
        self._records: defaultdict[int, _Record] = defaultdict(_Record)

    def step(self, step: Step, begun: Beginning, test: SelfTest | None, *, is_test_due: bool) -> Step | None:
        """Returns a step with the gradient of the training loop in place of one to evaluate, where that is safe.

        That gradient has to be what backward left, of a loss that is known to repeat it bit for bit. Where a test is
        due, the gradient is evaluated all the same, and compared.
        """
        if self.is_lost or is_test_due:
            return None
        is_left = begun.is_complete and begun.scale == 1
        if not is_left or begun.training is None or test is None or not test.reproduced or test.loss_scale != 1:
            return None
        # Measurements in another precision than training have another gradient; several micro-batches show its noise.
        if any(map(vectors.is_half, begun.training)) or step.objective.num_micro_batches > 1:
            return None
        return replace(step, training=begun.training)

    def estimate(self, step: Step, trusting: Step | None, estimator: Estimator) -> Estimate:
        """Returns the estimate; the step then knows loss and gradient at its start.

        A gradient that one estimator has checked may be too far off for another one, over a shorter way: each of those
        that can checks it. Those whose ``checks_start`` is false have it evaluated, and all others take what is known.
        """
        checks = getattr(estimator, "checks_start", None)
        is_lent = trusting is not None and step.__dict__.get("at_start", step) is trusting.__dict__.get("at_start")
        if trusting is None or checks is None or ("at_start" in step.__dict__ and not is_lent):
            return estimator(step)
        record = self._records[id(estimator)]
        if checks and record.left == 0:
            try:
                estimate = estimator(trusting)
            except Contradicted:
                record.left = record.pause = 2 * record.pause or PAUSE
            else:
                step.learn(trusting)  # for the other estimators
                return estimate
        elif checks:
            record.left -= 1
        if is_lent:
            step.forget_start()
        return estimator(step)
