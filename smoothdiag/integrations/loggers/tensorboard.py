"""TensorBoard: a folder of event files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoothdiag.integrations.loggers.sink import Pixels
from smoothdiag.integrations.loggers.writer import TraceWriter
from smoothdiag.measure.probe import Probe
from smoothdiag.requirements import installed_by
from smoothdiag.trace import Trace

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from smoothdiag.autoclip import AutoClip


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

    def text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, text, step)

    def image(self, step: int, name: str, pixels: Pixels) -> None:
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        if self._folder and self._writer is not None:
            self._writer.close()
