"""Hugging Face: a callback that measures smoothness, and clips on request, in a `transformers.Trainer`."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smoothdiag.adapters import stepping
from smoothdiag.integrations.attached import NO_CLIPPING, Attached
from smoothdiag.integrations.latest import Latest
from smoothdiag.integrations.losses import Call, loss_of
from smoothdiag.measure.estimators import Estimator, LocalSmoothness, PathSmoothness
from smoothdiag.measure.loss.bookkeeping import Books
from smoothdiag.measure.loss.factors import Factor
from smoothdiag.measure.probe import Probe
from smoothdiag.measure.probe.data import Kind
from smoothdiag.measure.probe.schedule import Schedule
from smoothdiag.requirements import installed_by
from smoothdiag.rows import SmoothdiagWarning
from smoothdiag.spikes import SpikeGuard
from smoothdiag.trace import Trace

with installed_by("hf"):
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

STATE_FILE = "smoothdiag.json"
"""File in a checkpoint with the state of probe and AutoClip."""

TRACE_FILE = "smoothdiag.jsonl"
"""Default name of the trace, in the output directory of the Trainer."""


class SmoothnessCallback(Attached, TrainerCallback):
    """Measures smoothness in a `transformers.Trainer`; without clipping, training stays the same bit for bit.

    ::

        SmoothnessCallback().bind(trainer)  # before trainer.train()

    While training runs, the callback keeps a `Probe` on the optimizer and shows the probe the arguments of every
    ``trainer.compute_loss``. To measure, the probe calls ``compute_loss`` again. The latest measurements are added to
    the Trainer's logs, as ``smoothdiag/grad_norm``, ``smoothdiag/local_smoothness`` and so on. Checkpoints hold the
    state of probe and AutoClip, so training and AutoClip continue exactly; see ``data`` for what is measured then.

    Args:
        estimators: What to measure at each due step.
        schedule: Which optimizer steps to measure; default: every 20th.
        trace: A Trace, or a path to write one to; default: ``smoothdiag.jsonl`` in ``args.output_dir``.
        group_by: Function from a parameter name to the label of its group; each group gets rows of its own.
        auto_clip: Whether an `AutoClip` keeps steps short, or a mapping with its options. AutoClip takes the place of
            ``args.max_grad_norm``, which is `NO_CLIPPING` as long as training runs, unless its mode is "shadow".
        data: ``"fixed"`` measures on the micro-batches of the first measured step, ``"step"`` on each step's own; see
            `Probe`. A resumed run keeps the micro-batches of its own first measured step.
        report: Page to write at the end of training, such as ``"report.html"``; see `write_report`. A page that cannot
            be written costs a warning, and nothing else.
        spikes: Whether a `SpikeGuard` watches every step, or a mapping with its options. It sees losses and the
            gradient norms from before clipping; ``callback.guard`` has its events.

    Raises:
        ValueError: If ``auto_clip`` or ``spikes`` is neither a bool nor a mapping. `Probe` and `AutoClip` check the
            other arguments when training begins.

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
        trace: Trace | str | Path | None = None,
        group_by: Callable[[str], str] | None = None,
        auto_clip: bool | Mapping[str, Any] = False,
        data: Kind = "fixed",
        report: str | Path | None = None,
        spikes: bool | Mapping[str, Any] = False,
    ) -> None:
        super().__init__(estimators, schedule, group_by, auto_clip, data, report, spikes)
        self._trace = trace
        self._bound: _Bound | None = None
        self._checkpoint: str | None = None
        self._num_losses = 0
        self._is_replaying = False

    def bind(self, trainer: Trainer) -> "SmoothnessCallback":
        """Attaches to a trainer, before it trains, and returns the callback itself.

        Raises:
            ValueError: If ``trainer`` is no `transformers.Trainer`, or if it or this callback is bound already.
        """
        if not isinstance(trainer, Trainer):
            raise ValueError(
                f"Parameter `trainer` should be a transformers.Trainer. Found {type(trainer).__name__}. "
                "In other loops, use smoothdiag.Probe."
            )
        if self._bound is not None:
            raise ValueError(
                "Parameter `trainer` should get a callback of its own. Found a callback that is bound to a trainer "
                "already: make a new SmoothnessCallback."
            )
        if isinstance(getattr(trainer.compute_loss, "__self__", None), SmoothnessCallback):
            raise ValueError(
                "Parameter `trainer` should have one SmoothnessCallback. Found another one bound to it already. Give "
                "that callback all estimators, or make a new trainer."
            )
        if trainer.state.global_step:
            warnings.warn(
                f"The trainer has trained already ({trainer.state.global_step} steps), and SmoothnessCallback saw "
                "nothing of it: `probe` and `clipper` are None. Call bind(trainer) before trainer.train().",
                SmoothdiagWarning,
            )
        self._bound = _Bound(trainer, trainer.compute_loss, trainer.train, trainer.log)
        # Attributes of the instance come before its methods, so subclasses may override the methods in any way.
        vars(trainer).update(compute_loss=self._compute_loss, train=self._train, log=self._log)
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attaches to the optimizer."""
        if self._bound is None:
            raise RuntimeError("SmoothnessCallback needs its trainer. Call callback.bind(trainer) before training.")
        trainer = self._bound.trainer
        self._release()  # training may begin again, with smaller batches, after memory ran out
        trace = Path(args.output_dir or ".") / TRACE_FILE if self._trace is None else self._trace
        optimizer = _unwrapped(trainer)
        self.probe = Probe(
            trainer.model_wrapped, optimizer, self._replay, trace=trace, reduction="sum", **self._options
        )
        self._undo.append(self.probe.close)
        self._num_losses = 0
        stored = self._stored(state.global_step) if state.global_step else {}
        if stored:
            self.probe.load_state_dict(stored["probe"])
        self._attach_guard(optimizer, self.probe, stored.get("guard"))
        if self.guard is not None:
            accelerator = trainer.accelerator
            vars(accelerator)["clip_grad_norm_"] = partial(_shown, accelerator.clip_grad_norm_, self.guard)
            self._undo.append(partial(vars(accelerator).pop, "clip_grad_norm_", None))
        self._attach_clipper(optimizer, self.probe, stored.get("clipper"))
        if self._takes_over("max_grad_norm", args.max_grad_norm, "TrainingArguments(max_grad_norm=1e30)"):
            self._undo.append(partial(setattr, args, "max_grad_norm", args.max_grad_norm))
            args.max_grad_norm = NO_CLIPPING
        self._latest = Latest(self.probe.trace, self.clipper)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Makes sure that the trainer computes its loss by ``compute_loss``."""
        if self._num_losses == 0 and self._bound is not None:
            raise RuntimeError(
                "SmoothnessCallback needs a trainer whose training_step computes the loss by self.compute_loss(model, "
                "inputs), because the callback calls that method again to measure. Found a step without that call in "
                f"{type(self._bound.trainer).__name__}. Override compute_loss instead of training_step, or leave the "
                "callback out."
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adds the state of probe and AutoClip to the checkpoint."""
        folder = Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        # A search for hyperparameters puts its checkpoints elsewhere; nobody resumes those.
        if self.probe is not None and args.should_save and folder.is_dir():
            clipper = None if self.clipper is None else self.clipper.state_dict()
            guard = None if self.guard is None else self.guard.state_dict()
            stored = {"probe": self.probe.state_dict(), "clipper": clipper, "guard": guard}
            # Another name at first: if the run is killed here, nobody takes the half-written file for a state.
            begun = folder / f"{STATE_FILE}.tmp"
            begun.write_text(json.dumps(stored), encoding="utf-8")
            begun.replace(folder / STATE_FILE)

    def _stored(self, global_step: int) -> dict[str, Any]:
        """Returns the states in the checkpoint that training resumes from, after ``global_step`` steps."""
        path = None if self._checkpoint is None else Path(self._checkpoint) / STATE_FILE
        if path is not None and path.is_file():
            try:
                stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
                _ = stored["probe"]["steps"], stored["clipper"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"File `{path}` should hold the state of a SmoothnessCallback. Found that it cannot be read "
                    f"({error!r}). Delete the file to measure, and to calibrate AutoClip, from this checkpoint on."
                ) from error
            return stored
        warnings.warn(
            f"Checkpoint `{self._checkpoint}` has no {STATE_FILE}, as if saved without a SmoothnessCallback. Measuring "
            f"begins at step {global_step}, without what the run had measured before.",
            SmoothdiagWarning,
        )
        return {"probe": {"steps": global_step, "next": None}}

    def _train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        assert self._bound is not None
        trainer = self._bound.trainer
        if resume_from_checkpoint is True:
            self._checkpoint = get_last_checkpoint(trainer.args.output_dir)  # type: ignore[no-untyped-call]
        else:
            self._checkpoint = resume_from_checkpoint or None
        try:
            found = self._bound.train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._release()
        self._write_report()
        return found

    def _log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        assert self._bound is not None
        if self._is_replaying:
            return
        if self._latest is not None and "loss" in logs:  # only logs of training steps
            logs = logs | self._latest.metrics() | self._latest.clipping() | self._latest.worst()
        self._bound.log(logs, *args, **kwargs)

    def _compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Computes the loss as the trainer would, and shows the probe the arguments."""
        assert self._bound is not None
        if self.probe is None or not torch.is_grad_enabled():  # as in evaluation
            return self._bound.compute_loss(model, inputs, *args, **kwargs)
        self._num_losses += 1
        factor = Factor(getattr(self._bound.trainer.accelerator, "scaler", None))
        books = Books(self._bound.trainer) if self.probe.due or self.guard is not None else None
        self.probe.observe(Call(inputs, args, kwargs, books, factor, self.probe.steps))
        found = self._bound.compute_loss(model, inputs, *args, **kwargs)
        factor.watch(loss_of(found))
        if self.guard is not None:
            self.guard.observe(loss_of(found).detach().mean())
        return found

    def _replay(self, model: nn.Module, call: Call) -> Tensor:
        """Computes the loss of a micro-batch again, and returns its share in the loss of the step."""
        assert self._bound is not None
        assert call.books is not None
        assert self.probe is not None
        # Fixed micro-batches of an earlier step are measured as the trainer is now.
        books = call.books if call.step == self.probe.steps else Books(self._bound.trainer)
        self._is_replaying = True
        try:
            with books.reopened(), self._bound.trainer.compute_loss_context_manager():
                loss = loss_of(self._bound.compute_loss(model, call.inputs, *call.args, **call.kwargs))
        finally:
            self._is_replaying = False
        return (loss * call.factor.value).sum()


@dataclass(frozen=True)
class _Bound:
    """A trainer, and its own methods that the callback replaces."""

    trainer: Trainer
    compute_loss: Callable[..., Any]
    train: Callable[..., Any]
    log: Callable[..., None]


def _shown(clip: Callable[..., Any], guard: SpikeGuard, *args: Any, **kwargs: Any) -> Any:
    """Clips as the trainer would, and shows the guard the norm from before."""
    norm = clip(*args, **kwargs)
    if norm is not None:
        guard.observe(grad_norm=norm)
    return norm


def _unwrapped(trainer: Trainer) -> torch.optim.Optimizer:
    """Returns the optimizer of a trainer whose hooks are called when it steps; a `Joint` for a container of several.

    Raises:
        ValueError: If no torch optimizer takes the steps.
    """
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "Parameter `trainer` should not use DeepSpeed: its engine takes the steps, and no hook sees them."
        )
    return stepping(trainer.optimizer)
