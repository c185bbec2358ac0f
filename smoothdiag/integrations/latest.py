"""Latest: the newest rows of a trace, under the names that logs give them."""

import math
from collections.abc import Mapping
from typing import Any, Final

from smoothdiag.autoclip import AutoClip
from smoothdiag.rows import BENEFIT_HELD_OUT, CLIP_BENEFIT, CLIP_SUFFIX, SPIKE, USABLE_STATUSES
from smoothdiag.trace import Trace

CLIPPING: Final = ("longest_step", "threshold", "clip_fraction")
"""Attributes of AutoClip that are logged. Units: longest_step [x], threshold [f/x]."""


def noted(row: Mapping[str, Any]) -> dict[str, float]:
    """Returns what a log gets of a row that notes what happened: a spike, or what clipping would have been worth.

    A spike is the number of its signals, the value of each, and how far that is from what was usual, in standard
    deviations. A value that is not finite has no such distance. Units: grad_norm [f/x], loss [f], update_norm [x].
    """
    if row["estimator"] == SPIKE:
        names = str(row["spiked"]).split()
        parts = {"": "value", "_deviations": "deviations"}
        found = {f"spike/{name}{end}": row.get(f"{name}_{part}") for name in names for end, part in parts.items()}
        return {"spike/signals": len(names), **{name: x for name, x in found.items() if isinstance(x, float)}}
    if row["estimator"] == CLIP_BENEFIT:
        columns = {"clipping/benefit": CLIP_BENEFIT, "clipping/benefit_held_out": BENEFIT_HELD_OUT}
        return {name: row[column] for name, column in columns.items() if column in row}
    return {}


class Latest:
    """Reads each new row of a trace once.

    Args:
        trace: The trace; rows that are in it already are not new.
        clipper: The AutoClip, if there is one.

    Attributes:
        notes: What the last call of ``metrics`` found of spikes, and of the benefit of clipping, by optimizer step.
    """

    def __init__(self, trace: Trace, clipper: AutoClip | None) -> None:
        self._trace, self._clipper = trace, clipper
        self._num_read = len(trace)
        self.notes: dict[int, dict[str, float]] = {}

    def metrics(self) -> dict[str, float]:
        """Returns the latest usable value of each new measurement, and AutoClip's values if there are new rows.

        Spikes are in ``notes`` afterwards. Units: grad_norm [f/x], smoothness [f/x^2].
        """
        begin, self._num_read = self._num_read, len(self._trace)
        found: dict[str, float] = {}
        self.notes = {}
        for row in (self._trace[i] for i in range(begin, self._num_read)):
            name = row["estimator"]
            if values := _finite({f"smoothdiag/{name}": value for name, value in noted(row).items()}):
                self.notes.setdefault(row["step"], {}).update(values)
            if row["group"] == "all" and row["status"] in USABLE_STATUSES and not name.endswith(CLIP_SUFFIX):
                found[f"smoothdiag/{name}_smoothness"] = row["smoothness"]
                if not name.endswith(("_preconditioned", "_own")):
                    found["smoothdiag/grad_norm"] = row["grad_norm"]
        return _finite(found) | (self.clipping() if self._num_read > begin else {})

    def worst(self) -> dict[str, float]:
        """Returns the numbers of the spike of ``notes`` that was furthest from what is usual, and its step.

        A log with one line for many steps has room for one.
        """
        own = {step: values for step, values in self.notes.items() if "smoothdiag/spike/signals" in values}
        others = [values for step, values in self.notes.items() if step not in own]
        found = {name: value for values in others for name, value in values.items()}
        if own:
            step = max(own, key=lambda step: _distance(own[step]))
            found |= own[step] | {"smoothdiag/spike/step": step, "smoothdiag/spike/number": len(own)}
        return found

    def clipping(self) -> dict[str, float]:
        """Returns AutoClip's current values, if there is an AutoClip.

        Units: longest_step [x], threshold [f/x].
        """
        if self._clipper is None:
            return {}
        return _finite({f"smoothdiag/{name}": getattr(self._clipper, name) for name in CLIPPING})


def _finite(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _distance(spike: Mapping[str, float]) -> float:
    """Returns how far a spike is from what was usual; infinite for one that is not finite."""
    return max((value for name, value in spike.items() if name.endswith("_deviations")), default=math.inf)
