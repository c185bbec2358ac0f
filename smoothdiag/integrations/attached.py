"""Attached: what the callbacks of all frameworks hold, and what they are made with."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from smoothdiag.autoclip import AutoClip
from smoothdiag.integrations.latest import Latest
from smoothdiag.measure.estimators import Estimator
from smoothdiag.measure.probe import Probe
from smoothdiag.measure.schedule import Schedule
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
