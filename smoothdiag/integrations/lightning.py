"""Lightning: a callback that measures smoothness, and clips on request, under a `lightning.pytorch.Trainer`."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from smoothdiag.adapters import stepping
from smoothdiag.autoclip.buckets import gradient_norm
from smoothdiag.integrations.attached import Attached
from smoothdiag.integrations.latest import Latest
from smoothdiag.integrations.training_step import TrainingSteps, check_run
from smoothdiag.measure.estimators import Estimator, LocalSmoothness, PathSmoothness
from smoothdiag.measure.probe import Probe
from smoothdiag.measure.probe.data import Kind
from smoothdiag.measure.probe.schedule import Schedule
from smoothdiag.requirements import installed_by
from smoothdiag.rows import SmoothdiagWarning

with installed_by("lightning"):
    try:
        from lightning.pytorch import Callback
    except ImportError:  # the same code under its older name
        from pytorch_lightning import Callback  # type: ignore[assignment]


class SmoothnessCallback(Attached, Callback):
    """Measures smoothness under a Lightning Trainer; without clipping, training stays the same bit for bit.

    ::

        trainer = Trainer(callbacks=[SmoothnessCallback()])

    While training runs, the callback keeps a `Probe` on the optimizer and shows the probe the arguments of every
    ``training_step``. To measure, the probe calls ``training_step`` again, with ``self.log`` silent and metrics put
    back. The measurements go to the trainer's loggers, as ``smoothdiag/grad_norm``, ``smoothdiag/local_smoothness`` and
    so on. Checkpoints hold the state of probe and AutoClip, so training and AutoClip continue exactly; see
    ``data`` for what is measured then.

    Args:
        estimators: What to measure at each due step.
        schedule: Which optimizer steps to measure; default: every 20th.
        trace: A path to write the trace to; default: rows stay in memory and become part of checkpoints.
        group_by: Function from a parameter name to the label of its group; each group gets rows of its own.
        auto_clip: Whether an `AutoClip` keeps steps short, or a mapping with its options. AutoClip takes the place of
            ``gradient_clip_val``, which is None as long as training runs, unless its mode is "shadow".
        data: ``"fixed"`` measures on the micro-batches of the first measured step, ``"step"`` on each step's own; see
            `Probe`. A resumed run keeps the micro-batches of its own first measured step.
        report: Page to write at the end of training, such as ``"report.html"``; see `write_report`. A page that cannot
            be written costs a warning, and nothing else.
        spikes: Whether a `SpikeGuard` watches every step, or a mapping with its options. It sees losses and the
            gradient norms from before clipping; ``callback.guard`` has its events.
        progress_bar: Whether the progress bar shows the latest smoothness, and AutoClip's longest step and threshold.

    Raises:
        ValueError: If ``auto_clip`` or ``spikes`` is neither a bool nor a mapping. When training begins: if
            optimization is manual, if the strategy is neither one device nor DDP, or if `Probe` or `AutoClip` refuses
            its arguments.

    Attributes:
        probe: The probe of the latest run; None before training.
        clipper: The AutoClip of the latest run, if there is one.
        guard: The SpikeGuard of the latest run, if there is one.

    Units: grad_norm and threshold [f/x], smoothness [f/x^2], longest_step [x].
    """

    def __init__(
        self,
        *,
        estimators: Sequence[Estimator] = (PathSmoothness(), LocalSmoothness()),
        schedule: Schedule | None = None,
        trace: str | Path | None = None,
        group_by: Callable[[str], str] | None = None,
        auto_clip: bool | Mapping[str, Any] = False,
        data: Kind = "fixed",
        report: str | Path | None = None,
        spikes: bool | Mapping[str, Any] = False,
        progress_bar: bool = True,
    ) -> None:
        super().__init__(estimators, schedule, group_by, auto_clip, data, report, spikes)
        self._path, self._progress_bar = trace, progress_bar
        self._stored: Mapping[str, Any] = {}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forgets an earlier run and its checkpoint; Lightning loads the checkpoint of the new run after this."""
        if stage == "fit":
            self._stored, self.probe, self.clipper, self.guard, self._latest = {}, None, None, None, None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuses runs that cannot be measured, before they begin."""
        check_run(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attaches to the optimizer."""
        self._release()
        steps, optimizer = TrainingSteps(trainer, pl_module), trainer.optimizers[0]
        self.probe = Probe(
            trainer.strategy.model, optimizer, steps.loss, trace=self._path, reduction="sum", **self._options
        )
        self._undo = [steps.release, self.probe.close]
        self._resume(self.probe, trainer.global_step)
        self._attach_guard(optimizer, self.probe, self._stored.get("guard"))
        self._attach_clipper(optimizer, self.probe, self._stored.get("clipper"))
        clip_val = trainer.gradient_clip_val
        if self._takes_over("gradient_clip_val", clip_val, "Trainer(gradient_clip_val=None)"):
            self._undo.append(partial(setattr, trainer, "gradient_clip_val", clip_val))
            trainer.gradient_clip_val = None
        self._latest = Latest(self.probe.trace, self.clipper)
        steps.show(self.probe, self.guard)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Shows the gradient norm to the guard, before Lightning clips."""
        if self.guard is not None:
            self.guard.observe(grad_norm=gradient_norm(stepping(optimizer)))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Logs the measurements of the step."""
        assert self._latest is not None
        metrics = self._latest.metrics()
        assert self.probe is not None
        # Directly to the loggers: Lightning drops the logs of a module except at every n-th step.
        for logger in trainer.loggers:
            # Lightning counts skipped steps too, and the host may learn of a spike some steps later.
            for step, values in self._latest.notes.items():
                logger.log_metrics(values, step=trainer.global_step - self.probe.steps + step)
            if metrics:
                logger.log_metrics(metrics, step=trainer.global_step - 1)
        if self._progress_bar:
            for name in ("local_smoothness", "longest_step", "threshold"):
                if (value := metrics.get(f"smoothdiag/{name}")) is not None:
                    pl_module.log(name, value, prog_bar=True, logger=False, on_step=True, on_epoch=False)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Detaches from the optimizer, closes the file of the trace, and writes the report if one was asked for."""
        self._release()
        self._write_report()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Detaches from the optimizer and closes the file of the trace if a run ends early."""
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """Returns the state that a resumed run needs to continue exactly."""
        if self.probe is None:
            return dict(self._stored)
        return {
            "probe": self.probe.state_dict(),
            "clipper": None if self.clipper is None else self.clipper.state_dict(),
            "guard": None if self.guard is None else self.guard.state_dict(),
            "rows": list(self.probe.trace) if self._path is None else [],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state until there is an optimizer to attach to."""
        self._stored = state_dict

    def _resume(self, probe: Probe, global_step: int) -> None:
        """Loads the state of the probe if training resumes from a checkpoint."""
        if self._stored:
            probe.load_state_dict(self._stored["probe"])
            if self._path is None:
                probe.trace.extend(self._stored["rows"])
        elif global_step:
            probe.load_state_dict({"steps": global_step, "next": None})
            warnings.warn(
                "Training resumes from a checkpoint without a SmoothnessCallback in it. Measuring begins at step "
                f"{global_step}, without what the run had measured before.",
                SmoothdiagWarning,
            )
