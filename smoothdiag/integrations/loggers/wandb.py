"""Weights & Biases, and modules with its functions, such as trackio."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from smoothdiag.integrations.loggers.sink import Pixels, check_new, is_failing
from smoothdiag.integrations.loggers.writer import TraceWriter
from smoothdiag.measure.probe import Probe
from smoothdiag.requirements import installed_by
from smoothdiag.trace import Trace

if TYPE_CHECKING:
    from smoothdiag.autoclip import AutoClip

STEP: Final = "optimizer_step"
"""Name of the x axis in Weights & Biases."""


class WandbWriter(TraceWriter):
    """Writes a probe's rows to a run of Weights & Biases; `TraceWriter` lists the names.

    ::

        with WandbWriter(probe, project="mine"):
            train()

    Things to know:
        * The x axis is ``optimizer_step``. The run's own step counts calls of ``log``, and each measured step adds one.
          Log your own values without ``step=``, or with the number of the optimizer step.
        * A run that the writer makes is offline, unless ``mode=`` or the variable WANDB_MODE says otherwise.
        * If a resumed run takes steps again, Weights & Biases keeps both values.
        * If a ``with`` block ends by an exception, a run that the writer made counts as failed.

    Args:
        source: The probe to follow, or a trace.
        run: Run to write to, which stays open; default: the active run, else a new run that is finished on closing.
        autoclip: The AutoClip whose state to write with the rows.
        module: A module with the functions ``init``, ``log`` and ``finish`` of wandb, to use in its place. If its runs
            have no ``define_metric``, the x axis is the ``step`` of its ``log``. If it has no ``Image``, there are no
            figures.
        **init: Arguments of the module's ``init`` for a new run.

    Raises:
        ImportError: If wandb is not installed.
        ValueError: If ``source`` is neither a probe nor a trace, or ``init`` is given and no run is made.
    """

    def __init__(
        self,
        source: Probe | Trace,
        run: Any = None,
        *,
        autoclip: AutoClip | None = None,
        module: Any = None,
        **init: Any,
    ) -> None:
        super().__init__(source, lambda: _Wandb(module or _module("wandb"), run, init), autoclip=autoclip)


class TrackioWriter(TraceWriter):
    """Writes a probe's rows to a run of trackio; `TraceWriter` lists the names.

    ::

        with TrackioWriter(probe, project="mine"):
            train()

    The x axis is the optimizer step. If a resumed run takes steps again, trackio keeps both values.

    Args:
        source: The probe to follow, or a trace.
        run: Run to write to, which stays open; default: the active run, else a new run that is finished on closing.
        autoclip: The AutoClip whose state to write with the rows.
        **init: Arguments of ``trackio.init`` for a new run; ``project`` is required, and ``name`` with
            ``resume="allow"`` resumes a run.

    Raises:
        ImportError: If trackio is not installed.
        ValueError: If ``source`` is neither a probe nor a trace, or ``init`` is given and no run is made.
    """

    def __init__(
        self, source: Probe | Trace, run: Any = None, *, autoclip: AutoClip | None = None, **init: Any
    ) -> None:
        super().__init__(source, lambda: _Wandb(_module("trackio"), run, init), autoclip=autoclip)


class _Wandb:
    """A run of Weights & Biases, or of a module with its functions."""

    def __init__(self, module: Any, run: Any, init: Mapping[str, Any]) -> None:
        self._module, active = module, _active(module)
        self._owns = run is None and active is None
        self._is_wandb = module.__name__ == "wandb"
        check_new("init", init, f"{module.__name__}.init", is_new=self._owns)
        if self._owns:
            offline = {"mode": os.environ.get("WANDB_MODE", "offline")} if self._is_wandb else {}
            run = module.init(**{**offline, **init})
        run = active if run is None else run
        self._run: Any = module if run is None else run  # some `init` return nothing
        self._defines = hasattr(self._run, "define_metric")
        self._defined: set[str] = set()

    def start(self, steps: int) -> None:
        if self._defines:
            self._run.define_metric(STEP, hidden=True)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        if not self._defines:
            self._run.log(dict(values), step=step)
            return
        for name in values.keys() - self._defined:
            self._run.define_metric(name, step_metric=STEP)
        self._defined |= values.keys()
        self._run.log({STEP: step, **values})

    def text(self, step: int, name: str, text: str) -> None:
        if self._is_wandb:
            self._run.summary[name] = text  # each call of `log` would add one to the run's own step
        else:
            self.scalars(step, {name: text})

    def image(self, step: int, name: str, pixels: Pixels) -> None:
        if hasattr(self._module, "Image"):
            self.scalars(step, {name: self._module.Image(pixels)})

    def close(self) -> None:
        if self._owns:
            failed = self._is_wandb and is_failing()
            # The function of the module also forgets the active run; trackio's run cannot do this by itself.
            owner = self._module if _active(self._module) is self._run else self._run
            owner.finish(**({"exit_code": 1} if failed else {}))


def _module(name: str) -> Any:
    with installed_by(name):
        return importlib.import_module(name)


def _active(module: Any) -> Any:
    """Returns the run that the module writes to at present, if there is one and it can be known."""
    run = getattr(module, "run", None)
    if not isinstance(run, ModuleType):
        return run
    current = getattr(getattr(module, "context_vars", None), "current_run", None)  # in trackio, `run` is a module
    return None if current is None else current.get()
