"""Attached: the probe, the AutoClip and the options that all callbacks for frameworks share."""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist

from smoothdiag import arguments
from smoothdiag.autoclip import AutoClip
from smoothdiag.integrations.latest import Latest
from smoothdiag.measure.estimators import Estimator
from smoothdiag.measure.probe import Probe
from smoothdiag.measure.probe.data import Kind
from smoothdiag.measure.probe.schedule import Schedule
from smoothdiag.report.paths import page_path
from smoothdiag.rows import SmoothdiagWarning
from smoothdiag.spikes import SpikeGuard
from smoothdiag.trace import Trace

NO_CLIPPING = 1e30
"""A threshold above all norms. At ``max_grad_norm`` 0 the Trainer clips at infinity to read the norm: NaN spreads."""


class Attached:
    """A probe, and on request an AutoClip, that live as long as a framework trains.

    Args:
        estimators: What to measure at each due step.
        schedule: Which optimizer steps to measure.
        group_by: Function from a parameter name to the label of its group.
        auto_clip: Whether an `AutoClip` keeps steps short, or a mapping with its options.
        data: What to measure on: ``"fixed"`` or ``"step"``, as for `Probe`.
        report: Page to write at the end of training, ``.html``; None writes none.
        spikes: Whether a `SpikeGuard` watches every step, or a mapping with its options.

    Raises:
        ValueError: If ``auto_clip`` or ``spikes`` is neither a bool nor a mapping of options, or ``report`` is no page.

    Attributes:
        probe: The probe of the latest run; None before training.
        clipper: The AutoClip of the latest run, if there is one.
        guard: The SpikeGuard of the latest run, if there is one.
    """

    def __init__(
        self,
        estimators: Sequence[Estimator],
        schedule: Schedule | None,
        group_by: Callable[[str], str] | None,
        auto_clip: bool | Mapping[str, Any],
        data: Kind,
        report: str | Path | None = None,
        spikes: bool | Mapping[str, Any] = False,
    ) -> None:
        self._clip_options = _options("auto_clip", auto_clip, AutoClip)
        self._guard_options = _options("spikes", spikes, SpikeGuard)
        arguments.choice("data", data, get_args(Kind))
        self._report = None if report is None else page_path("report", report)
        self._options: dict[str, Any] = {
            "estimators": estimators,
            "schedule": schedule,
            "group_by": group_by,
            "data": data,
        }
        self.probe: Probe | None = None
        self.clipper: AutoClip | None = None
        self.guard: SpikeGuard | None = None
        self._latest: Latest | None = None
        self._undo: list[Callable[[], None]] = []

    @property
    def trace(self) -> Trace:
        """The rows of the latest run.

        Raises:
            RuntimeError: Before training.
        """
        if self.probe is None:
            raise RuntimeError("There is no trace before training has begun. Read `trace` during or after training.")
        return self.probe.trace

    def _attach_clipper(self, optimizer: torch.optim.Optimizer, probe: Probe, state: Mapping[str, Any] | None) -> None:
        """Makes an AutoClip if one was asked for, and loads its state from the checkpoint if there is one."""
        self.clipper = None
        if self._clip_options is not None:
            self.clipper = AutoClip(optimizer, probe, **self._clip_options)
            self._undo.append(self.clipper.detach)
            if state is not None:
                self.clipper.load_state_dict(state)
            elif probe.steps:
                warnings.warn(
                    "Training resumes from a checkpoint without an AutoClip in it. AutoClip begins at step "
                    f"{probe.steps} and measures there how long steps may be.",
                    SmoothdiagWarning,
                )
        elif state is not None:
            warnings.warn(
                "Training resumes without the AutoClip that its checkpoint has, so steps are no longer kept short. To "
                "continue with AutoClip, pass SmoothnessCallback(auto_clip=...).",
                SmoothdiagWarning,
            )

    def _attach_guard(self, optimizer: torch.optim.Optimizer, probe: Probe, state: Mapping[str, Any] | None) -> None:
        """Makes a SpikeGuard if one was asked for, and loads its state from the checkpoint if there is one.

        It comes before AutoClip, so that it sees the gradients that AutoClip is about to scale.
        """
        self.guard = None
        if self._guard_options is not None:
            self.guard = SpikeGuard(optimizer, probe, **self._guard_options)
            self._undo.append(self.guard.detach)
            if state is not None:
                self.guard.load_state_dict(state)

    def _write_report(self) -> None:
        """Writes the page if one was asked for, on the first rank. A fault costs the page and nothing else."""
        is_later_rank = dist.is_available() and dist.is_initialized() and dist.get_rank() > 0
        if self._report is None or self.probe is None or is_later_rank:
            return
        try:
            from smoothdiag.report.page import write_report  # only on request, because it loads what draws

            write_report(self.probe.trace, self._report)
        except Exception as error:
            message = f"The report {self._report} could not be written: {error}. Training is not affected."
            warnings.warn(message, SmoothdiagWarning)

    def _takes_over(self, name: str, found: float | None, off: str) -> bool:
        """Returns whether AutoClip clips instead of the framework, and warns if the framework was going to clip.

        Args:
            name: What the framework calls its threshold.
            found: The threshold that was set.
            off: The setting that switches the framework's clipping off, as ``Name(parameter=value)``.
        """
        if self._clip_options is None or self._clip_options.get("mode") == "shadow":
            return False
        if found and found < NO_CLIPPING:
            warnings.warn(
                f"AutoClip takes the place of {name}, so {name} is off as long as training runs. "
                f"Found `{name} = {found:g}`. To avoid this warning, pass {off}.",
                SmoothdiagWarning,
            )
        return True

    def _release(self) -> None:
        """Leaves optimizer and framework as they were, closes the file of the trace and stops logging."""
        for undo in self._undo:
            undo()
        self._undo, self._latest = [], None


def _options(name: str, given: bool | Mapping[str, Any], kind: type) -> Mapping[str, Any] | None:
    """Returns the options of what a callback attaches; ``None`` if it was not asked for.

    Raises:
        ValueError: If they are neither a bool nor a mapping of options that there are.
    """
    if not isinstance(given, bool | Mapping):
        raise ValueError(
            f"Parameter `{name}` should be True, False or options of {kind.__name__}. Found `{name} = {given!r}`."
        )
    # Batches have a form of their own under a framework, so nobody can pass held-out ones.
    known = inspect.signature(kind).parameters.keys() - {"optimizer", "probe", "held_out"}
    if isinstance(given, Mapping) and (unknown := given.keys() - known):
        raise ValueError(
            f"Parameter `{name}` should hold options of {kind.__name__}: {', '.join(sorted(known))}. "
            f"Found {', '.join(sorted(map(repr, unknown)))}."
        )
    return given if isinstance(given, Mapping) else {} if given else None
