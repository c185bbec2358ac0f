"""Attached: what the callbacks of all frameworks hold, and what they are made with."""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from smoothdiag.autoclip import AutoClip
from smoothdiag.integrations.latest import Latest
from smoothdiag.measure.estimators import Estimator
from smoothdiag.measure.probe import Probe
from smoothdiag.measure.probe.schedule import Schedule
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
        ValueError: If ``auto_clip`` is neither a bool nor a mapping of options.

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
        known = inspect.signature(AutoClip).parameters.keys() - {"optimizer", "probe"}
        if isinstance(auto_clip, Mapping) and (unknown := auto_clip.keys() - known):
            raise ValueError(
                f"Parameter `auto_clip` should hold options of AutoClip: {', '.join(sorted(known))}. "
                f"Found {', '.join(sorted(map(repr, unknown)))}."
            )
        self._options: dict[str, Any] = {"estimators": estimators, "schedule": schedule, "group_by": group_by}
        self._clip_options = auto_clip if isinstance(auto_clip, Mapping) else {} if auto_clip else None
        self.probe: Probe | None = None
        self.clipper: AutoClip | None = None
        self._latest: Latest | None = None
        self._undo: list[Callable[[], None]] = []

    @property
    def trace(self) -> Trace:
        """The rows of the latest run.

        Raises:
            RuntimeError: Before training.
        """
        if self.probe is None:
            raise RuntimeError("There is no trace before training has begun.")
        return self.probe.trace

    def _attach_clipper(self, optimizer: torch.optim.Optimizer, probe: Probe, state: Mapping[str, Any] | None) -> None:
        """Makes an AutoClip if one was asked for, and gives it the state that a checkpoint holds of one."""
        self.clipper = None
        if self._clip_options is not None:
            self.clipper = AutoClip(optimizer, probe, **self._clip_options)
            self._undo.append(self.clipper.detach)
            if state is not None:
                self.clipper.load_state_dict(state)
            elif probe.steps:
                warnings.warn(
                    "Training goes on from a state without an AutoClip in it. AutoClip begins at step "
                    f"{probe.steps} and measures there how long steps may be.",
                    SmoothdiagWarning,
                )
        elif state is not None:
            warnings.warn(
                "Training goes on from a state with an AutoClip in it, but without one, and steps are no longer kept "
                "short. SmoothnessCallback(auto_clip=...) goes on with it.",
                SmoothdiagWarning,
            )

    def _takes_over(self, name: str, found: float | None, off: str) -> bool:
        """Returns whether AutoClip clips in the place of the framework, and says so where that was going to clip.

        Args:
            name: What the framework calls its threshold.
            found: The threshold that was set.
            off: What keeps the framework from clipping, as ``Name(parameter=value)``.
        """
        if self._clip_options is None or self._clip_options.get("mode") == "shadow":
            return False
        if found:
            warnings.warn(
                f"AutoClip takes the place of {name}, which is off as long as training runs. "
                f"Found `{name} = {found:g}`; {off} avoids this.",
                SmoothdiagWarning,
            )
        return True

    def _release(self) -> None:
        """Leaves optimizer and framework as they were, closes the file of the trace, and has nothing more to log."""
        for undo in self._undo:
            undo()
        self._undo, self._latest = [], None
