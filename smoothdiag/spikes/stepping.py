"""Stepping: what a guard does at each step of the optimizer, from top to bottom in the order in which it happens."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from smoothdiag.adapters.skipping import found_by_scaler
from smoothdiag.adapters.turns import Arguments, Turn
from smoothdiag.autoclip.buckets import check_gradients, check_unscaled
from smoothdiag.autoclip.closures import Closures, second_evaluation
from smoothdiag.autoclip.faults import Unfit
from smoothdiag.autoclip.progression import is_in_progression
from smoothdiag.rows import SmoothdiagWarning
from smoothdiag.spikes.acting import DONE, Action, acting_of
from smoothdiag.spikes.events import Journal, Post
from smoothdiag.spikes.further import Further
from smoothdiag.spikes.inquiry import Inquiry
from smoothdiag.spikes.recent import Past
from smoothdiag.spikes.rules import Rule, statistics_of
from smoothdiag.spikes.signals import GRAD_NORM, LOSS, MISSING, UPDATE_NORM, Shown, UpdateNorm, before_step
from smoothdiag.spikes.statistics import Judged, Statistics, beside, lost
from smoothdiag.vectors import world

WITNESSES = 2
"""Gradient norm and loss, which every guard watches; further signals stand behind them."""


@dataclass
class _Begun:
    """A step that the optimizer is about to take.

    Attributes:
        values: Its signals.
        judged: The same, beside what is usual.
        counts: A 0-dim bool: whether the step counts, because the GradScaler does not skip it; ``None`` if it does.
        spiked: A 0-dim bool: whether to act.
        past: What is needed to repeat it.
        rate: Largest learning rate of the step [x^2/f].
    """

    values: Tensor
    judged: Judged
    counts: Tensor | None
    spiked: Tensor
    past: Past
    rate: float | Tensor


class Stepping:
    """Follows an optimizer from step to step.

    Args:
        optimizer: The optimizer.
        action: What to do at a spike.
        rule: What a spike is.
        clip_to: What gradients are clipped to, in usual norms.
        update_norm: Whether to measure updates.
        group: The ranks that train one model together; ``None`` for all.
        inquiry: Finds out why a run spiked.
        further: Further signals to watch; ``None`` for none.

    Attributes:
        shown: What the loop has shown of the step that comes.
        journal: The events.
        steps: Number of steps so far.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        action: Action,
        rule: Rule,
        clip_to: float,
        *,
        update_norm: bool,
        group: dist.ProcessGroup | None,
        inquiry: Inquiry,
        further: Further | None = None,
    ) -> None:
        self._optimizer, self._group, self.inquiry = optimizer, group, inquiry
        self._closures, self._acts = Closures(optimizer, "SpikeGuard"), action != "log"
        self._acting, self._make = acting_of(action, optimizer), statistics_of(rule, clip_to)
        self._update = UpdateNorm(optimizer) if update_norm else None
        self._further, self._clips = further, action == "clip"
        names = [GRAD_NORM, LOSS, *(further.names if further else ()), *([UPDATE_NORM] if update_norm else [])]
        self.shown, self.journal, self.steps = Shown(), Journal(names, ("logged", DONE[action])), 0
        self._statistics: dict[str, Statistics] = {}
        self._loaded: Mapping[str, Any] = {}
        self._last: Tensor | None = None
        self._begun: _Begun | None = None
        self._post, self._stopped, self._first = Post(), False, 0
        self._turn = Turn(optimizer, self._before_step, self._after_step)

    def show(self, loss: Tensor | float | None, grad_norm: Tensor | float | None) -> None:
        """Takes what the loop shows of the step that comes."""
        groups = self._optimizer.param_groups
        if self.shown.has_loss and all(p.grad is None for group in groups for p in group["params"]):
            self.shown.clear()  # a GradScaler has skipped a step: no hook was called, and the gradients are gone
        self.shown.add(loss, grad_norm)

    # 1. The optimizer begins a step.

    def _before_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        self._drop()  # the step before may have ended in an error

        def see(loss: Any) -> None:
            if isinstance(loss, torch.Tensor | float) and not self.shown.has_loss:
                self.shown.add(loss, None)

        changed = self._closures.begin(args, kwargs, self.steps, self._begin_by_closure, self._begin_again, see)
        if changed is None:
            self._begin()
        return changed

    def _begin_by_closure(self) -> None:
        if self._acts:
            self._careful(self._closures.check_place)
        self._begin()

    def _begin_again(self) -> None:
        if self._acts:
            self._careful(lambda: _raise(second_evaluation("SpikeGuard")))

    # 2. Its gradients are there. Without a closure they were there from the start.

    def _begin(self) -> None:
        self._careful(self._judge)

    @torch.no_grad()
    def _judge(self) -> None:
        if self.steps == self._first:
            check_unscaled(self._optimizer)
        if self.steps == self._first or is_in_progression(self.steps):
            check_gradients(self._optimizer, "SpikeGuard")
        measure = None if self._further is None else partial(self._further.values, self.steps)
        values = before_step(self._optimizer, self.shown, self._ranks(), measure)
        if values is None:
            return
        counts = self._counts(values)
        witnesses = values if self._further is None else values.narrow(0, 0, WITNESSES)
        own = judged = self._of("before", lambda on: self._make(1, 1, on), values).judge(witnesses, counts)
        own.fired.logical_or_(lost(witnesses))
        if self._further is not None:
            others = values.narrow(0, WITNESSES, len(self._further.names))
            more = self._of("further", self._further.make, values).judge(others, counts)
            judged = beside(own, more)
        spiked = judged.fired.any() if counts is None else judged.fired.any() & counts
        past = self.inquiry.recent.begin(self.steps, values.device)
        self._begun = _Begun(values, judged, counts, spiked, past, _rate_of(self._optimizer))
        if spiked.device.type == "cpu" and spiked:
            last = torch.full_like(values, MISSING) if self._last is None else self._last
            parts = [judged.fired, values, judged.usual, judged.deviations, last]
            event = self.journal.event(self.steps, [part[: len(values)].tolist() for part in parts])
            self.inquiry.before_step(event, past)
        acts = spiked
        if self._further is not None and self._clips:
            # A part is clipped by itself, and the whole gradient only where the whole spikes.
            self._further.clip(more)
            acts = own.fired.any() & spiked
        self._acting.before(acts, own.target.select(0, 0))
        if self._update is not None:
            self._update.begin(self.steps)

    def _counts(self, values: Tensor) -> Tensor | None:
        found = found_by_scaler(self._optimizer)
        return None if found is None else found.to(values.device, non_blocking=True).reshape(()) == 0

    def _ranks(self) -> dist.ProcessGroup | None:
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(self._group) == 1:
            return None
        return world() if self._group is None else self._group

    def _of(self, name: str, make: Callable[[torch.device], Statistics], like: Tensor) -> Statistics:
        if name not in self._statistics:
            self._statistics[name] = found = make(like.device)
            if name in self._loaded:
                found.load_state_dict(self._loaded[name])
        return self._statistics[name]

    # 3. The optimizer has moved the parameters.

    def _after_step(self) -> None:
        begun = self._begun
        self._acting.after()
        if begun is not None:
            self._careful(lambda: self._note(begun))
        self._drop()
        self.shown.clear()
        self.inquiry.recent.drop()  # of a step without gradients
        self.steps += 1

    @torch.no_grad()
    def _note(self, begun: _Begun) -> None:
        signals = {
            "fired": begun.judged.fired,
            "values": begun.values,
            "usual": begun.judged.usual,
            "deviations": begun.judged.deviations,
        }
        happened = begun.spiked
        if self._update is not None:
            length = self._update.end(self.steps).to(begun.values).reshape(1)
            rate = begun.rate.to(length) if isinstance(begun.rate, Tensor) else begun.rate or math.nan
            statistics = self._of("after", lambda on: self._make(1, 0, on), length)
            judged = statistics.judge(length / rate, begun.counts)
            judged.fired.logical_or_(~length.isfinite())
            late = judged.fired.any()
            happened = happened | (late if begun.counts is None else late & begun.counts)
            usual = judged.usual * rate
            mine = {"fired": judged.fired, "values": length, "usual": usual, "deviations": judged.deviations}
            signals = {name: torch.cat([found, mine[name]]) for name, found in signals.items()}
        is_known = happened.device.type == "cpu"
        self.inquiry.recent.end(begun.past, spiked=is_known and bool(happened))
        if is_known and not happened:
            self._last = signals["values"]
            return
        last = torch.full_like(signals["values"], MISSING) if self._last is None else self._last.to(begun.values)
        self.journal.note(self.steps, happened, begun.spiked, {**signals, "before": last})
        self._last = signals["values"]
        self._bring()

    # 4. The host learns of it.

    def _bring(self) -> None:
        log = self.journal.log
        assert log is not None
        if log.device.type == "cpu":
            self._take(log)
        else:
            self._take(self._post.arrived())
            self._post.send(log)

    def read(self) -> None:
        """Reads the events that the device has noted; waits for it."""
        self._take(self.journal.log)

    def _take(self, log: Tensor | None) -> None:
        for event in self.journal.read(log):
            self.inquiry.after_step(event)

    # Once in a run.

    def state_dict(self) -> dict[str, Any]:
        """Returns the state; waits for the device."""
        self.read()
        return {
            "steps": self.steps,
            "statistics": {**self._loaded, **{name: kept.state_dict() for name, kept in self._statistics.items()}},
            "journal": self.journal.state_dict(),
            "explanations": self.inquiry.state_dict(),
            "last": None if self._last is None else self._last.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state. What is kept on the device gets there at the next step."""
        self.journal.load_state_dict(state["journal"])  # first, because it refuses states of other signals
        self.steps = self._first = int(state["steps"])
        self._loaded = state["statistics"]
        self._statistics = {name: kept for name, kept in self._statistics.items() if name in self._loaded}
        for name, kept in self._statistics.items():
            kept.load_state_dict(self._loaded[name])
        self.inquiry.load_state_dict(state["explanations"])
        self._last = None if state["last"] is None else torch.tensor(state["last"], dtype=torch.float64)

    def detach(self) -> None:
        """Stops following the optimizer."""
        self._turn.stop()
        self._drop()
        self.inquiry.recent.stop()

    def _drop(self) -> None:
        self._begun = None
        self._acting.after()
        if self._update is not None:
            self._update.drop()

    def _careful(self, do: Callable[[], None]) -> None:
        """Does something; an error ends the run only in its first step, where the set-up is wrong."""
        if self._stopped:
            return
        try:
            do()
        except SmoothdiagWarning:  # whoever turns warnings into errors wants to see them
            raise
        except Exception as error:
            self._stopped = self.steps > self._first
            if not self._stopped:
                raise error.error if isinstance(error, Unfit) else error from None
            self.inquiry.recent.stop()
            warnings.warn(
                f"SpikeGuard met an error at step {self.steps}, and the run goes on without it: no spikes are noted "
                f"from here on, and none is skipped or clipped. {type(error).__name__}: {error}",
                SmoothdiagWarning,
            )


def _raise(error: Exception) -> None:
    raise error


def _rate_of(optimizer: torch.optim.Optimizer) -> float | Tensor:
    """Returns the largest rate of the groups; a tensor, if a device holds one."""
    rates = [group["lr"] for group in optimizer.param_groups]
    if not any(isinstance(rate, Tensor) for rate in rates):
        return max(map(float, rates), default=math.nan)
    return torch.stack([torch.as_tensor(rate).detach().reshape(()).double() for rate in rates]).max()
