"""Inquiry: asks why a run spiked, at the moment when it can still be found out, and keeps the answers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from smoothdiag.measure.loss.batches import MicroBatch
from smoothdiag.measure.probe import Probe
from smoothdiag.rows import SPIKE, SmoothdiagWarning, Status
from smoothdiag.spikes.causes import Explanation, explained
from smoothdiag.spikes.events import SpikeEvent
from smoothdiag.spikes.evidence import Evidence, ratio
from smoothdiag.spikes.recent import Past, Recent
from smoothdiag.spikes.replays import benefits, recorded, replayed

FOLLOWS = 5
"""A spike within this many steps of another one is taken for its aftermath."""

TRIES = 3
"""Spikes of one series that are replayed as long as the cause of the first is not known."""

NO_PROBE = "The guard has no probe, so nothing can be replayed. Make a Probe, and pass it to the guard."
NOT_SEEN = (
    "The probe did not see the batches of this step, or they were overwritten since. Loop over `probe.watch(loader)`, "
    "or call `probe.observe(batch)` before each forward pass."
)
TOO_LATE = (
    "The optimizer had moved on when the host learnt of the spike: on a GPU that takes a step or two, and the guard "
    'does not wait. With `keep="parameters"` it would have replayed the step at the weights before it.'
)
AFTERWARDS = "Spikes of the update alone show after the step, and nothing is replayed for them."


class Inquiry:
    """Collects evidence about spikes.

    Args:
        recent: The last steps.
        probe: Replays steps; ``None`` leaves only what is recorded.

    Attributes:
        explanations: The answers so far, by step.
        held_out: Held-out micro-batches, on which clipping is judged besides.
    """

    def __init__(self, recent: Recent, probe: Probe | None) -> None:
        self.recent, self._probe = recent, probe
        self.held_out: Sequence[MicroBatch] = ()
        self.explanations: dict[int, Explanation] = {}
        self._begun: Evidence | None = None
        self._tries = 0

    def before_step(self, event: SpikeEvent, past: Past) -> None:
        """Replays a step that is about to be taken, where its weights are in place."""
        self._begun = self._replayed(event, past, is_present=True)

    def after_step(self, event: SpikeEvent) -> None:
        """Answers for a spike that the host has learnt of."""
        begun, self._begun = self._begun, None
        if begun is None or begun.event.step != event.step:
            past = self.recent.at(event.step)
            begun = self._replayed(event, past, is_present=False)
        before = self._series(event.step)
        # What is known now of the update was not known before the step.
        now = recorded(event, self.recent.at(event.step), self.recent.at(event.step - 1))
        begun = self._benefit(replace(begun, event=event, update_now=now.update_now))
        answer = explained(begun)
        if before is not None and (before.cause != "unknown" or answer.cause == "unknown"):
            text = f"It follows the spike at step {before.event.step}, whose cause is {before.cause}. {before.text}"
            text = before.text if before.text.startswith("It follows") else text
            answer = replace(answer, cause=before.cause, step=before.step, text=text, exclude=before.exclude)
        self.explanations[event.step] = answer
        if self._probe is not None and not self._probe.is_closed:
            self._probe.trace.append(row_of(answer))
        self.recent.forget(event.step)

    def _series(self, step: int) -> Explanation | None:
        """Returns the explanation of the spike that this one follows, if there is one."""
        last = max((known for known in self.explanations if known < step), default=step - FOLLOWS - 1)
        return self.explanations[last] if step - last <= FOLLOWS else None

    def _replayed(self, event: SpikeEvent, past: Past | None, *, is_present: bool) -> Evidence:
        found = recorded(event, past, self.recent.at(event.step - 1))
        series = self._series(event.step)
        self._tries = 1 if series is None else self._tries + 1
        if series is not None and (series.cause != "unknown" or self._tries > TRIES):
            return found
        point = None if past is None else past.point
        if self._probe is None:
            why = NO_PROBE
        elif event.spiked == ("update_norm",):
            why = AFTERWARDS
        elif self._probe.on_any_rank(past is None or not past.can_repeat) or past is None:
            why = NOT_SEEN
        elif not is_present and point is None:
            why = TOO_LATE
        else:
            try:
                with self._probe.in_step():
                    return replayed(found, self._probe, self.recent, past, None if is_present else point)
            except Exception as error:  # a replay that fails must not end the run
                why = f"The replay failed: {type(error).__name__}: {error}"
        return replace(found, why_not=why)

    def _benefit(self, found: Evidence) -> Evidence:
        """Adds what clipping would have been worth, at a long gradient that was not clipped."""
        event, probe = found.event, self._probe
        past, following = self.recent.at(event.step), self.recent.at(event.step + 1)
        long = ratio(event.values, event.usual, "grad_norm")
        if probe is None or past is None or past.point is None or event.done != "logged" or not 1 < long < math.inf:
            return found
        is_present = past.point.packing.like[0].device.type == "cpu"
        end = None if is_present or following is None else following.point
        if "grad_norm" not in event.spiked or not (is_present or end is not None):
            return found
        try:
            with probe.in_step():
                return benefits(found, probe, self.recent, past, end, 1 / long, self.held_out)
        except Exception as error:  # it costs these numbers and nothing else
            if self.held_out:
                warnings.warn(
                    f"What clipping would have been worth at step {event.step} could not be measured, perhaps because "
                    "`held_out` holds no batches that loss_fn takes. The guard goes on without them. "
                    f"{type(error).__name__}: {error}",
                    SmoothdiagWarning,
                )
                self.held_out = ()
                return self._benefit(found)
            return found

    def answer(self, event: SpikeEvent) -> Explanation:
        """Returns why the run spiked at an event; a ValueError if it is none of this guard."""
        if event.step not in self.explanations:
            raise ValueError(
                "Parameter `event` should be one of `guard.events`. Found an event at step "
                f"{event.step}, which this guard has not noted."
            )
        return self.explanations[event.step]

    def state_dict(self) -> list[dict[str, Any]]:
        """Returns the answers as plain values."""
        return [asdict(answer) for answer in self.explanations.values()]

    def load_state_dict(self, state: list[Mapping[str, Any]]) -> None:
        """Goes on from a state."""
        found = [
            Explanation(
                **{
                    **answer,
                    "event": SpikeEvent(**{**answer["event"], "spiked": tuple(answer["event"]["spiked"])}),
                    "exclude": tuple(answer["exclude"]),
                }
            )
            for answer in state
        ]
        self.explanations = {answer.event.step: answer for answer in found}


def row_of(answer: Explanation) -> dict[str, Any]:
    """Returns the row of a trace for a spike; values and what is usual stand in columns for each signal."""
    event = answer.event
    return {
        "step": event.step,
        "estimator": SPIKE,
        "grad_norm": event.values.get("grad_norm", math.nan),
        "smoothness": math.nan,
        "loss": event.values.get("loss", math.nan),
        "status": Status.NOT_MEASURED.name.lower(),
        "data": "step",
        "spiked": " ".join(event.spiked),
        **{f"{name}_value": event.values[name] for name in event.spiked},
        **{f"{name}_usual": event.usual[name] for name in event.spiked},
        **{f"{name}_deviations": event.deviations[name] for name in event.spiked},
        "done": event.done,
        "cause": answer.cause,
        "blamed_step": answer.step,
        "explanation": answer.said,
        **{name: value for name, value in answer.evidence.items() if name.startswith("clip_benefit")},
    }
