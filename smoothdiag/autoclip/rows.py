"""Rows: those of a probe's trace that say how long a step may be, what measures them, and who else clips."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from smoothdiag.autoclip.rates import Number
from smoothdiag.measure.estimators import Estimate, Estimator, LocalSmoothness, Step
from smoothdiag.measure.loss.selftest import SLACK
from smoothdiag.measure.probe import Probe
from smoothdiag.rows import CLIP_SUFFIX, USABLE_STATUSES, SmoothdiagWarning

RADIUS = 1e-2
"""Radius relative to ||x||, about as long as the steps it is measured for. Over a thousandth and less the kinks of
ReLU layers shorten the lengths of a residual network five times."""

ALONG_GRADIENT = LocalSmoothness(radius=RADIUS, two_scale=False)


@dataclass(frozen=True)
class ForClipping:
    """An estimator whose rows have names of their own, so that they stand apart from those of the probe's own ones.

    Attributes:
        estimator: What measures.
    """

    estimator: Estimator

    def __call__(self, step: Step) -> Estimate:
        """Returns the estimate for all parameters, under its name with a suffix."""
        estimate = self.estimator(step)
        return replace(estimate, estimator=estimate.estimator + CLIP_SUFFIX, parts=())


class Rows:
    """Reads new rows of a trace, each once.

    Args:
        probe: The probe.

    Attributes:
        last: Step of the last row taken up, or -1.
    """

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self.last = -1
        self._num_read = len(probe.trace)  # rows that are there already are of another run, or of other steps

    def new(self) -> list[dict[str, Any]]:
        """Returns the rows that have come since; takes no time where there are none."""
        trace = self._probe.trace
        begin, self._num_read = min(self._num_read, len(trace)), len(trace)
        rows = (trace[i] for i in range(begin, len(trace)))
        # A trace that was resumed begins with rows that were taken up before.
        found = [row for row in rows if _is_ours(row["estimator"]) and row["step"] > self.last]
        if found:
            self.last = found[-1]["step"]
        return found

    @staticmethod
    def measured(row: Mapping[str, Any]) -> tuple[float, float] | str:
        """Returns the step at which a quadratic with the measured curvature is lowest, and the rate that makes it.

        Or, where there is none, why. Units: [x], [x^2/f].
        """
        curvature = row["smoothness"]
        if row["status"] not in USABLE_STATUSES:
            return str(row["status"])
        if not 0 < curvature < math.inf:
            return "without positive curvature"
        # A slope is that of the loss along a direction, whose curvature may have either sign.
        has_slope = "slope" in row
        length = (-float(row["slope"]) if has_slope else row["grad_norm"]) / curvature
        if not 0 < length < math.inf:
            return "without a descent"
        return length, math.nan if has_slope else 1 / curvature


class Arrivals:
    """Gradients as they reach AutoClip, beside the same as they are measured: one that is shorter was clipped before.

    Args:
        probe: The probe; ``None`` where it does not measure the Euclidean norm.
        acts: Whether AutoClip changes anything.
    """

    def __init__(self, probe: Probe | None, *, acts: bool) -> None:
        self._probe, self._acts = probe, acts
        self._step = -1
        self._norm: Number | None = None

    def take(self, step: int, norm: Number | None) -> None:
        """Keeps the norm of the gradient of a step that will be measured."""
        self._step, self._norm = step, norm

    def check(self, row: Mapping[str, Any]) -> None:
        """Warns, once, if the gradient of a row arrived shorter than rounding explains."""
        if self._probe is None or self._norm is None or row["step"] != self._step or row.get("data") != "step":
            return
        error = math.inf if self._probe.self_test is None else self._probe.self_test.gradient_error
        arrived, measured = float(self._norm), row["grad_norm"]
        if arrived < measured * (1 - 10 * SLACK - 10 * error):
            self._probe = None
            advice = (
                "Let it clip alone: no clip_grad_norm_ in the loop, and no setting of a trainer that asks for it. If "
                "nothing clips, loss_fn should have the scale of the loss that is trained."
            )
            warnings.warn(
                f"The gradient that reached AutoClip at step {self._step} had the norm {arrived:.3g}, and where it was "
                f"measured {measured:.3g}, as if clipped before: AutoClip sees what is left, and clip_fraction is too "
                f"low. {advice if self._acts else 'The longest step is not affected.'}",
                SmoothdiagWarning,
            )


def _is_ours(estimator: str) -> bool:
    # A measurement that failed stands under the name of the class, or of the probe.
    return estimator.endswith(CLIP_SUFFIX) or estimator in (ForClipping.__name__, "probe")
