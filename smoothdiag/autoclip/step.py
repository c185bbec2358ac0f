"""Step: what AutoClip does at each step of the optimizer, from top to bottom in the order in which it happens.

How the step is kept short is the business of `smoothdiag.autoclip.acting`, the other file of the story.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch

from smoothdiag.adapters import adapter_of
from smoothdiag.adapters.turns import Arguments, Turn
from smoothdiag.autoclip.acting import Action
from smoothdiag.autoclip.benefit import Benefit
from smoothdiag.autoclip.books import Books
from smoothdiag.autoclip.buckets import check_gradients, check_unscaled, gradient_norm
from smoothdiag.autoclip.calibration import RAISE_BY, RAISE_UPDATES_BY, StepRule
from smoothdiag.autoclip.checks import check_schedule
from smoothdiag.autoclip.closures import Closures, second_evaluation
from smoothdiag.autoclip.faults import UNCLIPPED, UNREAD, Guard, Unfit
from smoothdiag.autoclip.history import EARLIER, ROSE, SET_LR, explained
from smoothdiag.autoclip.progression import is_in_progression
from smoothdiag.autoclip.rates import Peaks, raise_rates, rates_of, share_of_parameters, suggested
from smoothdiag.autoclip.rows import Arrivals
from smoothdiag.console import counted
from smoothdiag.measure.probe import Probe
from smoothdiag.rows import SmoothdiagWarning


class Stepping:
    """Follows an optimizer from step to step.

    Args:
        optimizer: The optimizer.
        probe: The probe that watches it.
        action: How steps are kept short.
        peaks: Largest learning rate of each group so far.
        arrivals: Compares gradients with their measurements.
        books: What is known so far.
        rule_is_given: Whether the user gave the rule; otherwise it follows the momentum of the first step.
        sets_lr: Whether to raise the learning rate until the longest step is held.
        reason: Returns where the longest step comes from, in words.

    Attributes:
        attached: Whether AutoClip still acts and measures.
        alone: Whether the probe has stopped, so that no further measurements come.
        guard: Keeps errors of AutoClip out of the run.
        benefit: Judges the steps that a shadow would have shortened.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        probe: Probe,
        action: Action,
        peaks: Peaks,
        arrivals: Arrivals,
        books: Books,
        *,
        rule_is_given: bool,
        sets_lr: bool,
        reason: Callable[[], str],
    ) -> None:
        self._optimizer, self._probe, self._action = optimizer, probe, action
        self._peaks, self._arrivals, self._books = peaks, arrivals, books
        self._rule_is_given, self._sets_lr, self._reason = rule_is_given, sets_lr, reason
        self._closures = Closures(optimizer)
        self._has_started, self._is_resumed, self._is_measured = False, False, True
        self._written: list[float] | None = None
        self.attached, self.alone = True, False
        self.benefit: Benefit | None = None
        self.guard = Guard(books.note_fault)
        self._turn = Turn(optimizer, self._before_step, self._after_step)

    # 1. The optimizer begins a step.

    def _before_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        self.guard.begin()
        self._action.drop()  # the step before may have ended in an error
        changed = None
        with self.guard.during(UNCLIPPED):
            changed = self._closures.begin(args, kwargs, self._books.steps, self._begin_by_closure, self._begin_again)
        if changed is None:
            self._begin()
        return changed

    def _begin_by_closure(self) -> None:
        with self.guard.during(UNCLIPPED, by_closure=True):
            if self._acts:
                self._closures.check_place()
        self._begin()

    def _begin_again(self) -> None:
        with self.guard.during(UNCLIPPED, by_closure=True):
            raise Unfit(second_evaluation()) if self.guard.is_first else second_evaluation()

    # 2. Its gradients are there. Without a closure they were there from the start.

    def _begin(self) -> None:
        self._closures.has_begun = True
        if not self.attached:
            return
        if self.guard.is_first or self._is_resumed:
            self._check_resumed()
        self._is_measured = self.is_due(self._books.steps) or self.is_judged(self._books.steps)
        with self.guard.during(UNREAD):
            self._follow_probe()
            self._books.read()
        with self.guard.during(UNCLIPPED):
            if self.guard.is_first:
                check_unscaled(self._optimizer)
            check_gradients(self._optimizer)
            self._bring_up_to_date()
            if self._acts:
                self._action.before(self._books.longest(), self._books.counts, self._books.steps)

    @property
    def _acts(self) -> bool:
        return not (self.guard.is_lost or self.guard.stopped)

    # 3. The longest step is brought up to date.

    def _bring_up_to_date(self) -> None:
        books, calibration, first = self._books, self._books.calibration, not self._has_started
        if self._sets_lr and first:  # schedules may be made after AutoClip
            check_schedule(self._optimizer)
        if self.is_due(books.steps):
            self._is_measured = True
            self._arrivals.take(books.steps, gradient_norm(self._optimizer))
        rose = self._peaks.update()
        if first and not self._rule_is_given:  # a schedule made after AutoClip may have set the momentum
            calibration.rule = default_rule(self._optimizer, self._action)
        if first or not books.has_cap or is_in_progression(books.steps):
            books.relative = share_of_parameters(self._optimizer, calibration.rule.relative)
        self._has_started = True
        if first:
            books.note("started", explained(calibration))
            self._look_for_earlier_run()
        elif rose and calibration.rise(books.steps):
            books.note(ROSE, "the threshold falls as the rate rises; the longest step stays")
        is_early = calibration.held_at < 0
        if calibration.advance(books.steps):
            books.note("held", explained(calibration))
        # Rates are read only right after a measurement: reading one may wait for the device.
        if self._sets_lr and is_early and books.steps in (calibration.held_at, calibration.last_step + 1):
            self._set_lr()

    def is_due(self, step: int) -> bool:
        """Returns whether the probe should measure a step for the calibration."""
        return self.attached and self._books.calibration.due(step)

    def is_judged(self, step: int) -> bool:
        """Returns whether a shadow looks at a step to judge clipping."""
        return self.attached and self._acts and self.benefit is not None and self.benefit.is_due(step)

    @property
    def judged_at(self) -> int:
        """The last step that a shadow looked at; negative if there is none."""
        return -1 if self.benefit is None else self.benefit.last

    def _set_lr(self) -> None:
        calibration = self._books.calibration
        if self._written is not None and self._written != rates_of(self._optimizer):
            self._sets_lr = False
            said = "something else sets the rate, so AutoClip raises it no more"
            self._books.note("rate left", said)
            warnings.warn(f"In `AutoClip(set_lr=True)`, {said}.", SmoothdiagWarning)
            return
        lr = suggested(calibration, self._optimizer, calibration.factor, self._action.reach, cautious=True)
        if raise_rates(self._optimizer, lr, self._action.reach):
            self._peaks.update()
            now = max(rates_of(self._optimizer))
            self._books.note(SET_LR, f"to {now:.3g}; at {lr:.3g} half of the early steps are as long as S, or longer")
        self._written = rates_of(self._optimizer)

    # 4. The optimizer has moved the parameters.

    def _after_step(self) -> None:
        books, counts = self._books, self._books.counts
        try:
            with self.guard.during(UNCLIPPED):
                if not self.guard.is_lost:
                    self._closures.check_begun()
                if self._acts:
                    self._action.after(books.longest(), counts, books.steps, measured=self._is_measured)
                    books.finish_step()
        finally:
            self._action.drop()
            books.steps += 1
        counts.num_acted += not self.guard.stopped
        self.guard.end()
        self._is_resumed = False
        if counts.is_at_hand:
            self.guard.try_to(books.note_skipped)

    # Once in a run.

    def resume(self, *, alone: bool, stopped: str, judged_at: int) -> None:
        """Goes on as a run that was saved."""
        if self.benefit is not None:
            self.benefit.last = judged_at
        self.alone, self._has_started = alone, self._books.counts.num_acted > 0
        self.guard.is_first, self.guard.stopped = not self._has_started, stopped
        self._is_resumed = True

    def detach(self) -> None:
        """Stops following the optimizer."""
        self.attached = False
        self._turn.stop()
        self._action.drop()

    def _look_for_earlier_run(self) -> None:
        """Notes that states were not loaded: the trace of an earlier run lies where this run will write its own."""
        path = self._probe.trace.path
        is_begun = self._is_resumed or self._books.steps or self._probe.steps or len(self._probe.trace)
        if is_begun or path is None or not path.is_file():
            return
        said = (
            f"{path} holds an earlier run; it is kept under another name, and AutoClip measures anew, because neither "
            "its state nor that of the probe was loaded"
        )
        self._books.note(EARLIER, said)

    def _check_resumed(self) -> None:
        if self._probe.steps != self._books.steps and not self.alone:
            raise ValueError(
                "Parameter `probe` should have counted as many steps as AutoClip. Found "
                f"{counted(self._probe.steps, 'step')} in the probe and {self._books.steps} in AutoClip: load the "
                "saved states of both."
            )

    def _follow_probe(self) -> None:
        """Notices that the probe has stopped."""
        if self._probe.steps == self._books.steps or self.alone:
            return
        self.alone = True
        self._books.note("probe stopped", "the longest step stays as it is")
        warnings.warn(f"The probe has stopped: {self._reason()}", SmoothdiagWarning)


def default_rule(optimizer: torch.optim.Optimizer, action: Action) -> StepRule:
    """Returns the rule for the momentum that an optimizer has at present, if AutoClip clips its gradients."""
    if action.shortens_updates:
        return StepRule.for_momentum(0.0)
    return StepRule.for_momentum(max(map(adapter_of(optimizer).momentum, optimizer.param_groups)))


def raise_by(action: Action) -> float:
    """Returns how much longer than S steps have to be allowed for it to rise; infinite for an optimizer that clips."""
    if action.shortens_updates:
        return RAISE_UPDATES_BY
    return RAISE_BY if action.counts_steps else math.inf
