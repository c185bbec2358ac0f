"""AutoClip: the clipper that hooks into an optimizer and keeps its steps within a measured length."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from smoothdiag.autoclip.acting import Action, action_for
from smoothdiag.autoclip.arguments import Mode, Shown, check, check_free_rate, check_schedule, default_rule
from smoothdiag.autoclip.books import Books
from smoothdiag.autoclip.buckets import check_gradients, gradient_norm
from smoothdiag.autoclip.calibration import Calibration, StepRule, is_in_progression
from smoothdiag.autoclip.closures import Closures, second_evaluation
from smoothdiag.autoclip.events import ROSE, acted, explained, stage
from smoothdiag.autoclip.faults import UNCLIPPED, UNREAD, Guard, Unfit
from smoothdiag.autoclip.free_rate import raise_rates, suggested
from smoothdiag.autoclip.rates import Peaks, share_of_parameters, shared
from smoothdiag.autoclip.resuming import VERSION, check_state
from smoothdiag.autoclip.rows import ALONG_GRADIENT, Arrivals, ForClipping, Rows
from smoothdiag.measure.estimators import Estimator
from smoothdiag.measure.probe import Probe
from smoothdiag.measure.probe.arguments import Outermost
from smoothdiag.measure.probe.closures import Arguments
from smoothdiag.rows import SmoothdiagWarning

if TYPE_CHECKING:
    import pandas as pd

    from smoothdiag.trace import Trace


class AutoClip(Shown):
    """Keeps steps within a length that is set from measured smoothness in the first steps of the run, and then held.

    The longest step is S = multiple * median(||g|| / L) over measurements in the first thirty steps. Until there are
    five of them a share of ||x|| caps the steps as well. Afterwards S is held; it is lowered where three measurements
    in a row are short of half the step that was taken, and never raised.

    How it acts depends on the optimizer. `torch.optim.SGD`: gradients are scaled before the step, as by
    `clip_grad_norm_` with max_norm = S / (largest rate so far * gain of the momentum). `ClippedMomentum` and
    `GGNC` (``mode="set"``): their ``longest_step`` or ``threshold`` is written. Any other: what the update is longer
    than S is taken back after the step. A gradient that is not finite counts as zero, before anything averages it.

    Things to know:
        * It measures thirteen of the first thirty steps, and then at least one in 200, by two gradients each.
        * Make the probe first, and clip nowhere else: a norm that is clipped already is what it would see.
        * A decay of the rate shortens the longest step with it; a rise leaves S as it is and lowers the threshold.
        * No step waits for the device, but those that are measured do.
        * To resume, load the states of model, optimizer, probe and AutoClip, in any order.

    Args:
        optimizer: The optimizer that the probe watches.
        probe: The probe; what it measures besides does not matter.
        mode: ``"clip"`` acts on gradients or updates, ``"set"`` writes the cap of an optimizer that clips by itself,
            ``"shadow"`` changes nothing and only keeps the books.
        rule: How long a step may be; default: ``StepRule.for_momentum``, where updates are shortened that of 0.
        set_lr: Whether to raise the learning rate to ``suggest_lr()`` when the longest step is held.
        estimator: What measures L; default: secants over a hundredth of ||x|| along the gradient.

    Raises:
        ValueError: If the probe watches another optimizer, an option does not fit, or shortened steps would spoil the
            optimizer: it moves a copy of the parameters (schedule-free, Lookahead), or estimates its rate (Prodigy).
            Of classes that are not known this shows at the end of the first step, before anything was shortened.

    Units: longest_step [x], threshold [f/x].
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        probe: Probe,
        *,
        mode: Mode = "clip",
        rule: StepRule | None = None,
        set_lr: bool = False,
        estimator: Estimator | None = None,
    ) -> None:
        check(optimizer, probe, mode, rule, estimator, set_lr=set_lr)
        self._optimizer, self._probe, self._mode = optimizer, probe, mode
        self._peaks = Peaks(optimizer)
        self._action: Action = action_for(optimizer, mode, self._peaks)
        self._measures, self._has_own_rule = ForClipping(estimator or ALONG_GRADIENT), rule is not None
        calibration = Calibration(rule or default_rule(optimizer, self._action), joined_at=probe.steps)
        self._arrivals = Arrivals(None if estimator else probe, acts=mode != "shadow")
        self._books = Books(self._action, self._peaks, calibration, Rows(probe), self._arrivals, steps=probe.steps)
        self._calibration, self._history = calibration, self._books.history
        self._guard, self._closures = Guard(self._books.note_fault), Closures(optimizer)
        self._alone, self._has_started, self._is_resumed = False, False, False
        self._sets_lr = set_lr
        if set_lr:
            check_schedule(optimizer)
            check_free_rate(optimizer, calibration.rule, shortens_updates=self._action.shortens_updates)
        self._attached, self._outermost = True, Outermost()
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        probe.also(self._is_due, self._measures)

    @property
    def longest_step(self) -> float:
        """Length S that steps are kept within at present [x]; NaN before the first step.

        It waits for the device before the first measurement. A rank may ask alone.
        """
        self._books.read()
        return float(self._books.longest())

    @property
    def threshold(self) -> float:
        """Gradient norm above which a step is longer than S [f/x]; NaN where groups differ, or updates are capped.

        That of the averaged gradient where the optimizer clips that; infinite before the first step.
        """
        self._books.read()
        return float(self._books.threshold())

    @property
    def clip_fraction(self) -> float:
        """Share of its steps so far that were longer than S; NaN before any, or where the optimizer clips by itself."""
        return self._history.clip_fraction

    @property
    def trace(self) -> Trace:
        """The rows of the probe."""
        return self._probe.trace

    @property
    def reason(self) -> str:
        """Where the longest step comes from and what it has done so far, in words."""
        longest, threshold, lr = self.longest_step, self.threshold, float(shared(self._peaks.values))
        said = f"longest step {'' if math.isnan(longest) else f'{longest:.3g} '}from {explained(self._calibration)}"
        if math.isfinite(threshold):
            name = "max_norm" if self._action.counts_steps else "a threshold on the averaged gradient of"
            said += f"; at lr {lr:.3g} this is {name} {threshold:.3g}"
        if self._alone:
            said += "; the probe has stopped, so nothing will change it any more"
        if self._guard.stopped:
            said += "; it has stopped acting, see `history`"
        return f"{said}; {stage(self._calibration)}{acted(self._history, self._mode)}."

    @property
    def history(self) -> pd.DataFrame:
        """What happened when: one row for each event, with the state after it; see `Event` for the columns."""
        self._books.read()
        self._books.note_skipped()
        return self._history.to_frame()

    def suggest_lr(self, multiple: float = 1.0) -> float:
        """Returns a learning rate that wastes no length that curvature allows: no clipping makes up for one too small.

        That is multiple * median(1/L) / gain over the early measurements. At 1/L a step along the gradient is the best
        one on the measured batch; from the rule's multiple on, S is what limits such a step. Which of them ends best,
        a single early step does not say.

        Args:
            multiple: Of 1/L.

        Returns:
            The rate, in the convention of the optimizer; NaN where there are fewer than five measurements.

        Raises:
            ValueError: If updates are shortened: their length is not the rate times a gradient.

        Units: [x^2/f].
        """
        check_free_rate(self._optimizer, self._calibration.rule, shortens_updates=self._action.shortens_updates)
        self._books.read()
        return suggested(self._calibration, self._optimizer, multiple)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs to go on exactly; waits for the device."""
        self._books.read()
        self._books.note_skipped()
        return {
            "version": VERSION,
            "action": type(self._action).__name__,
            "alone": self._alone,
            "stopped": self._guard.stopped,
            **self._books.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from ``state``, as returned by ``state_dict``, by the rule of then.

        Raises:
            ValueError: If it was made with another kind of optimizer or by a newer version, something is missing in
                it, or this AutoClip was given another rule.
        """
        state = check_state(state, self._action, self._calibration.rule if self._has_own_rule else None)
        self._books.load_state_dict(state)
        self._alone, self._has_started = bool(state["alone"]), self._history.counts.num_acted > 0
        self._guard.is_first, self._guard.stopped = not self._has_started, str(state["stopped"])
        self._is_resumed = True
        # The probe may have decided about its next step by the calibration as it was before.
        self._probe.also(self._is_due, self._measures)

    def detach(self) -> None:
        """Stops acting and measuring. An optimizer that clips by itself keeps the cap that was written last."""
        self._attached = False
        for handle in self._handles:
            handle.remove()
        self._action.drop()
        self._probe.also(self._is_due)  # with nothing

    def _is_due(self, step: int) -> bool:
        return self._attached and self._calibration.due(step)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Arguments | None:
        if not self._outermost.enter(sys._getframe(1)):
            return None
        self._guard.begin()
        self._action.drop()  # the step before may have ended in an error
        changed = None
        with self._guard.during(UNCLIPPED):
            changed = self._closures.begin(args, kwargs, self._books.steps, self._begin_by_closure, self._begin_again)
        if changed is None:
            self._begin()
        return changed

    def _begin_by_closure(self) -> None:
        with self._guard.during(UNCLIPPED, by_closure=True):
            if self._acts:
                self._closures.check_place()
        self._begin()

    def _begin_again(self) -> None:
        with self._guard.during(UNCLIPPED, by_closure=True):
            raise Unfit(second_evaluation()) if self._guard.is_first else second_evaluation()

    def _begin(self) -> None:
        """Takes up a step when its gradients are there, and acts on them."""
        self._closures.has_begun = True
        if not self._attached:
            return
        if self._guard.is_first or self._is_resumed:
            self._check_resumed()
        with self._guard.during(UNREAD):
            self._follow_probe()
            self._books.read()
        with self._guard.during(UNCLIPPED):
            check_gradients(self._optimizer)
            self._prepare()
            if self._acts:
                self._action.before(self._books.longest(), self._history.counts, self._books.steps)

    @property
    def _acts(self) -> bool:
        return not (self._guard.is_lost or self._guard.stopped)

    def _prepare(self) -> None:
        """Brings the longest step up to date."""
        books, calibration, first = self._books, self._calibration, not self._has_started
        if self._sets_lr and first:  # schedules may be made after AutoClip
            check_schedule(self._optimizer)
        if self._is_due(books.steps):
            self._arrivals.take(books.steps, gradient_norm(self._optimizer))
        rose = self._peaks.update()
        if first and not self._has_own_rule:  # a schedule made after AutoClip may have set the momentum
            calibration.rule = default_rule(self._optimizer, self._action)
        if first or not books.has_cap or is_in_progression(books.steps):
            books.relative = share_of_parameters(self._optimizer, calibration.rule.relative)
        self._has_started = True
        if first:
            books.note("started", explained(calibration))
        elif rose and calibration.rise(books.steps):
            books.note(ROSE, "the threshold falls as the rate rises; the longest step stays")
        if calibration.advance(books.steps):
            books.note("held", explained(calibration))
            if self._sets_lr:
                self._set_lr()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self._outermost.leave(sys._getframe(1)):
            return
        books, counts = self._books, self._history.counts
        try:
            with self._guard.during(UNCLIPPED):
                if not self._guard.is_lost:
                    self._closures.check_begun()
                if self._acts:
                    self._action.after(books.longest(), counts, books.steps)
                    books.finish_step()
        finally:
            self._action.drop()
            books.steps += 1
        counts.num_acted += not self._guard.stopped
        self._guard.end()
        self._is_resumed = False
        if counts.is_at_hand:
            self._guard.try_to(books.note_skipped)

    def _check_resumed(self) -> None:
        if self._probe.steps != self._books.steps and not self._alone:
            raise ValueError(
                "Parameter `probe` should have taken as many steps as AutoClip: load the states of both. Found "
                f"{self._probe.steps} of the probe and {self._books.steps} of AutoClip."
            )

    def _follow_probe(self) -> None:
        """Notices that the probe has stopped."""
        if self._probe.steps == self._books.steps or self._alone:
            return
        self._alone = True
        self._books.note("probe stopped", "the longest step stays as it is")
        warnings.warn(f"The probe has stopped: {self.reason}", SmoothdiagWarning)

    def _set_lr(self) -> None:
        lr = self.suggest_lr()
        if raise_rates(self._optimizer, lr):
            self._books.note("set lr", f"to {lr:.3g}, the best for a single step along the gradient")
            self._peaks.update()
