"""AutoClip: the clipper that hooks into an optimizer and keeps its steps within a measured length."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from smoothdiag.autoclip.acting import Action, action_for
from smoothdiag.autoclip.books import Books
from smoothdiag.autoclip.calibration import Calibration, StepRule
from smoothdiag.autoclip.checks import VERSION, Mode, check, check_free_rate, check_schedule, check_state
from smoothdiag.autoclip.history import acted, explained, stage
from smoothdiag.autoclip.rates import Peaks, shared, suggested
from smoothdiag.autoclip.rows import ALONG_GRADIENT, Arrivals, ForClipping, Rows
from smoothdiag.autoclip.step import Stepping, default_rule
from smoothdiag.measure.estimators import Estimator
from smoothdiag.measure.probe import Probe

if TYPE_CHECKING:
    import pandas as pd

    from smoothdiag.trace import Trace


class AutoClip:
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
        self._measures, self._rule_is_given = ForClipping(estimator or ALONG_GRADIENT), rule is not None
        self._calibration = Calibration(rule or default_rule(optimizer, self._action), joined_at=probe.steps)
        arrivals = Arrivals(None if estimator else probe, acts=mode != "shadow")
        self._books = Books(self._action, self._peaks, self._calibration, Rows(probe), arrivals, steps=probe.steps)
        self._history = self._books.history
        if set_lr:
            check_schedule(optimizer)
            check_free_rate(optimizer, self._calibration.rule, shortens_updates=self._action.shortens_updates)
        self._stepping = Stepping(
            optimizer,
            probe,
            self._action,
            self._peaks,
            arrivals,
            self._books,
            rule_is_given=self._rule_is_given,
            sets_lr=set_lr,
            reason=lambda: self.reason,
        )
        probe.also(self._stepping.is_due, self._measures)

    def __repr__(self) -> str:
        # It waits for no device.
        state = "" if self._stepping.attached else ", detached"
        return f"<AutoClip of {type(self._optimizer).__name__}, mode {self._mode!r}{state}; `reason` says more>"

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
        if self._stepping.alone:
            said += "; the probe has stopped, so nothing will change it any more"
        if self._stepping.guard.stopped:
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
            "alone": self._stepping.alone,
            "stopped": self._stepping.guard.stopped,
            **self._books.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from ``state``, as returned by ``state_dict``, by the rule of then.

        Raises:
            ValueError: If it was made with another kind of optimizer or by a newer version, something is missing in
                it, or this AutoClip was given another rule.
        """
        state = check_state(state, self._action, self._calibration.rule if self._rule_is_given else None)
        self._books.load_state_dict(state)
        self._stepping.resume(alone=bool(state["alone"]), stopped=str(state["stopped"]))
        # The probe may have decided about its next step by the calibration as it was before.
        self._probe.also(self._stepping.is_due, self._measures)

    def detach(self) -> None:
        """Stops acting and measuring. An optimizer that clips by itself keeps the cap that was written last."""
        self._stepping.detach()
        self._probe.also(self._stepping.is_due)  # with nothing
