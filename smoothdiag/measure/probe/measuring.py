"""Measuring: measures one step of a run with all estimators that are due, and appends the rows to a trace."""

import itertools
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from smoothdiag.adapters import StabilityLimit, adapter_of, unit_balls
from smoothdiag.measure.estimators import Estimator, Status, Step
from smoothdiag.measure.loss.calls import returned_loss
from smoothdiag.measure.loss.coordinates import common
from smoothdiag.measure.loss.faults import NothingToSay, NotPutBack
from smoothdiag.measure.loss.objective import Evaluation, LossFn, Objective, Reduction
from smoothdiag.measure.loss.selftest import RETEST_EVERY, Doubt, SelfTest, self_test
from smoothdiag.measure.loss.state import ModuleState
from smoothdiag.measure.probe.accumulation import Beginning
from smoothdiag.measure.probe.data import Part
from smoothdiag.measure.probe.ranks import Ranks
from smoothdiag.measure.probe.trust import Trust
from smoothdiag.measure.recording import failed_row, rows_of
from smoothdiag.memory import retried
from smoothdiag.rows import SmoothdiagWarning
from smoothdiag.trace import Trace

T = TypeVar("T")


@dataclass(frozen=True)
class Taken:
    """A step that the optimizer has taken.

    Attributes:
        index: Number of steps before it.
        begun: The step as it was before the optimizer took it.
        parameters: The coordinates x.
        groups: For each group with rows of its own, the indices of its parameters.
        has_changed: Whether tensors of its own micro-batches were written to since the probe saw them.
        is_test_due: Whether rounding is to be estimated again.
        ranks: Keeps the ranks in step.
        host: Host memory for the parameters while the loss is evaluated; ``None`` keeps them on their devices.
    """

    index: int
    begun: Beginning
    parameters: Sequence[nn.Parameter]
    groups: dict[str, list[int]]
    has_changed: bool
    is_test_due: bool
    ranks: Ranks
    host: Sequence[Tensor] | None = None


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
        loss_fn: The loss of a micro-batch.
        reduction: How micro-batch losses add up.
        memory: What estimators keep from one step for the next, for each kind of data.
        fault: The error kept for the present step, if there is one.
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
        self._model, self._optimizer, self.loss_fn, self._trace = model, optimizer, loss_fn, trace
        self._state, self.reduction, self._distributed = state, reduction, distributed
        self.self_test: SelfTest | None = None
        self.has_measured = False
        self.memory: MutableMapping[str, MutableMapping[Hashable, Any]] = defaultdict(dict)
        self.fault: Exception | None = None
        self._warned: set[Hashable] = set()
        self._num_untested = 0
        self._found: Status | None = None
        self._trust = Trust()
        said = " Here loss_fn is what the model returned. If that is only a part of the loop's loss, pass a loss_fn."
        self._remark = said if loss_fn is returned_loss else ""

    @property
    def is_test_due(self) -> bool:
        """Whether the next step is one whose gradient is tested."""
        return self.self_test is None or self._num_untested >= RETEST_EVERY

    def count(self) -> bool:
        """Counts a step that will be measured, and returns whether its gradient is tested.

        Ranks count alike if they call this before anything that may fail on some of them.
        """
        is_due = self.is_test_due
        self._num_untested = 0 if is_due else self._num_untested + 1
        return is_due

    def measure(self, taken: Taken, parts: Sequence[Part]) -> None:
        """Measures a step on each kind of data and puts everything back."""
        if taken.has_changed and any(part.data == "step" and part.estimators for part in parts):
            self.warn_once(Status.DATA_CHANGED.value)
        names: set[str] = set()
        known: Evaluation | None = None
        for part, following in itertools.zip_longest(parts, parts[1:]):
            found = self._measure(taken, part, known, names, tests=part is parts[0])
            # At the first step, the fixed micro-batches are those of the step.
            is_same = following is not None and following.micro_batches is part.micro_batches
            known = found if is_same else None
        self.has_measured = self.has_measured or bool(parts)

    def _measure(
        self, taken: Taken, part: Part, known: Evaluation | None, names: set[str], *, tests: bool
    ) -> Evaluation | None:
        """Measures a step on one kind of data, and returns its loss and gradient at the start if it evaluated them."""
        objective = Objective(
            self._model,
            self.loss_fn,
            part.micro_batches,
            taken.parameters,
            state=self._state,
            reduction=self.reduction,
            widen_half=True,
            distributed=self._distributed,
            replicas=taken.ranks.replicas,
            packing=taken.begun.start.packing,
            host=taken.host,
        )
        with ExitStack() as stack:
            self._retried(lambda: stack.enter_context(objective.isolated()))
            step = self._retried(lambda: self._step(objective, taken, part, known, tests=tests))
            if part.compares:
                self._retried(lambda: self._compare(step, taken))
            trusting = None
            if part.data == "step" and not taken.has_changed and not self._distributed:
                trusting = self._trust.step(step, taken.begun, self.self_test, is_test_due=taken.is_test_due)
            for estimator in part.estimators:
                taken.ranks.meet()
                name = self._record(step, trusting, estimator, taken, part)
                if name in names and not self.has_measured:
                    raise ValueError(
                        "Parameter `estimators` should hold estimators whose rows have different names. "
                        f"Found two named `{name}`; use two probes, with a trace each, to compare their settings."
                    )
                names.add(name)
        return step.__dict__.get("at_start", step.known_start)

    def survive(self, error: Exception, step: int, name: str, data: str) -> None:
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
        self._trace.append(failed_row(step, name, data))

    @contextmanager
    def unharmed(self) -> Iterator[None]:
        """Keeps an error until the step ends, where it costs a row; before the first measurement it is raised."""
        try:
            yield
        except NotPutBack:
            raise
        except Exception as error:
            if not self.has_measured:
                raise
            self.fault = error

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

    def _step(self, objective: Objective, taken: Taken, part: Part, known: Evaluation | None, *, tests: bool) -> Step:
        if tests:
            known = self._tested(objective, taken)
        assert self.self_test is not None
        objective.loss_scale = self.self_test.loss_scale
        adapter = adapter_of(self._optimizer)
        return Step(
            index=taken.index,
            objective=objective,
            start=taken.begun.start,
            end=objective.end,
            lr=common(taken.begun.lrs),
            gradient_error=self.self_test.gradient_error,
            groups=taken.groups,
            preconditioner=adapter.preconditioner(taken.parameters),
            known_start=known,
            memory=self.memory[part.data],
            stability_limit=StabilityLimit(*adapter.stability_limit(taken.parameters)),
            balls=unit_balls(adapter, taken.parameters),
        )

    def _tested(self, objective: Objective, taken: Taken) -> Evaluation | None:
        """Runs the self-test if it is due, and returns the loss and gradient at the start that it evaluated."""
        test = self.self_test
        objective.loss_scale = 1.0 if test is None else test.loss_scale
        if test is None or (taken.is_test_due and test.narrow is not None):
            self.self_test, evaluation = self_test(objective, taken.begun.start, taken.begun.training)
            return evaluation
        return None

    def _record(self, step: Step, trusting: Step | None, estimator: Estimator, taken: Taken, part: Part) -> str:
        try:
            with taken.ranks.in_step():
                rows = self._retried(lambda: self._rows(step, trusting, estimator, taken, part))
        except Exception as error:
            self.survive(error, step.index, type(estimator).__name__, part.data)
            return type(estimator).__name__
        self._trace.extend(rows)
        return str(rows[0]["estimator"]) if rows else type(estimator).__name__

    def _rows(
        self, step: Step, trusting: Step | None, estimator: Estimator, taken: Taken, part: Part
    ) -> list[dict[str, Any]]:
        began, num_grads = time.perf_counter(), step.objective.num_grads
        try:
            estimate = self._trust.estimate(step, trusting, estimator)
        except NothingToSay:
            return []
        cost = {"num_grads": step.objective.num_grads - num_grads, "seconds": time.perf_counter() - began}
        if part.data == "fixed":
            override = self._found
        elif taken.has_changed:
            override = Status.DATA_CHANGED
        else:
            override = self._warned_of(self._doubt(step, taken.begun))
        rows = rows_of(step, estimate, taken.begun.lrs, data=part.data, override=override, cost=cost)
        return [{**row, **part.columns} for row in rows]

    def _compare(self, step: Step, taken: Taken) -> None:
        """Finds out, from the step's own micro-batches, how far to trust rows on fixed ones until the next test."""
        if taken.begun.training is None and not self._distributed:
            return  # there is nothing to compare with; but ranks must make equal calls
        _ = step.at_start
        doubt = self._doubt(step, taken.begun)
        if doubt is not None and taken.has_changed:
            self.warn_once(Status.DATA_CHANGED.value)
            self._found = Status.DATA_CHANGED
        else:
            self._found = self._warned_of(doubt)

    def _warned_of(self, doubt: tuple[Doubt, str] | None) -> Status | None:
        """Warns of a doubt, once for each kind, and returns the status of the rows; ``None`` if there is no doubt."""
        if doubt is None:
            return None
        self._trust.is_lost = True
        kind, message = doubt
        self.warn_once(message + self._remark, kind)
        return Status.NOT_REPRODUCED

    def _doubt(self, step: Step, begun: Beginning) -> tuple[Doubt, str] | None:
        """Returns why the measured loss is not the trained one; ``None`` if it is, or if that is not known."""
        if begun.training is None or "at_start" not in step.__dict__:
            return None
        assert self.self_test is not None
        return self.self_test.doubt(
            begun.training,
            step.at_start.gradient,
            has_length=begun.has_length,
            num_micro_batches=step.objective.num_micro_batches,
            reduction=self.reduction,
            arrived=begun.arrived,
            scale=begun.scale,
        )
