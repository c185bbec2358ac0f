"""Latest: what a trace has gained since somebody last looked, by names for logging."""

import math

from smoothdiag.autoclip import AutoClip
from smoothdiag.rows import CLIP_SUFFIX, USABLE_STATUSES
from smoothdiag.trace import Trace


class Latest:
    """Reads new rows of a trace, each once.

    Args:
        trace: The trace; rows that it has already are not new.
        clipper: AutoClip, if there is one.
    """

    def __init__(self, trace: Trace, clipper: AutoClip | None) -> None:
        self._trace, self._clipper = trace, clipper
        self._num_read = len(trace)

    def metrics(self) -> dict[str, float]:
        """Returns the latest usable value of each measurement that is new, and how AutoClip stands; finite ones only.

        Units: grad_norm and threshold [f/x], smoothness [f/x^2], longest_step [x].
        """
        begin, self._num_read = self._num_read, len(self._trace)
        found: dict[str, float] = {}
        for row in (self._trace[i] for i in range(begin, self._num_read)):
            name = row["estimator"]
            if row["group"] == "all" and row["status"] in USABLE_STATUSES and not name.endswith(CLIP_SUFFIX):
                found[f"smoothdiag/{name}_smoothness"] = row["smoothness"]
                if not name.endswith("_preconditioned"):
                    found["smoothdiag/grad_norm"] = row["grad_norm"]
        if self._clipper is not None and self._num_read > begin:
            found["smoothdiag/longest_step"] = self._clipper.longest_step
            found["smoothdiag/threshold"] = self._clipper.threshold
        return {name: value for name, value in found.items() if math.isfinite(value)}
