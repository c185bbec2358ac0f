"""Attached: what the callbacks of all frameworks hold, and what they are made with."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from smoothdiag.autoclip import AutoClip
from smoothdiag.integrations.latest import Latest
from smoothdiag.measure.estimators import Estimator
from smoothdiag.measure.probe import Probe
from smoothdiag.measure.schedule import Schedule
from smoothdiag.rows import SmoothdiagWarning
from smoothdiag.trace import Trace


class Attached:
    """A probe, and an AutoClip on request, for as long as a framework trains.

    Args:
        estimators: What to measure at each due step.
        schedule: Which optimizer steps to measure.
        group_by: Parameter name -> label of its group.
        auto_clip: Whether an `AutoClip` keeps steps short, or its options.

    Raises:
        ValueError: If ``auto_clip`` is neither a bool nor a mapping.

    Attributes:
        probe: The probe of the latest run; None before training.
        clipper: The AutoClip of the latest run, if there is one.
    """

    def __init__(
        self,
        estimators: Sequence[Estimator],
        schedule: Schedule | None,
        group_by: Callable[[str], str] | None,
        auto_clip: bool | Mapping[str, Any],
    ) -> None:
        if not isinstance(auto_clip, bool | Mapping):
            raise ValueError(
                "Parameter `auto_clip` should be True, False or options of AutoClip. "
                f"Found `auto_clip = {auto_clip!r}`."
            )
        self._options: dict[str, Any] = {"estimators": estimators, "schedule": schedule, "group_by": group_by}
        self._clip_options = auto_clip if isinstance(auto_clip, Mapping) else {} if auto_clip else None
        self.probe: Probe | None = None
        self.clipper: AutoClip | None = None
        self._latest: Latest | None = None

    @property
    def trace(self) -> Trace:
        """The rows of the latest run.

        Raises:
            RuntimeError: Before training.
        """
        if self.probe is None:
            raise RuntimeError("There is no trace before training has begun.")
        return self.probe.trace

    def _takes_over(self, name: str, found: float | None, off: str) -> bool:
        """Returns whether AutoClip clips in the place of the framework, and says so where that was going to clip.

        Args:
            name: What the framework calls its threshold.
            found: The threshold that was set.
            off: What keeps the framework from clipping, as ``Name(parameter=value)``.
        """
        assert self._clip_options is not None
        takes_over = self._clip_options.get("mode") != "shadow"
        if takes_over:
            said = f"AutoClip takes the place of {name}, which is off as long as training runs"
        else:
            said = "AutoClip counts gradients that are clipped already, so it may miss some"
        if found:
            warnings.warn(f"{said}. Found `{name} = {found:g}`; {off} avoids this.", SmoothdiagWarning)
        return takes_over
