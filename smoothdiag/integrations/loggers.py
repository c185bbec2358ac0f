"""Loggers: a probe's rows and AutoClip's state in TensorBoard and Weights & Biases, as they come."""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from smoothdiag.integrations.latest import CLIPPING
from smoothdiag.measure.probe import Probe
from smoothdiag.requirements import installed_by
from smoothdiag.rows import USABLE_STATUSES, SmoothdiagWarning
from smoothdiag.trace import Trace

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from torch.utils.tensorboard import SummaryWriter

    from smoothdiag.autoclip import AutoClip

Pixels = npt.NDArray[np.uint8]

STEP: Final = "optimizer_step"
"""The x axis in Weights & Biases."""

_PREFIX: Final = {"smoothness": "smoothness", "grad_norm": "gradient/norm", "saturation": "saturation"}


class Sink(Protocol):
    """Where a writer puts numbers and figures."""

    def start(self, steps: int) -> None:
        """Called once before anything is written, with the number of optimizer steps taken by then."""
        ...

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the numbers of one optimizer step, by name."""
        ...

    def image(self, step: int, name: str, pixels: Pixels) -> None:
        """Writes a figure of shape (height, width, 4), 8-bit RGBA."""
        ...

    def close(self) -> None:
        """Writes what is left, and lets go."""
        ...


class TraceWriter:
    """Passes the rows of a trace on to a sink, each once, and a figure at the end.

    It follows a probe by itself: what a step has recorded is written right before the next one, or on closing. Of a
    trace, ``update`` writes what has come since the last time. Per optimizer step, with estimators as ``local``:

    * ``smoothness/local`` [f/x^2], ``gradient/norm/local`` [f/x] and ``saturation/local``, those of a parameter group
      as ``smoothness/local/GROUP``; only from rows that fits may use, and only finite numbers;
    * ``status/ok`` and the like: how many rows so far have this status;
    * ``clipping/longest_step`` [x], ``clipping/threshold`` [f/x] and ``clipping/clip_fraction`` of AutoClip, once the
      rows of this step are known;
    * ``smoothness/figure`` on closing: `plot_smoothness` of the whole trace.

    Things to know:
        * Steps that are not measured cost one comparison of two numbers.
        * Rows that a probe holds when its first step under the writer begins are not written: they are those of a
          resumed run, and in the log already. To write them, give the trace and call ``update``.
        * Under data parallelism only the first rank writes. Make the writer after the process group.
        * Where writing fails, a warning says so once and the run goes on without.

    Args:
        source: The probe to follow, or a trace.
        sink: Makes what to write to; called on the first rank alone.
        autoclip: Whose state to write beside the rows.

    Raises:
        ValueError: If ``source`` is neither a probe nor a trace.
    """

    def __init__(self, source: Probe | Trace, sink: Callable[[], Sink], *, autoclip: AutoClip | None = None) -> None:
        if not isinstance(source, Probe | Trace):
            raise ValueError(f"Parameter `source` should be a Probe or a Trace. Found `source = {source!r}`.")
        self._probe = source if isinstance(source, Probe) else None
        self._trace = source.trace if isinstance(source, Probe) else source
        self._autoclip = autoclip
        is_later_rank = dist.is_available() and dist.is_initialized() and dist.get_rank() > 0
        self._sink = None if is_later_rank else sink()
        self._num_read = -1  # nothing is known before the first step: a resumed trace may yet be loaded
        self._counts: Counter[str] = Counter()
        self._handle: RemovableHandle | None = None
        if self._probe is not None and self._sink is not None:
            # Before a step AutoClip has taken up the rows of the last one, so that reading its state changes nothing.
            self._handle = self._probe.optimizer.register_step_pre_hook(self._before_step)

    def update(self) -> None:
        """Writes what the trace has recorded since the last time."""
        if self._sink is None:
            return
        try:
            if self._num_read < 0:
                self._num_read = 0 if self._probe is None else len(self._trace)
                self._sink.start(0 if self._probe is None else self._probe.steps)
            rows = [self._trace[i] for i in range(self._num_read, len(self._trace))]
            self._num_read = len(self._trace)
            for step, together in groupby(rows, key=itemgetter("step")):
                values = self._scalars(together)
                if self._autoclip is not None and step == rows[-1]["step"]:
                    values |= {f"clipping/{name}": getattr(self._autoclip, name) for name in CLIPPING}
                self._sink.scalars(step, {name: value for name, value in values.items() if math.isfinite(value)})
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        """Writes what is left and the figure, and lets go of the optimizer. Closing twice is closing once."""
        self.update()
        sink, self._sink = self._sink, None
        if self._handle is not None:
            self._handle.remove()
        if sink is None:
            return
        try:
            if len(self._trace):
                self._draw(sink)
            sink.close()
        except Exception as error:
            self._give_up(error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._num_read != len(self._trace):
            self.update()

    def _scalars(self, rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """Returns the numbers of one step by name."""
        found: dict[str, float] = {}
        for row in rows:
            self._counts[row["status"]] += 1
            found[f"status/{row['status']}"] = self._counts[row["status"]]
            if row["status"] not in USABLE_STATUSES:
                continue
            group = "" if row["group"] == "all" else f"/{row['group']}"
            found |= {f"{prefix}/{row['estimator']}{group}": row[column] for column, prefix in _PREFIX.items()}
        return found

    def _draw(self, sink: Sink) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        from smoothdiag.plots import plot_smoothness

        figure = Figure(figsize=(6.4, 4.8), dpi=150, layout="constrained")
        canvas: Any = FigureCanvasAgg(figure)  # its methods have no types
        try:
            plot_smoothness(self._trace, ax=figure.subplots())
            canvas.draw()
        except Exception as error:
            warnings.warn(f"The log gets no figure: {error}", SmoothdiagWarning)
            return
        sink.image(self._trace[-1]["step"], "smoothness/figure", np.asarray(canvas.buffer_rgba()))

    def _give_up(self, error: Exception) -> None:
        self._sink = None
        if self._handle is not None:
            self._handle.remove()
        warnings.warn(f"Logging has stopped: {error!r}. The trace has all rows.", SmoothdiagWarning)


class TensorBoardWriter(TraceWriter):
    """Writes a probe's rows to TensorBoard; see `TraceWriter` for what stands under which name.

    ::

        with TensorBoardWriter(probe, "runs/1"):
            train()

    Args:
        source: The probe to follow, or a trace.
        log_dir: Folder to write to, where a resumed run hides what the old one wrote of steps that are taken again; or
            a SummaryWriter, which stays open and hides nothing.
        autoclip: Whose state to write beside the rows.

    Raises:
        ImportError: If TensorBoard is not installed.
        ValueError: If ``source`` is neither a probe nor a trace.
    """

    def __init__(
        self, source: Probe | Trace, log_dir: str | Path | SummaryWriter, *, autoclip: AutoClip | None = None
    ) -> None:
        super().__init__(source, lambda: _TensorBoard(log_dir), autoclip=autoclip)


class WandbWriter(TraceWriter):
    """Writes a probe's rows to a run of Weights & Biases; see `TraceWriter` for what stands under which name.

    ::

        with WandbWriter(probe, project="mine"):
            train()

    Things to know:
        * The x axis is ``optimizer_step``; the run's own step counts calls of ``log``. Each measured step adds one, so
          log values of your own without ``step=``, or with the number of the optimizer step.
        * A run that it makes itself is offline, unless ``mode=`` or the variable WANDB_MODE says otherwise.
        * Of steps that a resumed run takes again, an old run keeps both values.

    Args:
        source: The probe to follow, or a trace.
        run: Run to write to, which then stays open; default: the active one, else a new one, finished on closing.
        autoclip: Whose state to write beside the rows.
        **init: What a new run is made with, as for ``wandb.init``.

    Raises:
        ImportError: If wandb is not installed.
        ValueError: If ``source`` is neither a probe nor a trace, or ``init`` is given and no run is made.
    """

    def __init__(
        self, source: Probe | Trace, run: Any = None, *, autoclip: AutoClip | None = None, **init: Any
    ) -> None:
        super().__init__(source, lambda: _Wandb(run, init), autoclip=autoclip)


class _TensorBoard:
    """A folder of event files, or somebody else's SummaryWriter."""

    def __init__(self, log_dir: str | Path | SummaryWriter) -> None:
        with installed_by("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        self._make, self._folder = SummaryWriter, ""
        self._writer: Any = None  # untyped, as its methods are
        if isinstance(log_dir, SummaryWriter):
            self._writer = log_dir
        else:
            Path(log_dir).mkdir(parents=True, exist_ok=True)  # a folder that cannot be is said at once
            self._folder = str(log_dir)

    def start(self, steps: int) -> None:
        if self._writer is None:
            self._writer = self._make(self._folder, purge_step=steps or None)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a run that is killed keeps them

    def image(self, step: int, name: str, pixels: Pixels) -> None:
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        if self._folder and self._writer is not None:
            self._writer.close()


class _Wandb:
    """A run of Weights & Biases."""

    def __init__(self, run: Any, init: Mapping[str, Any]) -> None:
        with installed_by("wandb"):
            import wandb
        self._image, self._owns = wandb.Image, run is None and wandb.run is None
        if init and not self._owns:
            raise ValueError(
                f"Parameter `init` should be empty where there is a run already. Found {', '.join(init)}; "
                "pass them to the `wandb.init` that made the run."
            )
        run = wandb.run if run is None else run
        self._run: Any = run or wandb.init(**{"mode": os.environ.get("WANDB_MODE", "offline"), **init})
        self._defined: set[str] = set()

    def start(self, steps: int) -> None:
        self._run.define_metric(STEP, hidden=True)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        for name in values.keys() - self._defined:
            self._run.define_metric(name, step_metric=STEP)
        self._defined |= values.keys()
        self._run.log({STEP: step, **values})

    def image(self, step: int, name: str, pixels: Pixels) -> None:
        self.scalars(step, {name: self._image(pixels)})

    def close(self) -> None:
        if self._owns:
            self._run.finish()
