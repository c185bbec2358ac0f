"""Events: the spikes of a run, noted on the device as they happen and read by the host later."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from smoothdiag.console import counted
from smoothdiag.vectors import widest

ROOM = 64
"""Events that the device holds until the host reads them."""

OF_MODULE = "grad_norm of "
"""Before the name of a module, in a signal: the norm of its gradient."""

LOUDEST = 3
"""Modules that an event names."""

NOTED = ("fired", "values", "usual", "deviations", "before")
"""What the device notes for each signal of an event."""


@dataclass(frozen=True)
class SpikeEvent:
    """A step at which a signal of the run was far above what is usual, or not finite.

    Attributes:
        step: Number of optimizer steps before this one.
        spiked: The signals that are spikes: ``grad_norm``, ``loss``, ``update_norm``; of modules that are watched, such
            as ``grad_norm of layers.3.mlp``; ``elements`` by the rule `SPAM`.
        values: The signals at this step; a signal that was not given is missing.
        usual: What was usual in the steps before.
        deviations: How far from that, in standard deviations as the rule counts them.
        before: The signals at the step before.
        done: What the guard did: ``"logged"``, ``"skipped"`` or ``"clipped"``.

    Units: grad_norm [f/x], loss [f], update_norm [x]; numbers of elements and their ratios have none.

    Examples:
        >>> event = sd.SpikeEvent(80, ("loss",), {"loss": 9.0}, {"loss": 2.0}, {"loss": 12.5}, {"loss": 2.1})
        >>> print(event)
        step 80: loss 9, usually 2, 12.5 deviations above; logged
    """

    step: int
    spiked: tuple[str, ...]
    values: Mapping[str, float]
    usual: Mapping[str, float]
    deviations: Mapping[str, float]
    before: Mapping[str, float] = field(default_factory=dict)
    done: str = "logged"

    def __str__(self) -> str:
        modules = [name for name in self.spiked if name.startswith(OF_MODULE)]
        said = [name for name in self.spiked if name not in modules] + self.loudest()
        more = [counted(len(modules) - LOUDEST, "further module")] if len(modules) > LOUDEST else []
        return f"step {self.step}: {'; '.join([*map(self._said, said), *more])}; {self.done}"

    def loudest(self, number: int = LOUDEST) -> list[str]:
        """Returns the signals of modules that spiked, those that are not finite first, then by their deviations."""
        found = [name for name in self.spiked if name.startswith(OF_MODULE)]
        away = {name: self.deviations.get(name, math.nan) for name in found}
        order = {name: -x if math.isfinite(self.values[name] + x) else -math.inf for name, x in away.items()}
        return sorted(found, key=order.__getitem__)[:number]

    def _said(self, name: str) -> str:
        value, usual, away = self.values[name], self.usual.get(name, math.nan), self.deviations.get(name, math.nan)
        if not math.isfinite(value):
            return f"{name} is {value}"
        said = f"{name} {value:.4g}, usually {usual:.4g}"
        side = "above" if away > 0 else "below"
        return f"{said}, {abs(away):.3g} deviations {side}" if math.isfinite(away) else said

    def to_dict(self) -> dict[str, Any]:
        """Returns the event as plain values."""
        return asdict(self)


class Journal:
    """The events of a run: on the device until the host reads them, then on the host.

    Args:
        names: The signals.
        actions: What may be done at an event; the device notes the place in this list.

    Attributes:
        events: The events that the host has read.
        num_read: Number of events of the device that the host knows.
        lost: Number of events that the device had no room for, because nobody read them in time.
    """

    def __init__(self, names: Sequence[str], actions: Sequence[str]) -> None:
        self._names, self._actions = tuple(names), tuple(actions)
        self._log: Tensor | None = None
        self.num_read = 0
        self.events: list[SpikeEvent] = []
        self.lost = 0

    @property
    def log(self) -> Tensor | None:
        """What the device holds: the events, a row each, and a last row whose first number counts all of them."""
        return self._log

    def note(self, step: int, happened: Tensor, done: Tensor, signals: Mapping[str, Tensor]) -> None:
        """Notes the signals of a step if ``happened`` is true; without waiting for the device.

        Args:
            step: Number of the step.
            happened: A 0-dim bool.
            done: A 0-dim tensor: the place of what was done in the list of actions.
            signals: For each name of `NOTED`, one number for each signal.
        """
        dtype, device = widest(happened.device), happened.device
        if self._log is None:
            width = 2 + len(NOTED) * len(self._names)
            self._log = torch.zeros(ROOM + 1, width, dtype=dtype, device=device)
        number = torch.full((1,), float(step), dtype=dtype, device=device)
        row = torch.cat([number, done.to(dtype).reshape(1), *(signals[name].to(dtype) for name in NOTED)])
        count = self._log.select(0, ROOM).select(0, 0)
        place = (count.long() % ROOM).reshape(1, 1).expand(1, len(row))
        self._log.scatter_(0, place, torch.where(happened, row.unsqueeze(0), self._log.gather(0, place)))
        count += happened

    def read(self, log: Tensor | None) -> list[SpikeEvent]:
        """Returns the events that are new in a copy of ``log`` on the host, and adds them to ``events``."""
        if log is None:
            return []
        rows: list[list[float]] = log.tolist()
        total = int(rows[-1][0])
        first = max(self.num_read, total - ROOM)
        self.lost += first - self.num_read if total > self.num_read else 0
        found = [self._event(rows[number % ROOM]) for number in range(first, total)]
        self.num_read = max(self.num_read, total)
        self.events += found
        return found

    def _event(self, row: Sequence[float]) -> SpikeEvent:
        number = len(self._names)
        parts = [row[2 + i * number : 2 + (i + 1) * number] for i in range(len(NOTED))]
        return self.event(int(row[0]), parts, self._actions[int(row[1])])

    def event(self, step: int, parts: Sequence[Sequence[float]], done: str = "logged") -> SpikeEvent:
        """Returns an event.

        Args:
            step: Number of the step.
            parts: For each name of `NOTED`, numbers of the first signals.
            done: What was done.
        """
        names = self._names[: len(parts[0])]
        fired, *others = (dict(zip(names, part, strict=True)) for part in parts)
        # A signal that was not given is -inf, which no norm and no loss of a run in training is.
        given = {name for name in names if others[0][name] != -math.inf}
        values, usual, deviations, before = (
            {name: value for name, value in part.items() if name in given} for part in others
        )
        return SpikeEvent(
            step=step,
            spiked=tuple(name for name in names if fired[name]),
            values=values,
            usual=usual,
            deviations=deviations,
            before={name: value for name, value in before.items() if value != -math.inf},
            done=done,
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns the events that have been read."""
        return {
            "events": [event.to_dict() for event in self.events],
            "lost": self.lost,
            "signals": list(self._names),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state.

        Raises:
            ValueError: If it is of other signals.
        """
        theirs = tuple(state.get("signals", self._names))
        if theirs != self._names:
            raise ValueError(
                "Parameter `state` should come from a guard with the same rule and the same signals. This guard "
                f"watches {', '.join(self._names)}. Found a state of {', '.join(theirs)}."
            )
        self.events = [SpikeEvent(**{**event, "spiked": tuple(event["spiked"])}) for event in state["events"]]
        self.lost = int(state["lost"])
        self._log, self.num_read = None, 0


class Post:
    """Brings copies of a tensor from a device to the host, without waiting: the host looks whether one has arrived.

    On a CPU there is nothing to bring.
    """

    def __init__(self) -> None:
        self._sent: tuple[Tensor, Any] | None = None
        self._memory: Tensor | None = None

    def send(self, tensor: Tensor) -> None:
        """Sends a copy, unless one is on its way."""
        if self._sent is not None or not torch.accelerator.is_available():
            return
        if self._memory is None:
            self._memory = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._memory.copy_(tensor, non_blocking=True)
        arrival = torch.Event(tensor.device)
        arrival.record()
        self._sent = self._memory, arrival

    def arrived(self) -> Tensor | None:
        """Returns the copy that has arrived; ``None`` if there is none. It is valid until the next ``send``."""
        if self._sent is None or not self._sent[1].query():
            return None
        found, self._sent = self._sent[0], None
        return found
