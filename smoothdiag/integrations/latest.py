"""Latest: the newest rows of a trace, under the names that logs give them."""

import math
from typing import Final

from smoothdiag.autoclip import AutoClip
from smoothdiag.rows import CLIP_SUFFIX, USABLE_STATUSES
from smoothdiag.trace import Trace

CLIPPING: Final = ("longest_step", "threshold", "clip_fraction")
"""Attributes of AutoClip that are logged. Units: longest_step [x], threshold [f/x]."""


class Latest:
    """Reads each new row of a trace once.

    Args:
        trace: The trace; rows that are in it already are not new.
        clipper: The AutoClip, if there is one.
    """

    def __init__(self, trace: Trace, clipper: AutoClip | None) -> None:
        self._trace, self._clipper = trace, clipper
        self._num_read = len(trace)

    def metrics(self) -> dict[str, float]:
        """Returns the latest usable value of each new measurement, and AutoClip's values if there are new rows.

        Units: grad_norm [f/x], smoothness [f/x^2].
        """
        begin, self._num_read = self._num_read, len(self._trace)
        found: dict[str, float] = {}
        for row in (self._trace[i] for i in range(begin, self._num_read)):
            name = row["estimator"]
            if row["group"] == "all" and row["status"] in USABLE_STATUSES and not name.endswith(CLIP_SUFFIX):
                found[f"smoothdiag/{name}_smoothness"] = row["smoothness"]
                if not name.endswith(("_preconditioned", "_own")):
                    found["smoothdiag/grad_norm"] = row["grad_norm"]
        return _finite(found) | (self.clipping() if self._num_read > begin else {})

    def clipping(self) -> dict[str, float]:
        """Returns AutoClip's current values, if there is an AutoClip.

        Units: longest_step [x], threshold [f/x].
        """
        if self._clipper is None:
            return {}
        return _finite({f"smoothdiag/{name}": getattr(self._clipper, name) for name in CLIPPING})


def _finite(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if math.isfinite(value)}
