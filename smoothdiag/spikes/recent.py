"""Recent: the last steps of a run, kept to repeat them: batches, random states, rates, and parameters on request."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from smoothdiag.measure.loss.batches import MicroBatch, map_tensors, tensors_of
from smoothdiag.measure.probe import Probe
from smoothdiag.packing import Kept, Packing

DEPTH, DEPTH_ON_DEVICE = 2, 4
"""Steps that are kept. A GPU is a step or two behind the host, which learns of a spike later."""

REFERENCES, FIRST = 4, 25
"""Earlier steps whose batches a spike is compared with, and the first of them; each further one is twice as late.
So some come from before a phase in which the batches were easy."""

RATES = 5
"""Steps before one that tell its usual rate."""


@dataclass
class Past:
    """A step that was taken, or is about to be.

    Attributes:
        step: Number of the step.
        micro_batches: Its batches, by reference.
        numbers: Which batches these are, in the order in which the probe saw them.
        rate: Largest learning rate [x^2/f]; NaN if a device holds it.
        usual_rate: Median of the rates of the steps before.
        point: The parameters before it, if they are kept.
    """

    step: int
    micro_batches: Sequence[MicroBatch] = ()
    numbers: tuple[int, ...] = ()
    rate: float = math.nan
    usual_rate: float = math.nan
    point: Kept | None = None
    _versions: list[tuple[Tensor, int]] = field(default_factory=list, repr=False)

    @property
    def relative_rate(self) -> float:
        """Its rate in usual rates; NaN where those are 0, as at the start of a warm-up."""
        return self.rate / self.usual_rate if self.usual_rate else math.nan

    @property
    def can_repeat(self) -> bool:
        """Whether its batches were seen, and are as they were."""
        return bool(self.micro_batches) and all(tensor._version == version for tensor, version in self._versions)


class Recent:
    """The last steps of a run.

    Args:
        optimizer: The optimizer.
        probe: The probe that sees the batches; ``None`` keeps rates alone.
        keeps_parameters: Whether to keep the parameters before each step, in host memory.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, probe: Probe | None, *, keeps_parameters: bool) -> None:
        self._optimizer, self._probe, self._keeps = optimizer, probe, keeps_parameters and probe is not None
        self._batches: list[tuple[MicroBatch, int]] = []
        self._versions: list[tuple[Tensor, int]] = []
        self._rates: deque[float] = deque(maxlen=RATES)
        self._steps: deque[Past] = deque(maxlen=DEPTH)
        self._references: deque[Past] = deque(maxlen=REFERENCES)
        self._memory: list[list[Tensor]] = []
        self._packing: Packing | None = None
        self._next, self.num_batches = FIRST, 0
        if probe is not None:
            probe.listen(self.meet)

    def meet(self, make: Callable[[], Any], weight: float | None) -> None:
        """Keeps a micro-batch of the step that comes."""
        probe = self._probe
        if probe is None:
            return
        number, self.num_batches = self.num_batches, self.num_batches + 1
        if self._batches and all(p.grad is None for p in probe.parameters):
            self.drop()  # a GradScaler has skipped a step, or the loop has: its gradients are gone
        batch = map_tensors(make(), lambda tensor: tensor)
        self._batches.append((MicroBatch(batch, probe.random_state(), None, weight), number))
        # Tensors made in inference mode do not count writes.
        self._versions += [(tensor, tensor._version) for tensor in tensors_of(batch) if not tensor.is_inference()]

    def begin(self, step: int, device: torch.device) -> Past:
        """Returns the step that the optimizer is about to take, and keeps it."""
        rate = self._rate()
        usual = median(self._rates) if self._rates else math.nan
        micro_batches, numbers = [m for m, _ in self._batches], tuple(n for _, n in self._batches)
        past = Past(step, micro_batches, numbers, rate, usual, self._point(device), self._versions)
        self.drop()
        self._rates.append(rate)
        depth = DEPTH if device.type == "cpu" else DEPTH_ON_DEVICE
        if self._steps.maxlen != depth:
            self._steps = deque(self._steps, maxlen=depth)
        self._steps.append(past)
        return past

    def end(self, past: Past, *, spiked: bool) -> None:
        """Ends a step; now and then one that did not spike becomes a reference."""
        if past.step >= self._next and not spiked and past.micro_batches:
            self._references.append(replace(past, point=None))
            self._next = 2 * past.step

    def forget(self, step: int) -> None:
        """Lets go of a reference that turns out to have spiked."""
        kept = [past for past in self._references if past.step != step]
        self._references = deque(kept, maxlen=REFERENCES)

    def at(self, step: int) -> Past | None:
        """Returns a step, if it is still kept."""
        return next((past for past in self._steps if past.step == step), None)

    def references(self, step: int) -> list[Past]:
        """Returns the steps whose batches a step can be compared with: the one before, and earlier ones."""
        before = self.at(step - 1)
        found = [*([before] if before is not None else []), *reversed(self._references)]
        return [past for past in found if past.step < step and past.micro_batches]

    def stop(self) -> None:
        """Keeps nothing any more."""
        self._probe, self._keeps = None, False
        self.drop()
        self._steps.clear()
        self._references.clear()
        self._memory, self._packing = [], None

    def drop(self) -> None:
        """Forgets the micro-batches of the step that comes."""
        self._batches, self._versions = [], []

    def _rate(self) -> float:
        rates = [group["lr"] for group in self._optimizer.param_groups]
        if any(isinstance(rate, Tensor) and rate.device.type != "cpu" for rate in rates):
            return math.nan
        return max(map(float, rates), default=math.nan)

    def _point(self, device: torch.device) -> Kept | None:
        if not self._keeps:
            return None
        assert self._probe is not None
        packing = self._probe.packing
        if packing is not self._packing:
            self._packing = packing
            number = (DEPTH if device.type == "cpu" else DEPTH_ON_DEVICE) + 1
            self._memory = [packing.host_memory() for _ in range(number)]
        self._memory.append(self._memory.pop(0))  # the oldest is written to
        return packing.keep(self._probe.parameters, host=self._memory[-1])
