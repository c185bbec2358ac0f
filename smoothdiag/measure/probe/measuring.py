"""Measuring: measures one step of a run with all estimators that are due, and appends the rows to a trace."""

import time
import warnings
from collections.abc import Callable, Hashable, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from smoothdiag import vectors
from smoothdiag.adapters import StabilityLimit, adapter_of
from smoothdiag.measure.estimators import Estimator, Status, Step
from smoothdiag.measure.loss.batches import MicroBatch
from smoothdiag.measure.loss.coordinates import common
from smoothdiag.measure.loss.faults import NotPutBack
from smoothdiag.measure.loss.objective import Evaluation, LossFn, Objective, Reduction
from smoothdiag.measure.loss.selftest import RETEST_EVERY, SelfTest, self_test
from smoothdiag.measure.loss.state import ModuleState
from smoothdiag.measure.probe.accumulation import Beginning
from smoothdiag.measure.probe.ranks import Ranks
from smoothdiag.measure.recording import failed_row, rows_of
from smoothdiag.memory import retried
from smoothdiag.rows import SmoothdiagWarning
from smoothdiag.trace import Trace
from smoothdiag.vectors import Vector

T = TypeVar("T")


@dataclass(frozen=True)
class Taken:
    """A step that the optimizer has taken.

    Attributes:
        index: Number of steps before it.
        begun: The step as it was before the optimizer took it.
        micro_batches: The data to measure it on.
        parameters: The coordinates x.
        groups: For each group with rows of its own, the indices of its parameters.
        data: Where the micro-batches come from: "step" or "held-out".
        has_changed: Whether tensors of the micro-batches were written to since the probe saw them.
        ranks: Keeps the ranks in step.
    """

    index: int
    begun: Beginning
    micro_batches: Sequence[MicroBatch]
    parameters: Sequence[nn.Parameter]
    groups: dict[str, list[int]]
    data: str
    has_changed: bool
    ranks: Ranks


class Measuring:
    """Measures steps and records the results.

    Args:
        model: The model.
        optimizer: Its optimizer.
        loss_fn: The loss of a micro-batch.
        trace: Where rows go.
        state: Knows what moves in the model besides x.
        reduction: How micro-batch losses add up.
        distributed: Whether gradients are averaged over ranks.

    Attributes:
        self_test: What the first measured step showed about the loss; ``None`` before it.
        has_measured: Whether a step has been measured. Errors are raised until then; later ones only cost a row.
        memory: What estimators keep from one step for the next.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFn,
        trace: Trace,
        state: ModuleState,
        *,
        reduction: Reduction,
        distributed: bool,
    ) -> None:
        self._model, self._optimizer, self._loss_fn, self._trace = model, optimizer, loss_fn, trace
        self._state, self._reduction, self._distributed = state, reduction, distributed
        self.self_test: SelfTest | None = None
        self.has_measured = False
        self.memory: MutableMapping[Hashable, Any] = {}
        self._warned: set[Hashable] = set()
        self._num_untested = 0

    def measure(self, taken: Taken, estimators: Sequence[Estimator]) -> None:
        """Measures a step and puts everything back."""
        if taken.has_changed:
            self.warn_once(Status.DATA_CHANGED.value)
        objective = Objective(
            self._model,
            self._loss_fn,
            taken.micro_batches,
            taken.parameters,
            state=self._state,
            reduction=self._reduction,
            widen_half=True,
            distributed=self._distributed,
            replicas=taken.ranks.replicas,
        )
        end = self._retried(objective.point)
        with ExitStack() as stack:
            self._retried(lambda: stack.enter_context(objective.isolated()))
            step = self._retried(lambda: self._step(objective, taken, end))
            names: set[str] = set()
            for estimator in estimators:
                taken.ranks.meet()
                name = self._record(step, estimator, taken)
                if name in names and not self.has_measured:
                    raise ValueError(
                        "Parameter `estimators` should hold estimators whose rows have different names. "
                        f"Found two named `{name}`; use two probes, with a trace each, to compare their settings."
                    )
                names.add(name)
        self.has_measured = True

    def survive(self, error: Exception, step: int, name: str) -> None:
        """Turns an error into a failed row, but raises it if nothing has been measured yet.

        An error at the first measurement is a mistake in the set-up, and stopping costs little. An error later must not
        end a run of days.
        """
        if not self.has_measured or isinstance(error, NotPutBack):
            raise error
        warnings.warn(
            f"Step {step} was not measured: {error!r}. Training goes on; the trace gets a row with status `failed`.",
            SmoothdiagWarning,
        )
        self._trace.append(failed_row(step, name))

    def asked(self, schedule: Callable[[], T], otherwise: T) -> T:
        """Returns what a schedule says; if it raises an error after the first measurement, warns and goes on."""
        try:
            return schedule()
        except Exception as error:
            if not self.has_measured:
                raise
            self.warn_once(f"A schedule failed, so the next step is not measured: {error!r}", "schedule")
            return otherwise

    def warn_once(self, message: str, kind: Hashable = None) -> None:
        """Warns, unless there was a warning with this message, or of this kind, before."""
        kind = message if kind is None else kind
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, SmoothdiagWarning)

    def _retried(self, call: Callable[[], T]) -> T:
        """Calls, and calls again if memory ran out; but under data parallelism ranks must make equal calls."""
        return call() if self._distributed else retried(call)

    def _step(self, objective: Objective, taken: Taken, end: Vector) -> Step:
        known, adapter = self._known_start(objective, taken.begun), adapter_of(self._optimizer)
        assert self.self_test is not None
        return Step(
            index=taken.index,
            objective=objective,
            start=[vectors.widened(x) for x in taken.begun.start],
            end=[vectors.widened(x) for x in end],
            lr=common(taken.begun.lrs),
            gradient_error=self.self_test.gradient_error,
            groups=taken.groups,
            preconditioner=adapter.preconditioner(taken.parameters),
            known_start=known,
            memory=self.memory,
            stability_limit=StabilityLimit(*adapter.stability_limit(taken.parameters)),
        )

    def _known_start(self, objective: Objective, begun: Beginning) -> Evaluation | None:
        """Runs the self-test if it is due, and returns the loss and gradient at the start that it evaluated."""
        test = self.self_test
        objective.loss_scale = 1.0 if test is None else test.loss_scale
        if test is None or (self._num_untested >= RETEST_EVERY and test.narrow is not None):
            self.self_test, evaluation = self_test(objective, begun.start, begun.training)
            self._num_untested = 0
            return evaluation
        self._num_untested += 1
        return None

    def _record(self, step: Step, estimator: Estimator, taken: Taken) -> str:
        try:
            with taken.ranks.in_step():
                rows = self._retried(lambda: self._rows(step, estimator, taken))
        except Exception as error:
            self.survive(error, step.index, type(estimator).__name__)
            return type(estimator).__name__
        self._trace.extend(rows)
        return str(rows[0]["estimator"])

    def _rows(self, step: Step, estimator: Estimator, taken: Taken) -> list[dict[str, Any]]:
        began, num_grads = time.perf_counter(), step.objective.num_grads
        estimate = estimator(step)
        cost = {"num_grads": step.objective.num_grads - num_grads, "seconds": time.perf_counter() - began}
        override = Status.DATA_CHANGED if taken.has_changed else self._doubt(step, taken.begun)
        return list(rows_of(step, estimate, taken.begun.lrs, data=taken.data, override=override, cost=cost))

    def _doubt(self, step: Step, begun: Beginning) -> Status | None:
        """Returns the status of a step whose measured loss is not the trained one; ``None`` if it is."""
        if begun.training is None or "at_start" not in step.__dict__:
            return None
        assert self.self_test is not None
        found = self.self_test.doubt(
            begun.training,
            step.at_start.gradient,
            has_length=begun.has_length,
            num_micro_batches=step.objective.num_micro_batches,
            reduction=self._reduction,
            arrived=begun.arrived,
        )
        if found is None:
            return None
        kind, message = found
        self.warn_once(message, kind)
        return Status.NOT_REPRODUCED
