"""The demo's training: one model, one seed and one rate that is too large, with three ways of clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from smoothdiag.autoclip import AutoClip
from smoothdiag.demo.language import CharacterLSTM, Corpus, next_character_loss
from smoothdiag.measure.estimators import LocalSmoothness
from smoothdiag.measure.probe import Probe
from smoothdiag.measure.probe.schedule import log_spaced
from smoothdiag.trace import Trace

NOTHING, USUAL, AUTO = "nothing", "max_norm = 1", "AutoClip"
PROBES_PER_DECADE = 40
TAIL = 20
"""Steps at the end whose mean loss the table holds."""


@dataclass(frozen=True)
class Run:
    """A finished training run.

    Attributes:
        losses: Loss of each step [nats per character].
        held_out: Loss on text that was not trained on [nats per character].
        threshold: Gradient norm at which gradients were clipped at the end; NaN without clipping.
        said: What AutoClip said at the end; empty without it.
    """

    losses: list[float]
    held_out: float
    threshold: float = math.nan
    said: str = ""

    @property
    def last(self) -> float:
        """Mean loss of the last steps."""
        tail = self.losses[-TAIL:]
        return sum(tail) / len(tail)


def train(corpus: Corpus, steps: int, device: torch.device, *, lr: float, arm: str, trace: Trace | None = None) -> Run:
    """Trains the model from seed 0 by plain SGD; with AutoClip, a probe writes its rows to ``trace``."""
    torch.manual_seed(0)
    model = CharacterLSTM(corpus.vocabulary).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr)
    shown = tqdm(corpus.batches(steps, seed=0, device=device), f"clipping: {arm}", steps, unit="step")
    held_out = corpus.held_out(device)
    if arm != AUTO:
        losses = _steps(model, optimizer, shown, 1.0 if arm == USUAL else math.inf)
        return Run(losses, _evaluated(model, held_out), 1.0 if arm == USUAL else math.nan)
    probe = Probe(
        model,
        optimizer,
        next_character_loss,
        estimators=[LocalSmoothness()],
        schedule=log_spaced(PROBES_PER_DECADE),
        trace=trace,
    )
    with closing(probe):
        clipper = AutoClip(optimizer, probe)
        losses = _steps(model, optimizer, probe.watch(shown), math.inf)
        said, threshold = clipper.reason, clipper.threshold
    return Run(losses, _evaluated(model, held_out), threshold, said)


def _steps(
    model: CharacterLSTM, optimizer: torch.optim.Optimizer, batches: Iterable[Tensor], max_norm: float
) -> list[float]:
    """Trains on the batches and returns the losses."""
    losses = []
    for windows in batches:
        optimizer.zero_grad()
        loss = next_character_loss(model, windows)
        loss.backward()  # type: ignore[no-untyped-call]
        if max_norm < math.inf:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        losses.append(loss.detach())
    return [float(loss) for loss in losses]


def _evaluated(model: CharacterLSTM, windows: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return float(next_character_loss(model, windows))
