"""Rows: those of a probe's trace that say how long a step may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from smoothdiag.geometry import Euclidean
from smoothdiag.measure.estimators import DirectionalCurvature, LocalSmoothness
from smoothdiag.measure.probe import Probe
from smoothdiag.rows import USABLE_STATUSES


class Rows:
    """Reads new rows of a trace, each once.

    Args:
        probe: The probe.
        along_update: Whether curvature along the update counts, or else along the gradient.
        needed: Whether any rows are needed.

    Raises:
        ValueError: If the probe does not measure that, or measures it in another norm than the Euclidean one.

    Attributes:
        last: Step of the last row taken up, or -1.
    """

    def __init__(self, probe: Probe, *, along_update: bool, needed: bool) -> None:
        self._probe, self._along_update = probe, along_update
        kind: type[Any] = DirectionalCurvature if along_update else LocalSmoothness
        direction = "update" if along_update else "gradient"
        # A measurement that failed stands under the name of the class, or of the probe.
        self._names = {"curvature_update" if along_update else "local", kind.__name__, "probe"} if needed else set()
        self.last = -1
        # Rows that were there before the first step are of another run.
        self._num_read = 0 if probe.steps else len(probe.trace)
        found = [e for e in probe.estimators if isinstance(e, kind) and e.direction == direction]
        if not needed or any(getattr(e, "geometry", Euclidean()) == Euclidean() for e in found):
            return
        have = ", ".join(map(repr, found or [type(e).__name__ for e in probe.estimators]))
        raise ValueError(
            f"Parameter `probe` should have a {kind.__name__}(direction={direction!r}) in the Euclidean norm among its "
            f"estimators. Found {have}."
        )

    def new(self) -> list[dict[str, Any]]:
        """Returns the rows that have come since; takes no time where there are none."""
        trace = self._probe.trace
        begin, self._num_read = min(self._num_read, len(trace)), len(trace)
        rows = (trace[i] for i in range(begin, len(trace)))
        # A trace that was resumed begins with rows that were taken up before.
        found = [r for r in rows if r["estimator"] in self._names and r["group"] == "all" and r["step"] > self.last]
        if found:
            self.last = found[-1]["step"]
        return found

    def measured(self, row: Mapping[str, Any]) -> tuple[float, float]:
        """Returns the step at which a quadratic with the measured curvature is lowest, and the rate that makes it.

        Units: [x], [x^2/f].
        """
        curvature = row["smoothness"]
        if row["status"] not in USABLE_STATUSES or not 0 < curvature < math.inf:
            return math.nan, math.nan
        if self._along_update:
            return -float(row.get("slope", math.nan)) / curvature, math.nan
        return row["grad_norm"] / curvature, 1 / curvature
