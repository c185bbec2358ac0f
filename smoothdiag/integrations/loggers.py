"""Loggers: write a probe's rows and AutoClip's state to TensorBoard and Weights & Biases during a run."""

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
"""Name of the x axis in Weights & Biases."""

_PREFIX: Final = {"smoothness": "smoothness", "grad_norm": "gradient/norm", "saturation": "saturation"}


class Sink(Protocol):
    """The place that a writer writes numbers and figures to."""

    def start(self, steps: int) -> None:
        """Called once before anything is written, with the number of optimizer steps taken so far."""
        ...

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the numbers of one optimizer step, by name."""
        ...

    def image(self, step: int, name: str, pixels: Pixels) -> None:
        """Writes a figure of shape (height, width, 4), 8-bit RGBA."""
        ...

    def close(self) -> None:
        """Writes the rest and closes."""
        ...


class TraceWriter:
    """Writes each row of a trace to a sink once, and a figure at the end.

    If the source is a probe, the writer follows it: it writes the rows of a step right before the next step, or on
    closing. If the source is a trace, ``update`` writes the rows that have come since the last time. Each optimizer
    step writes the following, here for an estimator called ``local``:

    * ``smoothness/local`` [f/x^2], ``gradient/norm/local`` [f/x] and ``saturation/local``; for a parameter group,
      ``smoothness/local/GROUP`` and so on. Only rows that fits may use and only finite numbers are written;
    * ``status/ok`` and the like: how many rows so far have this status;
    * ``clipping/longest_step`` [x], ``clipping/threshold`` [f/x] and ``clipping/clip_fraction`` of AutoClip, once the
      rows of this step are known;
    * ``smoothness/figure`` on closing: `plot_smoothness` of the whole trace.

    Things to know:
        * Steps that are not measured cost one comparison of two numbers.
        * Rows that the probe already holds before its first step under the writer are not written. They come from a
          resumed run and are in the log already. To write them, pass the trace instead and call ``update``.
        * Under data parallelism only the first rank writes. Make the writer after the process group.
        * If writing fails, one warning says so and the run continues without the writer.

    Args:
        source: The probe to follow, or a trace.
        sink: Makes the sink to write to; called only on the first rank.
        autoclip: The AutoClip whose state to write with the rows.

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
        self._num_read = -1  # unknown before the first step: a resumed trace may still be loaded
        self._counts: Counter[str] = Counter()
        self._handle: RemovableHandle | None = None
        if self._probe is not None and self._sink is not None:
            # Before a step, AutoClip has already read the rows of the last step, so reading its state changes nothing.
            self._handle = self._probe.optimizer.register_step_pre_hook(self._before_step)

    def update(self) -> None:
        """Writes the rows that the trace has recorded since the last time."""
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
        """Writes the remaining rows and the figure, and removes the hook; a second call does nothing."""
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
            warnings.warn(f"The log gets no figure, because it could not be drawn: {error}", SmoothdiagWarning)
            return
        sink.image(self._trace[-1]["step"], "smoothness/figure", np.asarray(canvas.buffer_rgba()))

    def _give_up(self, error: Exception) -> None:
        self._sink = None
        if self._handle is not None:
            self._handle.remove()
        warnings.warn(
            f"Logging has stopped: {error!r}. Training continues, and the trace has all rows.", SmoothdiagWarning
        )


class TensorBoardWriter(TraceWriter):
    """Writes a probe's rows to TensorBoard; `TraceWriter` lists the names.

    ::

        with TensorBoardWriter(probe, "runs/1"):
            train()

    Args:
        source: The probe to follow, or a trace.
        log_dir: Folder to write to, or a SummaryWriter. In a folder, a resumed run hides the earlier values of steps
            that it takes again. A SummaryWriter stays open and hides nothing.
        autoclip: The AutoClip whose state to write with the rows.

    Raises:
        ImportError: If TensorBoard is not installed.
        ValueError: If ``source`` is neither a probe nor a trace.
    """

    def __init__(
        self, source: Probe | Trace, log_dir: str | Path | SummaryWriter, *, autoclip: AutoClip | None = None
    ) -> None:
        super().__init__(source, lambda: _TensorBoard(log_dir), autoclip=autoclip)


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

    Args:
        source: The probe to follow, or a trace.
        run: Run to write to, which stays open; default: the active run, else a new run that is finished on closing.
        autoclip: The AutoClip whose state to write with the rows.
        **init: Arguments of ``wandb.init`` for a new run.

    Raises:
        ImportError: If wandb is not installed.
        ValueError: If ``source`` is neither a probe nor a trace, or ``init`` is given and no run is made.
    """

    def __init__(
        self, source: Probe | Trace, run: Any = None, *, autoclip: AutoClip | None = None, **init: Any
    ) -> None:
        super().__init__(source, lambda: _Wandb(run, init), autoclip=autoclip)


class _TensorBoard:
    """A folder of event files, or the user's SummaryWriter."""

    def __init__(self, log_dir: str | Path | SummaryWriter) -> None:
        with installed_by("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        self._make, self._folder = SummaryWriter, ""
        self._writer: Any = None  # its methods have no types
        if isinstance(log_dir, SummaryWriter):
            self._writer = log_dir
        else:
            Path(log_dir).mkdir(parents=True, exist_ok=True)  # an impossible folder is an error at once
            self._folder = str(log_dir)

    def start(self, steps: int) -> None:
        if self._writer is None:
            self._writer = self._make(self._folder, purge_step=steps or None)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # so that a killed run keeps them

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
                f"Parameter `init` should be empty if there is a run already. Found {', '.join(init)}. "
                "Pass these arguments to the `wandb.init` that makes the run."
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
