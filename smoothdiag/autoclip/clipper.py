"""AutoClip: the clipper that hooks into an optimizer and keeps its steps within a measured length."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from smoothdiag.adapters import adapter_of, finish, name_of
from smoothdiag.autoclip.acting import Action
from smoothdiag.autoclip.advice import kept, next_step
from smoothdiag.autoclip.benefit import Benefit, Judged, judged, mean_before, worth
from smoothdiag.autoclip.books import Books
from smoothdiag.autoclip.calibration import Calibration, StepRule
from smoothdiag.autoclip.checks import (
    VERSION,
    Mode,
    check,
    check_free_rate,
    check_schedule,
    check_state,
    warn_of_another,
)
from smoothdiag.autoclip.history import acted, earlier, explained, raised, stage
from smoothdiag.autoclip.rates import Peaks, shared, suggested
from smoothdiag.autoclip.rows import ALONG_GRADIENT, Arrivals, ForClipping, Rows
from smoothdiag.autoclip.step import Stepping, default_rule, raise_by
from smoothdiag.autoclip.ways import action_for
from smoothdiag.measure.estimators import Estimator
from smoothdiag.measure.loss import batches
from smoothdiag.measure.probe import Probe
from smoothdiag.notebooks import as_html

if TYPE_CHECKING:
    import pandas as pd

    from smoothdiag.trace import Trace


class AutoClip:
    """Keeps every step within a length S that it measures in the first steps of the run, and then holds.

    AutoClip sets S = multiple * median(||g|| / L) * (signal / 0.5)^(1/2) from measurements in the first thirty steps;
    the signal is the share of ||g||^2 that two halves of a batch have in common. Until it has five measurements, a
    share of ||x|| limits the steps as well. Afterwards S stays. It is lowered if three measurements in a row say that
    the step taken was more than twice too long. Where gradients are clipped, it is raised if two in a row, of steps as
    long as S, would allow more than twice as much.

    How AutoClip acts depends on the optimizer:
        * `torch.optim.SGD`: it scales the gradients before the step, as `clip_grad_norm_` does with
          max_norm = S / (peak of the learning rate * gain of the momentum). During a warm-up, the peak is the one that
          the schedule has left in the optimizer, otherwise the largest rate so far.
        * `ClippedMomentum` and `GGNC`, with ``mode="set"``: it writes their ``longest_step`` or ``threshold``.
        * Any other: it lets the optimizer step, and shortens the update to S if it was longer.
        * A list of optimizers: S is the length of the step that all of them take together. Gradients are scaled before
          the first of them steps, and updates shortened after the last.

    A gradient that is not finite counts as zero, before anything averages it.

    Things to know:
        * It measures thirteen of the first thirty steps, then at least one in 200. Each takes two gradients, and one
          more in the first thirty steps, for the halves of the batch.
        * Make the probe first, and clip nowhere else. AutoClip cannot measure a gradient that something has clipped.
        * If gradients are clipped, steps shrink with a learning rate that decays. If it rises above the planned peak, S
          stays and the threshold falls.
        * Only measured steps wait for the device.
        * To resume, load the states of model, optimizer, probe and AutoClip, in any order.

    Args:
        optimizer: The optimizer that the probe watches, or the list of optimizers that step on one loss.
        probe: A probe of that optimizer. It may measure whatever else you like, or nothing.
        mode: ``"clip"`` acts on gradients or updates. ``"set"`` writes the cap of an optimizer that clips by itself.
            ``"shadow"`` changes nothing, and only records what it would have done.
        rule: How long a step may be. Default: ``StepRule.for_momentum`` with the optimizer's momentum, or with 0 if
            AutoClip shortens updates.
        set_lr: Whether to raise the learning rate, from the fifth measurement on and until S is held, to the rate at
            which half of the early steps are as long as S, or longer. It is never lowered.
        estimator: What measures L. Default: secants over a hundredth of ||x|| along the gradient.
        held_out: Held-out batches, of the kind that ``loss_fn`` takes, on which a shadow judges clipping besides; see
            ``benefits``.

    Raises:
        ValueError: If the probe watches another optimizer, or an option does not fit the optimizer. Also if shorter
            steps would spoil the optimizer: because it moves a copy of the parameters (schedule-free, Lookahead), or
            because it estimates its own rate (Prodigy). For classes that AutoClip does not know, it finds this out at
            the end of the first step, before it has shortened anything.

    Units: longest_step [x], threshold [f/x].

    Examples:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> probe = sd.Probe(model, optimizer, lambda model, x: model(x).square().mean(), estimators=())
        >>> sd.AutoClip(optimizer, probe)  # it clips from the first step on
        <AutoClip of SGD, mode 'clip'; `reason` says more>
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        probe: Probe,
        *,
        mode: Mode = "clip",
        rule: StepRule | None = None,
        set_lr: bool = False,
        estimator: Estimator | None = None,
        held_out: Iterable[Any] | None = None,
    ) -> None:
        check(optimizer, probe, mode, rule, estimator, set_lr=set_lr, has_held_out=held_out is not None)
        self._optimizer, self._probe, self._mode = (optimizer := probe.optimizer), probe, mode
        self._peaks = Peaks(optimizer)
        self._action: Action = action_for(optimizer, mode, self._peaks)
        self._calibration = Calibration(
            rule or default_rule(optimizer, self._action),
            joined_at=probe.steps,
            raise_by=raise_by(self._action),
        )
        self._measures = ForClipping(
            estimator or ALONG_GRADIENT, self._calibration.wants_signal, state=lambda: self._books.columns(mode)
        )
        self._rule_is_given = rule is not None
        # A gradient that another AutoClip has clipped is no news once its presence is.
        is_second = warn_of_another(optimizer, Stepping)
        arrivals = Arrivals(None if estimator or is_second else probe, acts=mode != "shadow")
        self._books = Books(self._action, self._peaks, self._calibration, Rows(probe), arrivals, steps=probe.steps)
        self._history = self._books.history
        if set_lr:
            check_schedule(optimizer)
            check_free_rate(self._calibration.rule)
        self._stepping = Stepping(
            optimizer,
            probe,
            self._action,
            self._peaks,
            arrivals,
            self._books,
            rule_is_given=self._rule_is_given,
            sets_lr=set_lr,
            reason=lambda: self.reason.split("\n")[-1],
        )
        probe.also(self._stepping.is_due, self._measures)
        if mode == "shadow" and self._action.counts_steps:
            judges = [] if held_out is None else batches.held_out(held_out, 0, probe.parameters, "held_out")
            self._stepping.benefit = benefit = Benefit(probe, self._action, self._books, judges)
            probe.also(self._stepping.is_judged, benefit)

    def __repr__(self) -> str:
        # It waits for no device.
        state = "" if self._stepping.attached else ", detached"
        return f"<AutoClip of {name_of(self._optimizer)}, mode {self._mode!r}{state}; `reason` says more>"

    def _repr_html_(self) -> str:
        return as_html(self.reason, self.history.drop(columns="note"))

    @property
    def longest_step(self) -> float:
        """The length S that no step exceeds at present [x]; NaN before the first step.

        Reading it before the first measurement waits for the device. One rank may read it alone.
        """
        self._books.read()
        return float(self._books.longest())

    @property
    def threshold(self) -> float:
        """The gradient norm above which a step would be longer than S [f/x]; infinite before the first step.

        For an optimizer that clips an average of gradients, it is a norm of that average. NaN if the groups have
        different thresholds, if AutoClip shortens updates, or in shadow mode if the run went wrong (see `reason`).
        """
        self._books.read()
        return math.nan if self._books.diverged(self._mode) else float(self._books.threshold())

    @property
    def clip_fraction(self) -> float:
        """Share of steps so far that would have been longer than S; NaN before the first, or if the optimizer clips."""
        return self._history.clip_fraction

    @property
    def trace(self) -> Trace:
        """The rows of the probe."""
        return self._probe.trace

    @property
    def reason(self) -> str:
        """What AutoClip does and what to do next, a line each; below, where the longest step comes from, in words."""
        longest, threshold, lr = self.longest_step, self.threshold, float(shared(self._peaks.values))
        facts = self._books.facts(self._mode, stopped=bool(self._stepping.guard.stopped))
        acts_by = "clip" if self._action.counts_steps else "set"
        limit = threshold if self._action.counts_steps else math.nan
        said = kept(longest, limit, lr, facts, acts_by=acts_by) + raised(self._history)
        todo = next_step(self._calibration, facts, acts_by=acts_by)
        head = f"AutoClip: {said}; {acted(self._history, self._mode)}.\nNEXT: {todo}\n"
        is_known = not (facts.diverged or math.isnan(longest))
        said = f"longest step {f'{longest:.3g} ' if is_known else ''}from {explained(self._calibration)}"
        if math.isfinite(threshold) and not facts.diverged:
            name = "max_norm" if self._action.counts_steps else "a threshold on the averaged gradient of"
            peak = ", the peak that the schedule plans," if self._peaks.is_ahead else ""
            said += f"; at lr {lr:.3g}{peak} this is {name} {threshold:.3g}"
        if self._stepping.alone:
            said += "; the probe has stopped, so it will not change any more"
        if self._stepping.guard.stopped:
            said += "; AutoClip has stopped acting, see `history`"
        now = f"{earlier(self._history)}{stage(self._calibration)}{worth(judged(self._probe.trace))}"
        return f"{head}{said}; {now}{acted(self._history, self._mode)}."

    @property
    def history(self) -> pd.DataFrame:
        """What happened and when: one row for each event, with the state after it. See `Event` for the columns.

        There is one more: clip_benefit, the mean of the ``benefits`` so far, on held-out batches if there are any [f].
        """
        self._books.read()
        self._books.note_skipped()
        frame, found = self._history.to_frame(), judged(self._probe.trace)
        return frame.assign(clip_benefit=[mean_before(found, step) for step in frame["step"]])

    @property
    def benefits(self) -> pd.DataFrame:
        """In shadow mode, what clipping would have been worth: one row for each step that was looked at and was long.

        A shadow looks at steps at which the probe measures anyway, and at most at one in ten. Where a step is longer
        than S, it evaluates the loss at its end, and at the end of the same step shortened to S: two forward passes,
        and two more for each held-out batch.

        Columns: step, share (length of the shortened step, as a share of the step taken), clip_benefit (how much lower
        the loss of the step's batch would be [f]) and clip_benefit_held_out (the same on the held-out batches; NaN
        without any). They are negative where clipping would have done harm.
        """
        import pandas as pd

        return pd.DataFrame(judged(self._probe.trace), columns=Judged._fields)

    def suggest_lr(self, multiple: float = 1.0) -> float:
        """Returns a learning rate that makes steps as long as the measured curvature allows.

        Clipping can shorten steps, but it cannot make up for a rate that is too small. The suggestion is a multiple of
        the rate at which an early step of median length is as long as ||g||/L. If AutoClip clips gradients, that is
        multiple * median(1/L) / gain. With a multiple of 1, a step along the gradient is the best one on the measured
        batch. If AutoClip shortens updates, as under AdamW, it is multiple * median(rate * ||g||/L / length of the
        update). With the multiple of ||g||/L that S is, S begins to limit such steps; ``set_lr`` takes that one.

        Args:
            multiple: Length of the step in units of ||g||/L.

        Returns:
            The rate of the group with the largest one, in the convention of the optimizer; NaN with fewer than five
            measurements.

        Raises:
            ValueError: If the rule measures nothing, or if ``multiple`` is not positive and finite.

        Units: [x^2/f].
        """
        check_free_rate(self._calibration.rule)
        self._books.read()
        # An optimizer that clips by itself averages gradients; how its cap is shortened does not matter here.
        gain = self._action.reach if self._action.counts_steps else adapter_of(self._optimizer).gain
        return suggested(self._calibration, self._optimizer, multiple, gain)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs to go on exactly; waits for the device.

        If an optimizer of a list has been left out of the last step, the step ends here.
        """
        finish(self._optimizer)
        self._books.read()
        self._books.note_skipped()
        return {
            "version": VERSION,
            "action": type(self._action).__name__,
            "alone": self._stepping.alone,
            "stopped": self._stepping.guard.stopped,
            "judged_at": self._stepping.judged_at,
            **self._books.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from ``state``, as returned by ``state_dict``, with the rule that was in force there.

        Raises:
            ValueError: If the state comes from another kind of optimizer or from a newer version, if something is
                missing in it, or if this AutoClip was given another rule.
        """
        state = check_state(state, self._action, self._calibration.rule if self._rule_is_given else None)
        self._books.load_state_dict(state)
        self._stepping.resume(
            alone=bool(state["alone"]), stopped=str(state["stopped"]), judged_at=int(state["judged_at"])
        )
        # The probe may have decided about its next step by the calibration as it was before.
        self._probe.also(self._stepping.is_due, self._measures)

    def outlive_errors(self) -> None:
        """Keeps errors of the first step out of the run, as later ones, because nobody asked for this AutoClip."""
        self._stepping.guard.spares = True

    def detach(self) -> None:
        """Stops acting and measuring. An optimizer that clips by itself keeps the last cap that AutoClip wrote."""
        finish(self._optimizer)
        self._stepping.detach()
        self._probe.also(self._stepping.is_due)  # with nothing
        self._probe.also(self._stepping.is_judged)
