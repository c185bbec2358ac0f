"""AutoClip: the longest step of a run, from what the run itself shows in its first steps."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from smoothdiag import vectors
from smoothdiag.autoclip.acting import Counts, Length, Peaks, ShortenUpdate, action_for
from smoothdiag.autoclip.calibration import FEWEST, Calibration, StepRule
from smoothdiag.measure.arguments import Outermost
from smoothdiag.measure.coordinates import common
from smoothdiag.measure.estimators import DirectionalCurvature, LocalSmoothness
from smoothdiag.measure.probe import Probe
from smoothdiag.rows import USABLE_STATUSES, SmoothdiagWarning

if TYPE_CHECKING:
    import pandas as pd

Mode = Literal["clip", "set", "shadow"]

GRADIENT_RULE, UPDATE_RULE = StepRule(), StepRule(multiple=None, relative=0.01)
"""Defaults where gradients are clipped, and where updates are: there measured curvature was no better than ||x||."""

LOCAL, ALONG_UPDATE = "local", "curvature_update"

EVENT = ("step", "event", "longest_step", "lr", "clipped", "skipped", "note")


class AutoClip:
    """Keeps steps within a length that is set from measured smoothness in the first steps of the run, and then held.

    The longest step is S = multiple * median(||g|| / L) over measurements in the first thirty steps after the learning
    rate has last risen. Until there are five of them a share of ||x|| caps the steps as well. Afterwards S is held;
    it is lowered where later measurements fall by a factor of two, and never raised.

    How it acts depends on the optimizer. `torch.optim.SGD`: gradients are scaled before the step, as by
    `clip_grad_norm_` with max_norm = S / (largest rate so far * gain of the momentum). `ClippedMomentum` and
    `GGNC` (``mode="set"``): their ``longest_step`` or ``threshold`` is written. Any other: what the update is longer
    than S is taken back after the step. A gradient that is not finite counts as zero, before anything averages it.

    Things to know:
        * It asks the probe for some twenty measurements of its own. Give the probe ``estimators=(LocalSmoothness(),)``
          where every gradient counts.
        * Make the probe first, and clip nowhere else: a norm that is clipped already is what it would see.
        * A decay of the rate shortens the longest step with it; a rise leaves S as it is and lowers the threshold.
        * No step waits for the device, but those that are measured do.

    Args:
        optimizer: The optimizer that the probe watches.
        probe: The probe, with a `LocalSmoothness` along the gradient among its estimators.
        mode: ``"clip"`` acts on gradients or updates, ``"set"`` writes the cap of an optimizer that clips by itself,
            ``"shadow"`` changes nothing and only keeps the books.
        rule: How long a step may be; default: ``GRADIENT_RULE``, or ``UPDATE_RULE`` where updates are shortened.

    Raises:
        ValueError: If the probe watches another optimizer or measures no local smoothness, or the mode does not fit.

    Units: longest_step [x], threshold [f/x].
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, probe: Probe, *, mode: Mode = "clip", rule: StepRule | None = None
    ) -> None:
        _check(optimizer, probe, mode)
        self._optimizer, self._probe, self._mode = optimizer, probe, mode
        self._peaks = Peaks(optimizer)
        self._action = action_for(optimizer, mode, self._peaks)
        if rule is None:
            rule = UPDATE_RULE if isinstance(self._action, ShortenUpdate) else GRADIENT_RULE
        self._rows = _rows_for(self._action, rule, probe)
        self._calibration = Calibration(rule)
        self._counts = Counts()
        self._steps, self._last_row = probe.steps, -1
        self._initial: Length = math.nan
        self._events: list[dict[str, Any]] = []
        self._outermost = Outermost()
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        probe.also(self._calibration.due)

    @property
    def longest_step(self) -> float:
        """Length S that steps are kept within at present [x]; waits for the device before the first measurement."""
        self._read()
        return float(self._longest())

    @property
    def threshold(self) -> float:
        """Gradient norm above which a step is longer than S [f/x]; NaN where groups differ, or updates are capped."""
        rates = [float(rate) for rate in self._peaks.steady_rates()]
        if isinstance(self._action, ShortenUpdate) or len(set(rates)) != 1:
            return math.nan
        return self.longest_step / rates[0] if rates[0] > 0 else math.inf

    @property
    def reason(self) -> str:
        """Where the longest step comes from and what it has done so far, in words."""
        self._read()
        state, longest = self._calibration, self.longest_step
        lengths = state.lengths
        if len(state.measurements) < FEWEST:
            why = (
                f"{state.rule.relative:g} ||x||, because there are {len(state.measurements)} valid measurements of the "
                f"{FEWEST} it takes; {state.num_invalid} were not usable, and their status in the trace says why"
            )
        else:
            low, high = state.interval()
            found = f"median ||g||/L {median(lengths):.3g} [{low:.3g}, {high:.3g}], times {state.rule.multiple:g}"
            steps = [m.step for m in state.measurements][: len(lengths)]
            why = f"{len(lengths)} probes in steps {min(steps)}-{max(steps)}: {found}"
            if state.rule.bounded:
                why += f", and at most {state.rule.relative:g} ||x||"
        held = f"held since step {state.held_at}" if state.held_at >= 0 else "still calibrating"
        if state.lowered_at >= 0:
            held += f", lowered at step {state.lowered_at}"
        threshold = self.threshold
        lr = common([float(rate) for rate in self._peaks.values])
        norm = "" if math.isnan(threshold) else f"; at lr {lr:.3g} this is max_norm {threshold:.3g}"
        return f"longest step {longest:.3g} from {why}{norm}; {held}; {self._what_it_did()}."

    @property
    def history(self) -> pd.DataFrame:
        """What happened when: one row for each event, with the state after it."""
        import pandas as pd

        self._read()
        return pd.DataFrame([_as_numbers(event) for event in self._events], columns=EVENT)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs to go on exactly; waits for the device."""
        self._read()
        return {
            "steps": self._steps,
            "last_row": self._last_row,
            "initial": float(self._initial),
            "peaks": [float(peak) for peak in self._peaks.values],
            "clipped": int(self._counts.clipped),
            "skipped": int(self._counts.skipped),
            "calibration": self._calibration.state_dict(),
            "events": [_as_numbers(event) for event in self._events],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from ``state``, as returned by ``state_dict``."""
        self._steps, self._last_row = int(state["steps"]), int(state["last_row"])
        self._initial = float(state["initial"])
        self._peaks.values = list(state["peaks"])
        self._counts.clipped, self._counts.skipped = int(state["clipped"]), int(state["skipped"])
        self._calibration.load_state_dict(state["calibration"])
        self._events = [dict(event) for event in state["events"]]

    def detach(self) -> None:
        """Stops acting. The probe goes on, also with the measurements that were asked of it."""
        for handle in self._handles:
            handle.remove()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self._outermost.enter(sys._getframe(1)):
            return
        if kwargs.get("closure") is not None or any(map(callable, args[1:])):
            raise ValueError("Parameter `optimizer` should step without a closure under AutoClip. Found one.")
        self._read()
        if self._peaks.update() and self._steps > 0:
            if self._calibration.risen_at < self._steps - 1:
                self._note("rate rose", "the threshold falls as the rate rises; the longest step stays")
            self._calibration.rate_rose(self._steps)
        if self._calibration.advance(self._steps):
            self._note("held", f"after {len(self._calibration.lengths)} measurements")
        if isinstance(self._initial, float) and math.isnan(self._initial):
            x = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
            self._initial = self._calibration.rule.relative * vectors.norm(x)
            self._note("started", f"with {self._calibration.rule.relative:g} ||x||, until there are measurements")
        self._action.before(self._longest(), self._counts)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self._outermost.leave(sys._getframe(1)):
            return
        self._action.after(self._longest(), self._counts)
        self._steps += 1

    def _longest(self) -> Length:
        state = self._calibration
        relative: Length = state.rule.relative * state.param_norm if state.param_norm > 0 else self._initial
        if math.isnan(state.longest):
            return relative
        if state.is_measured:
            return state.longest
        return min(state.longest, relative) if isinstance(relative, float) else relative.clamp(max=state.longest)

    def _read(self) -> None:
        """Takes up the rows that the probe has recorded since."""
        state = self._calibration
        for row in self._new_rows():
            self._last_row = row["step"]
            before = state.longest
            state.add(row["step"], self._length(row), row["param_norm"])
            if state.lowered_at == row["step"]:
                self._note("lowered", f"measurements fell to {state.longest / before:.2g} of what they were")
                warnings.warn(f"AutoClip lowered the longest step at step {self._steps}.", SmoothdiagWarning)

    def _new_rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for i in reversed(range(len(self._probe.trace))):
            row = self._probe.trace[i]
            if row["step"] <= self._last_row:
                break
            if row["estimator"] == self._rows and row["group"] == "all":
                rows.append(row)
        return rows[::-1]

    def _length(self, row: Mapping[str, Any]) -> float:
        """Returns the step at which a quadratic with the measured curvature is lowest."""
        if row["status"] not in USABLE_STATUSES or not row["smoothness"] > 0:
            return math.nan
        downhill = row["grad_norm"] if self._rows == LOCAL else -row.get("slope", math.nan)
        return float(downhill / row["smoothness"])

    def _note(self, event: str, note: str) -> None:
        self._events.append(
            {
                "step": self._steps,
                "event": event,
                "longest_step": self._longest(),
                "lr": common([float(rate) for rate in self._peaks.values]),
                "clipped": self._counts.clipped,
                "skipped": self._counts.skipped,
                "note": note,
            }
        )

    def _what_it_did(self) -> str:
        clipped, skipped = int(self._counts.clipped), int(self._counts.skipped)
        said = "no step taken yet" if self._steps == 0 else f"{clipped / self._steps:.0%} of steps clipped so far"
        return said + (f", {skipped} gradients were not finite" if skipped else "")


def _as_numbers(event: Mapping[str, Any]) -> dict[str, Any]:
    counts = {name: int(event[name]) for name in ("clipped", "skipped")}
    return {**event, **counts, "longest_step": float(event["longest_step"])}


def _check(optimizer: torch.optim.Optimizer, probe: Probe, mode: Mode) -> None:
    if mode not in get_args(Mode):
        raise ValueError(f"Parameter `mode` should be one of {get_args(Mode)}. Found `mode = {mode!r}`.")
    if not isinstance(probe, Probe):
        raise ValueError(f"Parameter `probe` should be a Probe. Found `probe = {probe!r}`.")
    if probe.optimizer is not optimizer:
        raise ValueError("Parameter `probe` should watch the same optimizer. Found one made for another.")


def _rows_for(action: object, rule: StepRule, probe: Probe) -> str:
    """Returns the name of the rows that lengths come from: they must not depend on the length of the step taken."""
    along_update = isinstance(action, ShortenUpdate) and rule.multiple is not None
    kind, direction = (DirectionalCurvature, "update") if along_update else (LocalSmoothness, "gradient")
    for estimator in probe.estimators:
        if isinstance(estimator, kind) and estimator.direction == direction:
            return ALONG_UPDATE if along_update else LOCAL
    found = ", ".join(type(estimator).__name__ for estimator in probe.estimators)
    raise ValueError(
        f"Parameter `probe` should have a {kind.__name__}(direction={direction!r}) among its estimators. Found {found}."
    )
