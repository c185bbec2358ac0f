"""Probe: watches a training loop and measures at chosen optimizer steps."""

import sys
import time
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from smoothdiag import vectors
from smoothdiag.measure.accumulation import UNSEEN, Accumulation, Beginning
from smoothdiag.measure.arguments import Outermost, Shown, check_arguments
from smoothdiag.measure.batches import held_out, widened
from smoothdiag.measure.closures import Arguments, after_closure
from smoothdiag.measure.coordinates import common, coordinates, is_distributed, learning_rates, parameter_groups
from smoothdiag.measure.estimators import Estimator, LocalSmoothness, PathSmoothness, Status, Step
from smoothdiag.measure.objective import Evaluation, LossFn, Objective, Reduction
from smoothdiag.measure.preconditioner import preconditioner
from smoothdiag.measure.recording import failed_row, rows_of
from smoothdiag.measure.schedule import Adaptive, Schedule, Stopwatch, every
from smoothdiag.measure.selftest import NOT_REPRODUCED, RETEST_EVERY, SelfTest, is_same, self_test
from smoothdiag.measure.stability import stability_limit
from smoothdiag.measure.watched import Watched
from smoothdiag.rows import SmoothdiagWarning
from smoothdiag.trace import Trace
from smoothdiag.vectors import Vector

T = TypeVar("T")


class Probe(Shown):
    """Measures local smoothness beside the gradient norm, without changing the run by one bit.

    The probe takes hold of the optimizer by its step hooks. On the steps that ``schedule`` names it keeps the
    batches, the random states they were met with and the parameters before and after the step; then it
    evaluates the loss again on the same data, and puts everything back.

    Args:
        model: The model being trained.
        optimizer: Its optimizer; the coordinates x are the trainable parameters that it holds.
        loss_fn: ``loss_fn(model, batch)`` returns the scalar loss of one micro-batch, as the loop computes it.
        estimators: What to measure at each due step; ``()`` measures only what ``also`` or an AutoClip asks for.
        schedule: Which optimizer steps to measure.
        probe_batches: Held-out batches to measure on instead of the step's own.
        trace: A Trace, or a path to write one to; default: rows in memory.
        group_by: Parameter name -> label of its group; each group gets rows of its own beside "all".
        reduction: How the micro-batch losses of one step add up in the loop: ``"mean"`` or ``"sum"``.
        seed: Seed of the random states that held-out batches are evaluated with.

    Raises:
        ValueError: If the optimizer holds no trainable parameter of the model, or an argument is out of range.

    Attributes:
        optimizer: The optimizer it holds on to.
        estimators: What it measures.
        trace: What was recorded; under data parallelism only the first rank writes to a path.
        further: What else it measures, with the schedules of that; see ``also``.
        steps: Optimizer steps so far; ``is_closed`` says whether more will count, ``due`` what measures the next one.
        self_test: What the first measured step showed about the loss; ``None`` before it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFn,
        *,
        estimators: Sequence[Estimator] = (PathSmoothness(), LocalSmoothness()),
        schedule: Schedule | None = None,
        probe_batches: Iterable[Any] | None = None,
        trace: Trace | str | Path | None = None,
        group_by: Callable[[str], str] | None = None,
        reduction: Reduction = "mean",
        seed: int = 0,
    ) -> None:
        check_arguments(model, optimizer, loss_fn, estimators, schedule, reduction)
        self._model, self.optimizer, self._loss_fn = model, optimizer, loss_fn
        self.estimators, self._reduction, self._group_by = tuple(estimators), reduction, group_by
        self._schedule = every(20) if schedule is None else schedule
        self._take_coordinates(coordinates(model, optimizer))
        self._distributed = is_distributed(model, self._parameters)
        self._held_out = None if probe_batches is None else held_out(probe_batches, seed, self._parameters)
        self._owns_trace = not isinstance(trace, Trace)
        if self._owns_trace and self._distributed and torch.distributed.get_rank() > 0:
            trace = None  # the rows are the same on every rank; the first one writes them
        meta = {"optimizer": type(optimizer).__name__, "model": type(model).__name__, "torch": torch.__version__}
        self.trace = trace if isinstance(trace, Trace) else Trace(trace, meta=meta)
        self.steps, self.is_closed = 0, False
        self.self_test: SelfTest | None = None
        self.further: list[tuple[Schedule, tuple[Estimator, ...]]] = []
        self.due: tuple[Estimator, ...] = self._estimators_due()
        self._begun: Beginning | None = None
        self._has_measured = False
        self._outermost = Outermost()
        self._warned: set[str] = set()
        self._num_untested = 0
        self._stopwatch = Stopwatch()
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def watch(self, loader: Iterable[T]) -> Watched[T]:
        """Returns an iterator over ``loader`` that shows every batch to the probe; ``len`` works if it did."""
        return Watched(self.observe, loader)

    def observe(self, batch: Any, *, weight: float | None = None) -> None:
        """Shows the probe one micro-batch, right before its forward pass.

        Args:
            batch: What ``loss_fn`` takes. It is kept by reference until the optimizer steps.
            weight: Weight of its loss in the step's loss; default: as ``reduction`` says.
        """
        self._stopwatch.start()
        if self.due and self._held_out is None:
            if not self._accumulation.has_observed:
                self._follow_changes()
            self._accumulation.add(batch, weight)

    def also(self, schedule: Schedule, *estimators: Estimator) -> None:
        """Measures with further estimators, at the steps that ``schedule`` names.

        Measurements come after whatever else has by now been hooked to the step. Called again with the same schedule
        it replaces the estimators of that. A probe that is closed stays so.
        """
        self.further = [(s, e) for s, e in self.further if s != schedule] + [(schedule, estimators)]
        if not self.is_closed:
            self.due = self._estimators_due()
            self._handles.pop().remove()
            self._handles.append(self.optimizer.register_step_post_hook(self._after_step))

    def close(self) -> None:
        """Detaches from the optimizer; closes the trace's file if the probe opened it."""
        for handle in self._handles:
            handle.remove()
        self._accumulation.clear()
        self.due, self.is_closed = (), True
        if self._owns_trace:
            self.trace.close()

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs to go on measuring at the same steps."""
        return {"steps": self.steps, "next": self._schedule.next if isinstance(self._schedule, Adaptive) else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from ``state``, as returned by ``state_dict``.

        A trace file of the probe's own is continued too: rows of steps that are going to be taken again stay in the
        file but no longer count.
        """
        self.steps = int(state["steps"])
        if isinstance(self._schedule, Adaptive) and state["next"] is not None:
            self._schedule.next = int(state["next"])
        self.due = self._estimators_due()
        if self._owns_trace:
            self.trace.resume(self.steps)

    def __enter__(self) -> "Probe":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Arguments | None:
        if not (self._outermost.enter(sys._getframe(1)) and self.due):
            return None
        self._begun = None  # the step before may have ended in an error
        if self._held_out is not None or not self._accumulation.has_observed:
            self._follow_changes()
        start = vectors.clone(self._parameters)
        # With a closure, the gradients of this step do not exist yet, nor perhaps its batches.
        changed = after_closure(args, kwargs, lambda: self._begin(start, by_closure=True))
        if changed is None:
            self._begin(start)
        return changed

    def _begin(self, start: Vector, *, by_closure: bool = False) -> None:
        """Takes up the step from ``start``, when its gradients are there."""
        lrs = learning_rates(self.optimizer, self._parameters)
        if self._held_out is not None:
            self._begun = Beginning(start, lrs)
        elif self._accumulation.has_observed:
            self._begun = self._accumulation.beginning(start, lrs, by_closure=by_closure)
        else:
            self._warn_once(UNSEEN)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self._outermost.leave(sys._getframe(1)):
            return
        self._stopwatch.steps += 1
        try:
            if self._begun is not None:
                self._measure(self._begun)
                self._has_measured = True
        except Exception as error:
            self._survive(error, "probe")
        finally:
            self._accumulation.clear()
            self._begun = None
            self.steps += 1
            self.due = self._estimators_due()

    def _measure(self, begun: Beginning) -> None:
        vectors.synchronize(begun.start)  # the time of the step is not ours
        began = time.perf_counter()
        batches = self._accumulation.micro_batches if self._held_out is None else self._held_out
        changed = self._accumulation.data_changed()
        self._accumulation.state.notice()
        self._accumulation.clear()  # its hooks must not see the backward passes to come
        if changed:
            self._warn_once(Status.DATA_CHANGED.value)
        objective = Objective(
            self._model,
            self._loss_fn,
            batches,
            self._parameters,
            state=self._accumulation.state,
            reduction=self._reduction,
            widen_half=True,
            distributed=self._distributed,
        )
        end = objective.point()
        with objective.isolated():
            known = self._known_start(objective, begun)
            assert self.self_test is not None
            step = Step(
                index=self.steps,
                objective=objective,
                start=[widened(x) for x in begun.start],
                end=[widened(x) for x in end],
                lr=common(begun.lrs),
                gradient_error=self.self_test.gradient_error,
                groups=self._groups,
                preconditioner=preconditioner(self.optimizer, self._parameters),
                known_start=known,
                memory=self._memory,
                stability_limit=stability_limit(self.optimizer, self._parameters),
            )
            names: set[str] = set()
            for estimator in self.due:
                name = self._record(step, estimator, begun, changed=changed)
                if name in names and not self._has_measured:
                    raise ValueError(
                        "Parameter `estimators` should hold estimators whose rows have different names. "
                        f"Found two named `{name}`; use two probes, with a trace each, to compare their settings."
                    )
                names.add(name)
        vectors.synchronize(begun.start)
        if isinstance(self._schedule, Adaptive) and self._schedule(self.steps):
            wait = self._stopwatch.interval(self._schedule, began)
            wait = vectors.of_first_rank(wait, self._parameters[0], distributed=self._distributed)
            self._schedule.next = self.steps + wait

    def _known_start(self, objective: Objective, begun: Beginning) -> Evaluation | None:
        """Runs the self-test when it is due; returns loss and gradient at the start if they are known then."""
        test = self.self_test
        objective.loss_scale = 1.0 if test is None else test.loss_scale
        self._num_untested += 1
        if test is None or (self._num_untested > RETEST_EVERY and test.narrow is not None):
            self.self_test, evaluation = self_test(objective, begun.start, begun.training)
            self._num_untested = 0
            return evaluation
        return None

    def _record(self, step: Step, estimator: Estimator, begun: Beginning, *, changed: bool) -> str:
        began, num_grads = time.perf_counter(), step.objective.num_grads
        try:
            estimate = estimator(step)
        except Exception as error:
            self._survive(error, type(estimator).__name__)
            return type(estimator).__name__
        cost = {"num_grads": step.objective.num_grads - num_grads, "seconds": time.perf_counter() - began}
        reproduced = changed or self._is_reproduced(step, begun)
        override = Status.DATA_CHANGED if changed else None if reproduced else Status.NOT_REPRODUCED
        data = "step" if self._held_out is None else "held-out"
        self.trace.extend(rows_of(step, estimate, begun.lrs, data=data, override=override, cost=cost))
        return estimate.estimator

    def _survive(self, error: Exception, name: str) -> None:
        """Makes a failed row of an error, but passes it on at the first measured step."""
        # There it is a mistake in the set-up, and stopping costs little; a run of days must not end because of it.
        if not self._has_measured:
            raise error
        warnings.warn(f"Step {self.steps} was not measured: {error!r}", SmoothdiagWarning)
        self.trace.append(failed_row(self.steps, name))

    def _is_reproduced(self, step: Step, begun: Beginning) -> bool:
        if begun.training is None or "at_start" not in step.__dict__:
            return True
        assert self.self_test is not None
        # A gradient that nothing wrote to has its length too, if it had it bit for bit at the self-test.
        with_length = begun.untouched and self.self_test.reproduced
        reproduced = is_same(begun.training, step.at_start.gradient, step.gradient_error, with_length=with_length)
        if not reproduced:
            self._warn_once(NOT_REPRODUCED)
        return reproduced

    def _estimators_due(self) -> tuple[Estimator, ...]:
        plans = [(self._schedule, self.estimators), *self.further]
        return tuple(e for schedule, estimators in plans if schedule(self.steps) for e in estimators)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, SmoothdiagWarning)

    def _follow_changes(self) -> None:
        """Takes up parameters that were frozen, unfrozen, or given to the optimizer since the last measurement."""
        present = coordinates(self._model, self.optimizer)
        if [id(p) for p in present] != [id(p) for p in self._parameters]:
            self._take_coordinates(present)

    def _take_coordinates(self, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters
        self._memory: dict[Hashable, Any] = {}  # of other parameters it would be of no use
        self._groups = parameter_groups(self._model, parameters, self._group_by)
        self._accumulation = Accumulation(self._model, parameters)
