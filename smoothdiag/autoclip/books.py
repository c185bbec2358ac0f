"""Books: how long a step may be at present, why, and what has happened so far."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from smoothdiag.autoclip.acting import Action
from smoothdiag.autoclip.advice import Facts
from smoothdiag.autoclip.calibration import Calibration, Measurement
from smoothdiag.autoclip.history import LEFT, NOT_FINITE, ZEROED, Counts, History, explained
from smoothdiag.autoclip.progression import is_in_progression
from smoothdiag.autoclip.rates import Number, Peaks, largest, smaller
from smoothdiag.autoclip.rows import Arrivals, Rows
from smoothdiag.diverged import why_diverged
from smoothdiag.memory import is_out_of_memory, retried
from smoothdiag.rows import SmoothdiagWarning


class Books:
    """Keeps the longest step up to date from the rows of the probe.

    Args:
        action: How AutoClip acts.
        peaks: Largest learning rates so far.
        calibration: Turns measurements into a longest step.
        rows: The rows of the probe.
        arrivals: Compares gradients with their measurements.
        steps: Steps of the optimizer so far.

    Attributes:
        steps: Steps of the optimizer so far.
        relative: The limit that follows from the length of the parameters [x]; NaN before the first step.
        last: Length of the last step [x], and how far averaging and a decayed rate shortened it.
        calibration: Turns measurements into a longest step.
        history: What has happened.
    """

    def __init__(
        self, action: Action, peaks: Peaks, calibration: Calibration, rows: Rows, arrivals: Arrivals, *, steps: int
    ) -> None:
        self._action, self._peaks, self._rows, self._arrivals = action, peaks, rows, arrivals
        self.calibration, self.history = calibration, History(counts_steps=action.counts_steps)
        self.steps = steps
        self.relative: Number = math.nan
        self.last: tuple[Number, Number] = (math.inf, 1.0)

    @property
    def counts(self) -> Counts:
        """Counts of shortened steps and of gradients that were not finite."""
        return self.history.counts

    @property
    def has_cap(self) -> bool:
        """Whether there is a longest step yet."""
        return isinstance(self.relative, Tensor) or not math.isnan(self.relative)

    def longest(self) -> Number:
        """Returns the longest step [x]; NaN if it is not known yet."""
        measured = self.calibration.longest
        if self.calibration.is_measured:
            return measured
        return self.relative if math.isnan(measured) else retried(lambda: smaller(self.relative, measured))

    def threshold(self) -> Number:
        """Returns the gradient norm above which a step would be longer [f/x]; NaN if there is none."""
        return math.nan if self._action.shortens_updates else retried(self._threshold)

    def diverged(self, mode: str) -> str:
        """Returns why the steps of a run that nothing clips tell no threshold; empty if they do."""
        return why_diverged(self._rows.all(), not_finite=int(self.counts.skipped)) if mode == "shadow" else ""

    def facts(self, mode: str, *, stopped: bool) -> Facts:
        """Returns what a reader of the reason has to know; waits for the device."""
        since = self.steps - self.calibration.joined_at
        return Facts(mode, since, stopped, self.diverged(mode), self._arrivals.clipped_at)

    def columns(self, mode: str) -> dict[str, float | str]:
        """Returns the state as columns of a row: what held at the step that is measured. It waits for the device.

        A state that cannot be read costs these columns and nothing else.
        """
        state = {"longest_step": self.longest, "threshold": self.threshold, "peak_lr": self._peak}
        try:
            found: dict[str, float] = {name: float(value()) for name, value in state.items()}
            found["clip_fraction"] = float(self.history.clip_fraction)
        except Exception:  # such as for want of memory
            return {}
        return {"clip_mode": mode, **{name: value for name, value in found.items() if not math.isnan(value)}}

    def read(self) -> None:
        """Reads the rows that the probe has written since the last call."""
        rows = self._rows.new()
        for row in rows:
            try:
                self._take(row)
            except SmoothdiagWarning:
                raise
            except Exception as error:  # a row that cannot be read costs one measurement and nothing else
                self.calibration.count_invalid(
                    "without memory" if is_out_of_memory(error) else f"unreadable ({type(error).__name__})"
                )
        if rows:  # the device has been waited for already
            self.note_skipped()

    def finish_step(self) -> None:
        """Notes the length of a step that has been taken."""
        self.last = retried(lambda: (self._action.taken(self.longest()), self._action.reduction()))

    def note(self, event: str, note: str, step: int | None = None) -> None:
        """Adds an event to the history, with the state after it."""
        state = (self.longest(), self.threshold(), self._peak())
        self.history.add(self.steps if step is None else step, event, *state, note=note)

    def note_fault(self, event: str, note: str) -> None:
        """Adds a fault as an event, whatever state the run is in. Of many faults it adds fewer and fewer."""
        self.history.num_faults += 1
        if not is_in_progression(self.history.num_faults - 1):
            return
        try:
            self.note(event, note)
        except Exception:  # the state itself cannot be read
            self.history.add(self.steps, event, math.nan, math.nan, math.nan, note=note)

    def note_skipped(self) -> None:
        """Adds the gradients that were not finite as an event, and warns of the first."""
        number, last = retried(self.history.unnoted)
        if number and number == self.history.num_noted:  # the first ones
            does = ZEROED if self._arrivals.acts else LEFT
            warnings.warn(NOT_FINITE.format(step=last, does=does), SmoothdiagWarning)
        if number:
            since = "" if number == 1 else f" in {number} steps, of which this was the last"
            said = "the gradient counted as zero" if self._arrivals.acts else "the optimizer stepped with it"
            self.note("not finite", f"{said}{since}", last)

    def state_dict(self) -> dict[str, Any]:
        """Returns all books as numbers."""
        return {
            "steps": self.steps,
            "last_row": self._rows.last,
            "relative": float(self.relative),
            **self._peaks.state_dict(),
            "calibration": self.calibration.state_dict(),
            **self.history.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from ``state``."""
        self.steps, self._rows.last = int(state["steps"]), int(state["last_row"])
        self.relative = float(state["relative"])
        self._peaks.load_state_dict(state)
        self.calibration.load_state_dict(state["calibration"])
        self.history.load_state_dict(state)

    def _take(self, row: Mapping[str, Any]) -> None:
        retried(lambda: self._arrivals.check(row))
        before, was_measured = self.calibration.longest, self.calibration.is_measured
        found = self._rows.measured(row)
        if isinstance(found, str):
            self.calibration.count_invalid(found)
        else:
            taken, reduction = retried(lambda: [float(value) for value in self.last])
            signal, saturated = float(row.get("signal", math.nan)), row["status"] == "saturated"
            length, rate = found
            if self._action.shortens_updates:
                rate = retried(lambda: self._rate_of(length))
            measurement = Measurement(row["step"], length, rate, taken, reduction, signal, saturated)
            if changed := self.calibration.add(measurement):
                said = f"from {before:.3g} to {self.calibration.longest:.3g}: {explained(self.calibration)}"
                self.note(changed, said)
                if changed == "lowered":
                    warnings.warn(f"AutoClip lowered the longest step {said}.", SmoothdiagWarning)
        if self.calibration.is_measured and not was_measured:
            self.note("measured", explained(self.calibration))

    def _rate_of(self, length: float) -> float:
        """Returns the rate at which the last update would have had this length; NaN if it did not move."""
        moved = float(self._action.unclipped())
        return float(self._peaks.rate) * length / moved if 0 < moved < math.inf else math.nan

    def _peak(self) -> Number:
        return retried(lambda: largest(self._peaks.values))

    def _threshold(self) -> Number:
        rate = self._peaks.times(self._action.reach)
        return math.inf if not isinstance(rate, Tensor) and rate == 0 else self.longest() / rate
