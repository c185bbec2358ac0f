"""AutoClip: the clipper that hooks into an optimizer and keeps its steps within a measured length."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smoothdiag.autoclip.acting import Action, action_for, check_gradients, gradient_norm
from smoothdiag.autoclip.arguments import Mode, Shown, check, check_free_rate, check_schedule, check_state, default_rule
from smoothdiag.autoclip.calibration import Calibration, Measurement, StepRule, is_in_progression
from smoothdiag.autoclip.closures import after_gradient, check_begun
from smoothdiag.autoclip.events import NOT_FINITE, ROSE, History, acted, explained, stage
from smoothdiag.autoclip.free_rate import raise_rates, suggested
from smoothdiag.autoclip.rates import Number, Peaks, share_of_parameters, shared, smaller
from smoothdiag.autoclip.rows import ALONG_GRADIENT, Arrivals, ForClipping, Rows
from smoothdiag.measure.arguments import Outermost
from smoothdiag.measure.closures import Arguments
from smoothdiag.measure.estimators import Estimator
from smoothdiag.measure.probe import Probe
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
        ValueError: If the probe watches another optimizer, or an option does not fit.

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
        self._measures, self._rows = ForClipping(estimator or ALONG_GRADIENT), Rows(probe)
        self._arrivals = Arrivals(None if estimator else probe, acts=mode != "shadow")
        self._has_own_rule = rule is not None
        self._calibration = Calibration(rule or default_rule(optimizer, self._action), joined_at=probe.steps)
        self._history = History(counts_steps=self._action.counts_steps)
        self._steps = probe.steps
        self._fresh, self._alone, self._has_begun = True, False, False
        self._relative: Number = math.nan
        self._last: tuple[Number, Number] = (math.inf, 1.0)  # length and reduction of the last step
        self._sets_lr = set_lr
        if set_lr:
            check_schedule(optimizer)
            check_free_rate(optimizer, self._calibration.rule, shortens_updates=self._action.shortens_updates)
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
        self._read()
        return float(self._longest())

    @property
    def threshold(self) -> float:
        """Gradient norm above which a step is longer than S [f/x]; NaN where groups differ, or updates are capped.

        That of the averaged gradient where the optimizer clips that; infinite before the first step.
        """
        self._read()
        return float(self._threshold())

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
        return f"{said}; {stage(self._calibration)}{acted(self._history, self._mode)}."

    @property
    def history(self) -> pd.DataFrame:
        """What happened when: one row for each event, with the state after it; see `Event` for the columns."""
        self._read()
        self._note_skipped()
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
        self._read()
        return suggested(self._calibration, self._optimizer, multiple)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs to go on exactly; waits for the device."""
        self._read()
        self._note_skipped()
        return {
            "steps": self._steps,
            "action": type(self._action).__name__,
            "alone": self._alone,
            "last_row": self._rows.last,
            "relative": float(self._relative),
            "peaks": [float(peak) for peak in self._peaks.values],
            "counted": list(self._peaks.counted),
            "calibration": self._calibration.state_dict(),
            **self._history.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from ``state``, as returned by ``state_dict``, by the rule of then.

        Raises:
            ValueError: If it was made with another kind of optimizer, or this one was given another rule.
        """
        check_state(state, self._action, self._calibration.rule if self._has_own_rule else None)
        self._steps, self._fresh, self._alone = int(state["steps"]), True, bool(state["alone"])
        self._rows.last = int(state["last_row"])
        self._relative = float(state["relative"])
        self._peaks.values, self._peaks.counted = list(state["peaks"]), list(state["counted"])
        self._calibration.load_state_dict(state["calibration"])
        self._history.load_state_dict(state)
        # The probe may have decided about its next step by the calibration as it was before.
        self._probe.also(self._is_due, self._measures)

    def detach(self) -> None:
        """Stops acting and measuring. An optimizer that clips by itself keeps the cap that was written last."""
        self._attached = False
        for handle in self._handles:
            handle.remove()
        self._probe.also(self._is_due)  # with nothing

    def _is_due(self, step: int) -> bool:
        return self._attached and self._calibration.due(step)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Arguments | None:
        if not self._outermost.enter(sys._getframe(1)):
            return None
        self._has_begun = False
        if (changed := after_gradient(optimizer, args, kwargs, self._begin)) is None:
            self._begin()
        return changed

    def _begin(self) -> None:
        """Acts on the gradients of a step."""
        self._has_begun = True
        check_gradients(self._optimizer)
        first = self._history.counts.num_acted == 0
        if self._sets_lr and first:  # schedules may be made after AutoClip
            check_schedule(self._optimizer)
        self._follow_probe()
        self._read()
        if self._is_due(self._steps):
            self._arrivals.take(self._steps, gradient_norm(self._optimizer))
        rose = self._peaks.update()
        if first and not self._has_own_rule:  # a schedule made after AutoClip may have set the momentum
            self._calibration.rule = default_rule(self._optimizer, self._action)
        if first or is_in_progression(self._steps):
            self._relative = share_of_parameters(self._optimizer, self._calibration.rule.relative)
        if first:
            self._note("started", explained(self._calibration))
        elif rose and self._calibration.rise(self._steps):
            self._note(ROSE, "the threshold falls as the rate rises; the longest step stays")
        if self._calibration.advance(self._steps):
            self._note("held", explained(self._calibration))
            if self._sets_lr:
                self._set_lr()
        self._action.before(self._longest(), self._history.counts, self._steps)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self._outermost.leave(sys._getframe(1)):
            return
        check_begun(optimizer, has_begun=self._has_begun)
        self._action.after(self._longest(), self._history.counts)
        self._last = self._action.taken(self._longest()), self._action.reduction()
        self._steps += 1
        self._history.counts.num_acted += 1
        self._fresh = False
        if self._history.counts.is_at_hand:
            self._note_skipped()

    def _follow_probe(self) -> None:
        """Notices that the probe has stopped, or was not resumed."""
        if self._probe.steps == self._steps or self._alone:
            return
        if self._fresh:
            raise ValueError(
                "Parameter `probe` should have taken as many steps as AutoClip: load the states of both. Found "
                f"{self._probe.steps} of the probe and {self._steps} of AutoClip."
            )
        self._alone = True
        self._note("probe stopped", "the longest step stays as it is")
        warnings.warn(f"The probe has stopped: {self.reason}", SmoothdiagWarning)

    def _read(self) -> None:
        """Takes up the rows that the probe has recorded since."""
        rows = self._rows.new()
        for row in rows:
            self._arrivals.check(row)
            before, was_measured = self._calibration.longest, self._calibration.is_measured
            found = self._rows.measured(row)
            if isinstance(found, str):
                self._calibration.count_invalid(found)
            elif self._calibration.add(Measurement(row["step"], *found, *map(float, self._last))):
                said = f"from {before:.3g} to {self._calibration.longest:.3g}: {explained(self._calibration)}"
                self._note("lowered", said)
                warnings.warn(f"AutoClip lowered the longest step {said}.", SmoothdiagWarning)
            if self._calibration.is_measured and not was_measured:
                self._note("measured", explained(self._calibration))
        if rows:  # which were waited for
            self._note_skipped()

    def _longest(self) -> Number:
        measured = self._calibration.longest
        if self._calibration.is_measured:
            return measured
        return self._relative if math.isnan(measured) else smaller(self._relative, measured)

    def _threshold(self) -> Number:
        if self._action.shortens_updates:
            return math.nan
        rate = self._peaks.times(self._action.reach)
        return math.inf if not isinstance(rate, Tensor) and rate == 0 else self._longest() / rate

    def _note(self, event: str, note: str, step: int | None = None) -> None:
        state = (self._longest(), self._threshold(), shared(self._peaks.values))
        self._history.add(self._steps if step is None else step, event, *state, note=note)

    def _set_lr(self) -> None:
        lr = self.suggest_lr()
        if raise_rates(self._optimizer, lr):
            self._note("set lr", f"to {lr:.3g}, the best for a single step along the gradient")
            self._peaks.update()

    def _note_skipped(self) -> None:
        number, last = self._history.unnoted()
        if number and number == self._history.num_noted:  # the first ones
            warnings.warn(NOT_FINITE.format(step=last), SmoothdiagWarning)
        if number:
            since = "" if number == 1 else f" in {number} steps, of which this was the last"
            self._note("not finite", f"the gradient counted as zero{since}", last)
