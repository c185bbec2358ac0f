"""TraceWriter: follows a probe and writes its rows, AutoClip's state and the verdict so far to a sink."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final, Self

import torch.distributed as dist

from smoothdiag.adapters.turns import Turn
from smoothdiag.integrations.latest import CLIPPING, noted
from smoothdiag.integrations.loggers.figures import pixels_of
from smoothdiag.integrations.loggers.sink import Sink
from smoothdiag.integrations.loggers.verdicts import Verdicts
from smoothdiag.measure.loss.batches import RandomState
from smoothdiag.measure.probe import Probe
from smoothdiag.rows import CLIP_SUFFIX, NOTES, SPIKE, USABLE_STATUSES, SmoothdiagWarning
from smoothdiag.trace import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from smoothdiag.autoclip import AutoClip

Rows = Sequence[Mapping[str, Any]]

_PREFIX: Final = {"smoothness": "smoothness", "grad_norm": "gradient/norm", "saturation": "saturation"}


class TraceWriter:
    """Writes each row of a trace to a sink once, the verdict so far now and then, and figures at the end.

    If the source is a probe, the writer follows it: it writes the rows of a step right before the next step, or on
    closing. If the source is a trace, ``update`` writes the rows that have come since the last time. Each optimizer
    step writes the following, here for an estimator called ``local``:

    * ``smoothness/local`` [f/x^2], ``gradient/norm/local`` [f/x] and ``saturation/local``; for a parameter group,
      ``smoothness/local/GROUP`` and so on. Only rows that fits may use and only finite numbers are written;
    * ``status/ok`` and the like: how many rows so far have this status;
    * ``clipping/longest_step`` [x], ``clipping/threshold`` [f/x] and ``clipping/clip_fraction`` of AutoClip, once the
      rows of this step are known;
    * if a SpikeGuard watches the run: at steps that spike, ``spike/signals``, how many signals spiked;
      ``spike/grad_norm`` and the like, their values; ``spike/grad_norm_deviations``, how far above what is usual;
      ``spike/explanation``, the latest one in words, if the sink takes text; on closing ``spike/figure``;
    * with an AutoClip in shadow mode ``clipping/benefit`` and ``clipping/benefit_held_out`` [f] at the steps that it
      judged, see `AutoClip.benefits`;
    * after 64, 128, 256, ... measured steps, and on closing, the verdict of `fit_smoothness`:
      ``fit/verdict/L0L1`` and the like, 1 for the present verdict and 0 for the others, ``fit/verdict`` with the reason
      if the sink takes text, and ``fit/L0`` [f/x^2] and ``fit/L1`` [1/x] if the verdict allows their use;
    * on closing ``smoothness/figure``, `plot_smoothness` of the whole trace with the fit, and ``clipping/figure``,
      `plot_clipping`.

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
        with _same_draws():
            self._sink = None if is_later_rank else sink()
        self._has_failed = False
        self._num_read = -1  # unknown before the first step: a resumed trace may still be loaded
        self._num_measured = 0
        self._counts: Counter[str] = Counter()
        self._verdicts = Verdicts(self._trace)
        self._turn: Turn | None = None
        if self._probe is not None and self._sink is not None:
            # Before a step, AutoClip has already read the rows of the last step, so reading its state changes nothing.
            self._turn = Turn(self._probe.optimizer, self._before_step)

    def update(self) -> None:
        """Writes the rows that the trace has recorded since the last time."""
        if self._sink is not None and not self._has_failed:
            self._guarded(self._write_new, self._sink)

    def close(self) -> None:
        """Writes the remaining rows, the verdict and the figures, and removes the hook; a second call does nothing."""
        self.update()
        sink, self._sink = self._sink, None
        if self._turn is not None:
            self._turn.stop()
        if sink is None:
            return
        if len(self._trace) and not self._has_failed:
            self._guarded(self._conclude, sink)
        self._guarded(_close, sink)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _before_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._num_read != len(self._trace):
            self.update()

    def _write_new(self, sink: Sink) -> None:
        if self._num_read < 0:
            self._begin(sink)
        rows = [self._trace[i] for i in range(self._num_read, len(self._trace))]
        self._num_read = len(self._trace)
        for step, found in groupby(rows, key=itemgetter("step")):
            values = self._scalars(together := list(found))
            for row in together:
                if row["estimator"] == SPIKE and isinstance(said := row.get("explanation"), str):
                    sink.text(step, "spike/explanation", f"step {step}: {row['cause']}. {said}")
            if step == rows[-1]["step"]:
                if self._autoclip is not None:
                    values |= {f"clipping/{name}": getattr(self._autoclip, name) for name in CLIPPING}
                values |= self._judge(sink, step)
            _write(sink, step, values)

    def _begin(self, sink: Sink) -> None:
        """Passes over the rows that an earlier process has written."""
        sink.start(0 if self._probe is None else self._probe.steps)
        self._num_read = 0 if self._probe is None else len(self._trace)
        earlier = [self._trace[i] for i in range(self._num_read)]
        self._num_measured = sum(_is_measured(list(rows)) for _, rows in groupby(earlier, key=itemgetter("step")))
        self._verdicts.passed_over(self._num_measured)

    def _scalars(self, rows: Rows) -> dict[str, float]:
        """Returns the numbers of one step by name."""
        self._num_measured += _is_measured(rows)
        found: dict[str, float] = {}
        for row in rows:
            self._counts[row["status"]] += 1
            found[f"status/{row['status']}"] = self._counts[row["status"]]
            found |= noted(row)
            if row["status"] not in USABLE_STATUSES:
                continue
            group = "" if row["group"] == "all" else f"/{row['group']}"
            found |= {f"{prefix}/{row['estimator']}{group}": row[column] for column, prefix in _PREFIX.items()}
        return found

    def _judge(self, sink: Sink, step: int, *, is_last: bool = False) -> dict[str, float]:
        """Writes the verdict in words if one is due, and returns its numbers."""
        if not self._verdicts.update(self._num_measured, is_last=is_last):
            return {}
        sink.text(step, "fit/verdict", self._verdicts.text())
        return self._verdicts.scalars()

    def _conclude(self, sink: Sink) -> None:
        """Writes the last verdict and the figures."""
        from smoothdiag.plots import plot_clipping, plot_smoothness, plot_spikes

        step, clipper = self._trace[-1]["step"], self._autoclip
        _write(sink, step, self._judge(sink, step, is_last=True))
        fit = self._verdicts.fit
        plots: dict[str, Callable[[Axes], object]] = {}
        if any(row["estimator"] not in NOTES for row in self._trace):
            plots["smoothness/figure"] = lambda ax: plot_smoothness(self._trace, fit=fit, ax=ax)
        if clipper is not None and any(row["estimator"].endswith(CLIP_SUFFIX) for row in clipper.trace):
            plots["clipping/figure"] = lambda ax: plot_clipping(clipper, ax=ax)
        spiked = Counter(name for row in self._trace if row["estimator"] == SPIKE for name in row["spiked"].split())
        if spiked:
            signal = "loss" if "loss" in spiked else spiked.most_common(1)[0][0]
            plots["spike/figure"] = lambda ax: plot_spikes(self._trace, signal=signal, ax=ax)
        for name, plot in plots.items():
            if (pixels := pixels_of(plot)) is not None:
                sink.image(step, name, pixels)

    def _guarded(self, action: Callable[[Sink], None], sink: Sink) -> None:
        """Runs an action on the sink. If it fails, the writer gives up with one warning, and the run goes on."""
        try:
            with _same_draws():
                action(sink)
        except Exception as error:
            if self._turn is not None:
                self._turn.stop()
            has_warned, self._has_failed = self._has_failed, True
            if not has_warned:
                message = f"Logging has stopped: {error!r}. Training continues, and the trace has all rows."
                warnings.warn(message, SmoothdiagWarning)


@contextmanager
def _same_draws() -> Iterator[None]:
    """Leaves the random states as they were. MLflow, for one, draws the name of a run from Python's generator."""
    before = RandomState.capture()
    try:
        yield
    finally:
        before.restore()


def _write(sink: Sink, step: int, values: Mapping[str, float]) -> None:
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    if finite:
        sink.scalars(step, finite)


def _is_measured(rows: Rows) -> bool:
    """Whether a step has a row that fits may use; rows that AutoClip asked for serve the clipping alone."""
    return any(
        row["group"] == "all" and row["status"] in USABLE_STATUSES and not row["estimator"].endswith(CLIP_SUFFIX)
        for row in rows
    )


def _close(sink: Sink) -> None:
    sink.close()
