"""Runs under the guard, with a probe that lets it replay, as a reader of the documentation would attach both."""

import warnings
from typing import Any

from loops import Loop, Watcher
from torch import Tensor

import smoothdiag as sd

EVERY = 50
"""Steps between the probe's measurements, and between looks at the events."""


class Guarded(Watcher):
    """A guard that logs.

    Args:
        keep: What the guard keeps to answer with: ``"parameters"`` or ``"batches"``.
    """

    def __init__(self, keep: str) -> None:
        self.keep = keep

    def attach(self, loop: Loop) -> Watcher:
        warnings.simplefilter("ignore", sd.SmoothdiagWarning)
        self.loop = loop
        self.probe = sd.Probe(loop.model, loop.optimizer, loop.loss_fn, schedule=sd.every(EVERY))
        self.guard = sd.SpikeGuard(loop.optimizer, self.probe, keep=self.keep)
        return self

    def before_forward(self, step: int, batch: Any) -> None:
        self.probe.observe(batch)

    def before_step(self, loss: Tensor, grad_norm: Tensor) -> None:
        clips = self.loop.plant.max_norm(len(self.loop.rows)) is not None
        self.guard.observe(loss, grad_norm=grad_norm if clips else None)

    def after_step(self, step: int) -> None:
        if step % EVERY == 0:
            _ = self.guard.events  # the device keeps a limited number until somebody looks

    def found(self) -> list[tuple[int, str]]:
        """Returns the steps of the events with the answers, and lets go of the run."""
        answers = [(event.step, self.guard.explain(event).cause) for event in self.guard.events]
        self.guard.detach()
        self.probe.close()
        return answers
