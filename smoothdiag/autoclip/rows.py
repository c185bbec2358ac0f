"""Rows: those of a probe's trace that say how long a step may be, and what measures them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from smoothdiag.measure.estimators import Estimate, Estimator, LocalSmoothness, Step
from smoothdiag.measure.probe import Probe
from smoothdiag.rows import CLIP_SUFFIX, USABLE_STATUSES

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


def _is_ours(estimator: str) -> bool:
    # A measurement that failed stands under the name of the class, or of the probe.
    return estimator.endswith(CLIP_SUFFIX) or estimator in (ForClipping.__name__, "probe")
