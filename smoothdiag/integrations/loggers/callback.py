"""Any other logger, by its functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from smoothdiag.integrations.loggers.sink import Pixels
from smoothdiag.integrations.loggers.writer import TraceWriter
from smoothdiag.measure.probe import Probe
from smoothdiag.trace import Trace

if TYPE_CHECKING:
    from smoothdiag.autoclip import AutoClip


class CallbackWriter(TraceWriter):
    """Writes a probe's rows by a function that logs numbers; `TraceWriter` lists the names.

    ::

        with CallbackWriter(probe, accelerator.log):  # or fabric.log_dict, or the log_metrics of a Lightning logger
            train()

    Args:
        source: The probe to follow, or a trace.
        log: Logs the numbers of one optimizer step. It is called as ``log(values, step=step)`` with a dictionary of
            finite floats.
        autoclip: The AutoClip whose state to write with the rows.
        log_text: Logs the verdict, called as ``log_text(name, text, step=step)``; default: only its numbers are logged.
        log_image: Logs a figure, called as ``log_image(name, pixels, step=step)`` with an array of shape
            (height, width, 4), 8-bit RGBA; default: figures are left out.

    Raises:
        ValueError: If ``source`` is neither a probe nor a trace, or a function cannot be called.
    """

    def __init__(
        self,
        source: Probe | Trace,
        log: Callable[..., object],
        *,
        autoclip: AutoClip | None = None,
        log_text: Callable[..., object] | None = None,
        log_image: Callable[..., object] | None = None,
    ) -> None:
        for name, value in (("log", log), ("log_text", log_text), ("log_image", log_image)):
            if not callable(value) and (value is not None or name == "log"):
                raise ValueError(f"Parameter `{name}` should be a function. Found `{name} = {value!r}`.")
        super().__init__(source, lambda: _Callback(log, log_text, log_image), autoclip=autoclip)


class _Callback:
    """Functions of the user."""

    def __init__(
        self,
        log: Callable[..., object],
        log_text: Callable[..., object] | None,
        log_image: Callable[..., object] | None,
    ) -> None:
        self._log, self._log_text, self._log_image = log, log_text, log_image

    def start(self, steps: int) -> None:
        """There is nothing to prepare."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._log(dict(values), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        if self._log_text is not None:
            self._log_text(name, text, step=step)

    def image(self, step: int, name: str, pixels: Pixels) -> None:
        if self._log_image is not None:
            self._log_image(name, pixels, step=step)

    def close(self) -> None:
        """The user closes their logger."""
