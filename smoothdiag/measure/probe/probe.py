"""Probe: watches a training loop and measures at chosen optimizer steps."""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from smoothdiag import collectives, vectors
from smoothdiag.adapters import finish, stepping
from smoothdiag.adapters.turns import Arguments, Turn
from smoothdiag.adapters.wrappers import pending_scale
from smoothdiag.measure.estimators import Estimator, LocalSmoothness, PathSmoothness
from smoothdiag.measure.loss.batches import held_out
from smoothdiag.measure.loss.calls import returned_loss
from smoothdiag.measure.loss.coordinates import coordinates, is_distributed, learning_rates, moves_of, parameter_groups
from smoothdiag.measure.loss.objective import LossFn, Reduction
from smoothdiag.measure.loss.selftest import SelfTest
from smoothdiag.measure.probe.accumulation import Accumulation, Beginning
from smoothdiag.measure.probe.arguments import Managed, as_module, check_arguments
from smoothdiag.measure.probe.backward import check_hooks
from smoothdiag.measure.probe.calls import UNSEEN, Calls
from smoothdiag.measure.probe.closures import after_closure
from smoothdiag.measure.probe.data import NOTHING, Data, Due, Kind, checks_start
from smoothdiag.measure.probe.host import HostMemory, Where
from smoothdiag.measure.probe.measuring import Measuring, Taken
from smoothdiag.measure.probe.others import SHOW, Between, moved_by_others, unseen
from smoothdiag.measure.probe.ranks import Outlook, Ranks
from smoothdiag.measure.probe.replaying import Replaying
from smoothdiag.measure.probe.schedule import Adaptive, Schedule, Stopwatch, every
from smoothdiag.measure.probe.unsupported import refuse_unsupported
from smoothdiag.measure.recording import facts
from smoothdiag.memory import retried
from smoothdiag.packing import Kept
from smoothdiag.trace import Trace

T = TypeVar("T")


class Probe(Managed, Replaying):
    """Measures local smoothness beside the gradient norm, without changing the run by one bit.

    The probe attaches to the optimizer by its step hooks. On the steps that ``schedule`` names it keeps the batches,
    the random states before their forward passes, and the parameters before and after the step. Then it evaluates
    the loss again on the same data, and puts everything back.

    By default the data are copies of the micro-batches of the first measured step, which stay on their device until
    ``close``. On the batch of each step, a hard batch has a large gradient and a large curvature, so the two rise
    together without any law: rows with ``data="step"`` support the verdict L0L1 only if ``grad_variance`` clears the
    batches. They are right for limits of stability. Estimators with the attribute ``of_step`` (`CriticalStep`,
    `DirectionalCurvature`) always use them. Now and then, first at the first step, the probe compares ``loss_fn`` on
    the step's own batch with the gradient that ``backward`` left; the rows until the next test carry the result.

    Args:
        model: The model being trained, or a list of several that ``loss_fn`` uses, such as ``[G, D]`` of a GAN;
            ``loss_fn`` then gets that list, and names of parameters begin with their number.
        optimizer: Its optimizer, or a list of those that step on one loss, such as ``[muon, adamw]``; the coordinates x
            are the trainable parameters that they hold. A step begins before the first and ends after the last.
        loss_fn: ``loss_fn(model, batch)`` returns the scalar loss of one micro-batch, as the loop computes it. Leave it
            out if ``model(...)`` returns the loss that the loop trains (see `returned_loss`): then the probe watches
            the calls of the model, and neither ``watch`` nor ``observe`` nor ``reduction`` is needed.
        estimators: What to measure at each due step; ``()`` measures only what ``also`` or an AutoClip adds.
        schedule: Which optimizer steps to measure.
        probe_batches: Held-out batches to measure on instead; nothing then compares ``loss_fn`` with the loop.
        trace: A Trace, or a path to write one to; default: rows in memory.
        group_by: Function from a parameter's name to the label of its group; each group gets rows beside "all".
        reduction: How the micro-batch losses of one step add up in the loop: ``"mean"`` or ``"sum"``.
        seed: Seed of the random state that held-out batches start from.
        data: ``"fixed"``: the micro-batches of the first measured step; ``"step"``: each step's own. The column
            ``data`` of the trace says which.
        offload: ``"cpu"`` keeps x_k and x_{k+1} in host memory while a step is measured, pinned where there is a GPU:
            two copies of x less on the device, for some traffic. ``None`` keeps them on the device.

    Raises:
        ValueError: If the optimizer holds no trainable parameter of the model, or an argument is out of range. At the
            first step, if a batch cannot be copied, or if ``loss_fn`` is missing but the model returns no loss.

    Attributes:
        trace: The rows so far; under data parallelism only the first rank writes to a path.
        further: Further schedules and their estimators; see ``also``.
        steps: Optimizer steps so far; ``is_closed`` says whether the probe is detached.

    Examples:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> probe = sd.Probe(model, optimizer, lambda model, x: model(x).pow(2), schedule=sd.every(2))
        >>> for x in probe.watch(torch.ones(4, 1)): optimizer.zero_grad(); model(x).pow(2).backward(); optimizer.step()
        >>> print(probe.trace.to_frame()["smoothness"].round(1).tolist())
        [2.0, 2.0, 2.0, 2.0]
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        loss_fn: LossFn | None = None,
        *,
        estimators: Sequence[Estimator] = (PathSmoothness(), LocalSmoothness()),
        schedule: Schedule | None = None,
        probe_batches: Iterable[Any] | None = None,
        trace: Trace | str | Path | None = None,
        group_by: Callable[[str], str] | None = None,
        reduction: Reduction = "mean",
        seed: int = 0,
        data: Kind = "fixed",
        offload: Where | None = None,
    ) -> None:
        model = as_module(model)
        check_arguments(model, loss_fn, estimators, schedule, reduction, data, probe_batches, offload)
        self.optimizer = optimizer = stepping(optimizer)
        self._model, self.estimators = model, tuple(estimators)
        self._group_by = group_by
        self._schedule = every(20) if schedule is None else schedule
        check_hooks(model)
        self._parameters = coordinates(model, optimizer)
        refuse_unsupported(model, self._parameters)
        self._distributed = is_distributed(model, self._parameters)
        self._ranks = Ranks(model, self._parameters)
        loss_of = returned_loss if loss_fn is None else loss_fn
        self._accumulation = Accumulation(model, self._parameters, loss_of, distributed=self._distributed)
        self._groups = parameter_groups(model, self._parameters, group_by)
        self._data = Data(data, None if probe_batches is None else held_out(probe_batches, seed, self._parameters))
        self._owns_trace = not isinstance(trace, Trace)
        if self._owns_trace and self._distributed and torch.distributed.get_rank() > 0:
            trace = None  # the rows are the same on every rank; the first one writes them
        self.trace = (
            trace if isinstance(trace, Trace) else Trace(trace, meta={**facts(model, optimizer), **self._data.facts})
        )
        self.steps, self.is_closed = 0, False
        self.further: list[tuple[Schedule, tuple[Estimator, ...]]] = []
        self._due = self._estimators_due()
        self._begun: Beginning | None = None
        self._seen: list[tuple[int, bool]] = []
        if loss_fn is None and probe_batches is None:
            reduction = "mean"  # of calls whose weights are not known from backward passes
        state, spread = self._accumulation.state, self._distributed
        self._measuring = Measuring(
            model, optimizer, loss_of, self.trace, state, reduction=reduction, distributed=spread
        )
        self._stopwatch, self._host = Stopwatch(), HostMemory(offload)
        if loss_fn is None:
            says, has = self._measuring, self._accumulation.has_gradients
            self._calls = self._accumulation.calls = Calls(model, self._meet, says.unharmed, has, says.warn_once)
        self._between = Between(optimizer, is_on=self._data.needs_batches)
        self._turn = Turn(optimizer, self._before_step, self._after_step, self._between.listen)

    @property
    def self_test(self) -> SelfTest | None:
        """What the first measured step showed about the loss; ``None`` before it."""
        return self._measuring.self_test

    @property
    def due(self) -> tuple[Estimator, ...]:
        """What measures the next step."""
        return self._due[0] + self._due[1]

    def _show(self, make: Callable[[], T], weight: float | None = None) -> T | None:
        """Makes a micro-batch and adds it if it is needed; returns it if it was added."""
        self._stopwatch.start()
        finish(self.optimizer)
        if self.due and self._data.needs_batches:
            with self._measuring.unharmed():
                batch = make()
                if retried(partial(self._observe, batch, weight)):
                    return batch
        return None

    def _observe(self, batch: Any, weight: float | None) -> bool:
        if self._begun is not None and self._turn.is_open():
            return False  # the optimizer evaluates its closure again, at another point
        self._forget_failed_step()
        if not self._accumulation.has_observed:
            with suppress(ValueError):  # what is frozen now may be trainable when the optimizer steps
                self._follow_changes()
        is_test_due = self._measuring.is_test_due
        copies = self._data.copies(self._due[0], is_test_due=is_test_due)
        follows = self._data.follows(self._due, is_test_due=is_test_due)
        if self._accumulation.add(batch, weight, copies=copies, follows=follows):
            self._measuring.warn_once(moved_by_others(self.optimizer))
        return True

    def _forget_failed_step(self) -> None:
        if self._begun is not None:  # it ended in an error, after which no hook is called
            self._begun = None
            self._accumulation.clear()

    def also(self, schedule: Schedule, *estimators: Estimator) -> None:
        """Measures with further estimators, at the steps that ``schedule`` names.

        They measure on the step's own batch, or on ``probe_batches``.
        The measurements run after all hooks that the optimizer's step has at the time of this call. A second call with
        the same schedule replaces its estimators. A closed probe stays closed.
        """
        self.further = [(s, e) for s, e in self.further if s != schedule] + [(schedule, estimators)]
        if not self.is_closed:
            self._due = self._estimators_due()
            self._turn.move_last()

    def close(self) -> None:
        """Detaches from the optimizer; closes the trace's file if the probe opened it."""
        finish(self.optimizer)
        self._turn.stop()
        if self._calls is not None:
            self._calls.remove()
        self._accumulation.clear()
        self._data.forget()
        self._due, self.is_closed = NOTHING, True
        if self._owns_trace:
            self.trace.close()

    def _before_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        if not self.due:
            return None
        self._forget_failed_step()
        start: list[Kept] = []
        with self._measuring.unharmed():
            if self._seen != moves_of(self.optimizer):  # since the batches were shown
                self._follow_changes()
            packing = self._accumulation.packing
            start.append(retried(lambda: packing.keep(self._parameters, host=self._host.start(packing))))
        if not start:
            return None
        # With a closure, the gradients of this step do not exist yet, nor perhaps its batches.
        if (changed := after_closure(args, kwargs, lambda: self._begin(start[0], by_closure=True))) is None:
            self._begin(start[0])
        return changed

    def _begin(self, start: Kept, *, by_closure: bool = False) -> None:
        """Notes the step from ``start`` once its gradients are there."""
        with self._measuring.unharmed():
            self._begun = retried(lambda: self._beginning(start, by_closure=by_closure))

    def _beginning(self, start: Kept, *, by_closure: bool) -> Beginning | None:
        lrs = learning_rates(self.optimizer, self._parameters)
        if not self._data.needs_batches:
            return Beginning(start, lrs)
        if self._measuring.fault is not None:
            return None
        begun: Beginning | None = None
        if self._accumulation.has_loss:
            is_scaled = pending_scale(self.optimizer) is not None  # fused ones take it out as they step
            begun = self._accumulation.beginning(start, lrs, by_closure=by_closure, is_scaled=is_scaled)
        else:
            missed = SHOW if self._calls is None else UNSEEN
            self._measuring.warn_once(unseen(self.optimizer, self, missed, has_fixed=self._data.has_fixed))
        return Beginning(start, lrs, is_seen=False) if begun is None and self._data.has_fixed else begun

    def _after_step(self) -> None:
        self._between.stop()
        if self._between.heard:
            self._measuring.warn_once(self._between.heard)
        self._stopwatch.steps += 1
        try:
            if self.due and (outlook := self._outlook()) is not Outlook.MISSING:
                with self._ranks.in_step():
                    self._measure(outlook)
        except Exception as error:
            self._data.is_untested = True
            self._measuring.survive(error, self.steps, "probe", self._data.kind)
        finally:
            self._accumulation.clear()
            self._begun = self._measuring.fault = None
            self.steps += 1
            self._due = self._measuring.asked(self._estimators_due, NOTHING)

    def _outlook(self) -> Outlook:
        """Returns what is wrong with the step to measure, the worst of all ranks; raises an error kept for it."""
        fault = self._measuring.fault
        local = self._accumulation.outlook(self._begun) if fault is None else Outlook.FAILED
        return self._ranks.worst(local, self._parameters[0], fault, distributed=self._distributed)

    def _measure(self, outlook: Outlook) -> None:
        begun = self._begun
        assert begun is not None
        is_test_due = self._measuring.count()
        vectors.synchronize(self._parameters)  # the step's own time does not count
        began = time.perf_counter()
        check_hooks(self._model)
        self._ranks.check_pending()
        exact = self._measuring.self_test is None or any(map(checks_start, self._due[1]))
        settled = retried(lambda: self._accumulation.settled(begun, exact=exact))
        own = None if outlook is Outlook.UNSEEN else self._accumulation.measured(settled, self._ranks.replicas)
        parts = self._data.parts(self.steps, own, *self._due, is_test_due=is_test_due)
        taken = Taken(
            index=self.steps,
            begun=settled,
            parameters=self._parameters,
            groups=self._groups,
            has_changed=outlook is Outlook.CHANGED,
            is_test_due=is_test_due,
            ranks=self._ranks,
            host=self._host.end(begun.start.packing),
        )
        self._accumulation.clear()  # its hooks must not see the backward passes to come
        self._measuring.measure(taken, parts)
        if isinstance(self._schedule, Adaptive) and self._schedule(self.steps):
            wait = self._stopwatch.interval(self._schedule, began)
            if self._distributed:
                wait = collectives.of_first_rank(wait, self._parameters[0], self._ranks.group)
            self._schedule.next = self.steps + wait

    def _estimators_due(self) -> Due:
        """Returns the probe's own estimators and those of ``also`` that measure the next step."""
        own = self.estimators if self._schedule(self.steps) else ()
        self.is_own_due = bool(own)
        return own, tuple(e for schedule, estimators in self.further if schedule(self.steps) for e in estimators)

    def _follow_changes(self) -> None:
        """Follows parameters that were frozen, unfrozen or given to the optimizer; a ValueError if none is left."""
        present, self._seen = coordinates(self._model, self.optimizer), moves_of(self.optimizer)
        if [id(p) for p in present] != [id(p) for p in self._parameters]:
            self._groups = parameter_groups(self._model, present, self._group_by)
            self._parameters, self._ranks = present, Ranks(self._model, present)
            self._accumulation.follow(present)
            self._measuring.memory.clear()  # it belongs to other parameters
            self._data.is_untested = True
