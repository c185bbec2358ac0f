"""MLflow: a run in its tracking store."""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from smoothdiag.integrations.loggers.sink import Pixels, check_new, is_failing
from smoothdiag.integrations.loggers.writer import TraceWriter
from smoothdiag.measure.probe import Probe
from smoothdiag.requirements import installed_by
from smoothdiag.trace import Trace

if TYPE_CHECKING:
    from smoothdiag.autoclip import AutoClip

LONGEST_NAME: Final = 250
"""Characters that MLflow allows in the name of a metric (mlflow.utils.validation, MAX_ENTITY_KEY_LENGTH)."""


class MlflowWriter(TraceWriter):
    """Writes a probe's rows to a run of MLflow; `TraceWriter` lists the names.

    ::

        mlflow.set_tracking_uri("sqlite:///mlflow.db")
        with MlflowWriter(probe):
            train()

    Things to know:
        * The step of every metric is the optimizer step. The verdict is a tag, and figures are artifacts.
        * All slashes after the first become dots, as in ``smoothness/local.head``: in a file store each name is a path,
          and a metric cannot be a folder too. Characters that MLflow does not allow become underscores.
        * If a resumed run takes steps again, MLflow keeps both values.
        * If a ``with`` block ends by an exception, a run that the writer made counts as failed.

    Args:
        source: The probe to follow, or a trace.
        run: Run to write to, or its id; it stays open. Default: the active run, else a new run that ends on closing.
        autoclip: The AutoClip whose state to write with the rows.
        **start: Arguments of ``mlflow.start_run`` for a new run; ``run_id`` resumes a run.

    Raises:
        ImportError: If MLflow is not installed.
        ValueError: If ``source`` is neither a probe nor a trace, or ``start`` is given and no run is made.
    """

    def __init__(
        self, source: Probe | Trace, run: Any = None, *, autoclip: AutoClip | None = None, **start: Any
    ) -> None:
        super().__init__(source, lambda: _Mlflow(run, start), autoclip=autoclip)


class _Mlflow:
    """A run of MLflow, addressed by its id: the active run may change, and every thread has its own."""

    def __init__(self, run: Any, start: Mapping[str, Any]) -> None:
        with installed_by("mlflow"):
            self._mlflow: Any = importlib.import_module("mlflow")
        active = self._mlflow.active_run()
        self._owns = run is None and active is None
        check_new("start", start, "mlflow.start_run", is_new=self._owns)
        if self._owns:
            run = self._mlflow.start_run(**start)
        run = active if run is None else run
        self._id: str = run if isinstance(run, str) else run.info.run_id
        self._client: Any = self._mlflow.MlflowClient()
        self._names: dict[str, str] = {}  # by the names in MLflow

    def start(self, steps: int) -> None:
        """There is nothing to prepare."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metric = self._mlflow.entities.Metric
        self._client.log_batch(self._id, [metric(self._legal(name), x, now, step) for name, x in values.items()])

    def text(self, step: int, name: str, text: str) -> None:
        self._client.set_tag(self._id, name, text)

    def image(self, step: int, name: str, pixels: Pixels) -> None:
        self._client.log_image(self._id, pixels, artifact_file=f"{name}.png")

    def close(self) -> None:
        if not self._owns:
            return
        status = "FAILED" if is_failing() else "FINISHED"
        active = self._mlflow.active_run()
        if active is not None and active.info.run_id == self._id:
            self._mlflow.end_run(status)
        else:
            self._client.set_terminated(self._id, status)

    def _legal(self, name: str) -> str:
        """Returns a name that MLflow allows, and that no other name has."""
        first, _, rest = name.partition("/")
        legal = stem = re.sub(r"[^\w\-. :/]", "_", f"{first}/{rest.replace('/', '.')}")[:LONGEST_NAME]
        number = 1
        while self._names.setdefault(legal, name) != name:
            number += 1
            legal = f"{stem[: LONGEST_NAME - 6]}_{number}"
        return legal
