"""History: what happened to the longest step of a run, when, how often, and in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import median
from typing import TYPE_CHECKING, Any

from torch import Tensor

from smoothdiag.autoclip.calibration import (
    FEWEST,
    LEAST_SIGNAL,
    MULTIPLE,
    USUAL_SIGNAL,
    Calibration,
    StepRule,
    median_interval,
)
from smoothdiag.autoclip.rates import Number
from smoothdiag.console import counted

if TYPE_CHECKING:
    import pandas as pd

ROSE, SET_LR, EARLIER = "rate rose", "set lr", "earlier run"

NOT_FINITE = (
    "The gradient of step {step} was not finite (inf or NaN). AutoClip {does}, and counts it in `history`. If there "
    "are many, look for the cause: a rate too large, or a faulty batch."
)
ZEROED = "replaces such a gradient by zero, so that it does no harm"
LEFT = "leaves such a gradient as it is in shadow mode, so that the optimizer steps with it"


@dataclass(frozen=True)
class Event:
    """Something that happened, and the state after it. Its numbers stay on the device until somebody reads them.

    Attributes:
        step: Optimizer steps taken before the event.
        event: What happened, in a word or two.
        longest_step: S [x].
        threshold: Gradient norm above which steps would be longer than S [f/x]; NaN if there is none.
        lr: Largest learning rate so far [x^2/f], of all groups.
        clipped: Steps so far that would have been longer than S; -1 if AutoClip cannot count them.
        skipped: Gradients so far that were not finite.
        note: Details in words.
    """

    step: int
    event: str
    longest_step: Number
    threshold: Number
    lr: Number
    clipped: Tensor | int
    skipped: Tensor | int
    note: str

    def as_numbers(self) -> dict[str, Any]:
        """Returns the fields as a dict of numbers and strings."""
        return {name: value.item() if isinstance(value, Tensor) else value for name, value in vars(self).items()}


class Counts:
    """Counts shortened steps and gradients that were not finite, on the device.

    Attributes:
        num_acted: Steps that were taken.
        clipped: Steps that would have been longer than allowed.
        skipped: Gradients that were not finite.
        last_skipped: Step of the last such gradient, or -1.
    """

    def __init__(self) -> None:
        self.num_acted = 0
        self.clipped: Tensor | int = 0
        self.skipped: Tensor | int = 0
        self.last_skipped: Tensor | int = -1

    @property
    def is_at_hand(self) -> bool:
        """Whether reading them does not wait for a device."""
        return not isinstance(self.skipped, Tensor) or self.skipped.device.type == "cpu"

    def add_clipped(self, clipped: Tensor) -> None:
        """Counts a step."""
        self.clipped = self.clipped + clipped.long()

    def add_gradient(self, finite: Tensor, step: int) -> None:
        """Counts the gradient of a step."""
        skipped = self.skipped + (~finite).long()
        # Arithmetic instead of `where`, which waits for the device: the step if it is not finite, else -1.
        last = ((~finite).long() * (step + 1) - 1).clamp(min=self.last_skipped)
        self.skipped, self.last_skipped = skipped, last  # both, or neither


class History:
    """The events of a run, and what was counted in it.

    Attributes:
        counts_steps: Whether shortened steps can be counted.
        events: What happened.
        counts: Counts of steps and gradients.
        num_noted: Gradients that were not finite and have been added to the events.
        num_faults: Errors of AutoClip that the run has survived.
    """

    def __init__(self, *, counts_steps: bool) -> None:
        self.counts_steps = counts_steps
        self.events: list[Event] = []
        self.counts = Counts()
        self.num_noted = 0
        self.num_faults = 0

    def __contains__(self, event: object) -> bool:
        return any(found.event == event for found in self.events)

    @property
    def clip_fraction(self) -> float:
        """Share of the steps that were shortened; NaN before the first step, or if they cannot be counted."""
        known = self.counts_steps and self.counts.num_acted > 0
        return int(self.counts.clipped) / self.counts.num_acted if known else math.nan

    def add(self, step: int, event: str, *state: Number, note: str) -> None:
        """Adds an event; ``state`` is the longest step, the threshold and the rate."""
        longest, threshold, lr = state
        clipped = self.counts.clipped if self.counts_steps else -1
        if self.events and (event, step) == (self.events[-1].event, self.events[-1].step + 1):
            self.events.pop()  # one event stands for several in a row: `skipped` tells how many there were
        self.events.append(Event(step, event, longest, threshold, lr, clipped, self.counts.skipped, note))

    def unnoted(self) -> tuple[int, int]:
        """Returns how many gradients were not finite since the last call, and the step of the last one."""
        skipped, last = int(self.counts.skipped), int(self.counts.last_skipped)
        before, self.num_noted = self.num_noted, skipped
        return skipped - before, last

    def to_frame(self) -> pd.DataFrame:
        """Returns the events as a DataFrame, one row for each."""
        import pandas as pd

        names = [field.name for field in fields(Event)]
        return pd.DataFrame([event.as_numbers() for event in self.events], columns=names)

    def state_dict(self) -> dict[str, Any]:
        """Returns events and counts as numbers."""
        counts = {name: int(value) for name, value in vars(self.counts).items()}
        noted = {"num_noted": self.num_noted, "num_faults": self.num_faults}
        return {**counts, **noted, "events": [event.as_numbers() for event in self.events]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from ``state``."""
        vars(self.counts).update({name: int(state[name]) for name in vars(self.counts)})
        self.num_noted, self.num_faults = int(state["num_noted"]), int(state["num_faults"])
        self.events = [Event(**event) for event in state["events"]]


def explained(calibration: Calibration) -> str:
    """Returns where the longest step comes from, in words."""
    rule, found = calibration.rule, calibration.early
    relative = f"{rule.relative:g} ||x||"
    if rule.multiple is None:
        return f"{relative}, without measurements"
    if len(calibration.measurements) < FEWEST:
        number = len(calibration.measurements)
        at_most = f"{relative}, or less if measurements say so, " if number else f"{relative}, "
        return f"{at_most}because AutoClip has {number} of the {FEWEST} valid measurements that it needs" + _unusable(
            calibration
        )
    said = f"{_measured(found)}, times {rule.multiple:.3g}{_momentum(rule)}{_noise(calibration)}"
    if (changed := calibration.changing) and max(calibration.lowered_at, calibration.raised_at) >= 0:
        steps, lengths = [m.step for m in changed], [m.length for m in changed]
        if calibration.raised_at > calibration.lowered_at:
            most = f"||g||/L was at least {min(lengths):.3g}, and the steps were as long as allowed"
        else:
            most = f"||g||/L was at most {max(lengths):.3g}, but the steps taken were at least "
            most += f"{min(m.taken for m in changed):.3g} long"
        said = f"{len(steps)} measurements in steps {min(steps)}-{max(steps)}: {most}; before that, from {said}"
    return said + (f", and at most {relative}" if rule.bounded else "") + _unusable(calibration)


def raised(history: History) -> str:
    """Returns how AutoClip changed the learning rate, in words; nothing if it did not."""
    events = [event for event in history.events if event.event == SET_LR]
    if not events:
        return ""
    before, last = history.events[0], events[-1]  # the first event is the start of the run
    return f"; `set_lr` raised the learning rate from {float(before.lr):.3g} to {float(last.lr):.3g} (step {last.step})"


def earlier(history: History) -> str:
    """Returns that the trace held an earlier run, in words that end with a semicolon; nothing if it did not."""
    return next((f"{event.note}; " for event in history.events if event.event == EARLIER), "")


def stage(calibration: Calibration) -> str:
    """Returns how far the calibration has come, in words that end with a semicolon."""
    if calibration.rule.multiple is None:
        return ""
    held, lowered, raised = calibration.held_at, calibration.lowered_at, calibration.raised_at
    if held < 0:
        return "still calibrating; "
    changed = f", raised at step {raised}" if raised > lowered else f", lowered at step {lowered}"
    return f"held since step {held}{changed if max(lowered, raised) >= 0 else ''}; "


def acted(history: History, mode: str) -> str:
    """Returns what was done, in words."""
    skipped, fraction = int(history.counts.skipped), history.clip_fraction
    if not history.counts_steps:
        said = "nothing is set in shadow mode" if mode == "shadow" else "the optimizer clips by itself"
    elif math.isnan(fraction):
        said = "no step taken yet"
    else:
        did = "would have been clipped so far" if mode == "shadow" else "clipped so far"
        said = f"{fraction:.0%} of steps {did}"
    return said + (f"; {counted(skipped, 'gradient was', 'gradients were')} not finite" if skipped else "")


def _measured(measurements: Sequence[Any]) -> str:
    steps, lengths = [m.step for m in measurements], [m.length for m in measurements]
    low, high = median_interval(lengths)
    interval = "" if math.isnan(low) else f" [{low:.3g}, {high:.3g}]"
    said = f"{len(steps)} measurements in steps {min(steps)}-{max(steps)}"
    if saturated := sum(m.saturated for m in measurements):
        said += f" ({saturated} saturated: the gradient turned over within the measured distance)"
    return f"{said}: median ||g||/L {median(lengths):.3g}{interval}"


def _momentum(rule: StepRule) -> str:
    """Returns the momentum that the factor is for, in words; nothing without one, or for a factor given by hand."""
    ratio = ((rule.multiple or MULTIPLE) / MULTIPLE) ** 4  # as `StepRule.for_momentum` makes it
    momentum = round((ratio - 1) / (ratio + 1), 6)
    made = momentum > 0 and StepRule.for_momentum(momentum).multiple == rule.multiple
    return f" (for momentum {momentum:g})" if made else ""


def _noise(calibration: Calibration) -> str:
    """Returns the factor for noise, in words."""
    power, signal = calibration.rule.noise, calibration.signal
    if power == 0 or math.isnan(signal):
        return ""
    raised = "" if power == 1 else f"^{power:g}"
    share = f"halves of a batch share {signal:.2g} of the squared gradient"
    if signal < LEAST_SIGNAL:
        found = f"{signal:.2g}" if signal > 0 else f"nothing ({signal:.2g})"
        share = f"halves of a batch share {found} of the squared gradient, and at least {LEAST_SIGNAL:g} is counted"
    return f" and ({max(signal, LEAST_SIGNAL):.2g} / {USUAL_SIGNAL:g}){raised}, because {share}"


def _unusable(calibration: Calibration) -> str:
    if not calibration.invalid:
        return ""
    each = ", ".join(f"{number} {status}" for status, number in sorted(calibration.invalid.items()))
    return f" ({counted(sum(calibration.invalid.values()), 'row')} could not be used: {each})"
