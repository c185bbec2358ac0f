"""spikes.inquiry: what the guard answers if the host learns of a spike when the optimizer has moved on, as on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import mlp
from torch import nn
from torch.nn import functional as F

import smoothdiag as sd
from smoothdiag.spikes import recent

STEPS, SPIKE = 64, 60


def squares(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a run whose events reach the host a step after they happened."""

    def run(keep: Any) -> sd.SpikeGuard:
        monkeypatch.setattr(recent, "DEPTH", recent.DEPTH_ON_DEVICE)
        torch.manual_seed(0)
        model = mlp(4, 16, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        probe = sd.Probe(model, optimizer, squares, estimators=(), schedule=lambda step: False)
        guard = sd.SpikeGuard(optimizer, probe, keep=keep)
        stepping, logs = guard._stepping, list[torch.Tensor]()
        monkeypatch.setattr(stepping.inquiry, "before_step", lambda event, past: None)

        def bring() -> None:
            logs.append(stepping.journal.log.clone())

        monkeypatch.setattr(stepping, "_bring", bring)
        source = torch.Generator().manual_seed(1)
        for k in range(STEPS):
            x = torch.randn(32, 4, generator=source)
            batch = x, x[:, :2].sin() + (20.0 if k == SPIKE else 0.1) * torch.randn(32, 2, generator=source)
            probe.observe(batch)
            loss = squares(model, batch)
            optimizer.zero_grad()
            loss.backward()
            guard.observe(loss)
            before = logs[:]
            optimizer.step()
            if before:
                stepping._take(before[0])
                logs.clear()
        return guard

    return run


def test_kept_parameters_tell_the_cause(late: Any) -> None:
    guard = late("parameters")
    event = next(event for event in guard.events if event.step == SPIKE)
    found = guard.explain(event)
    assert found.cause == "data", found
    assert found.evidence["loss"] == pytest.approx(event.values["loss"], rel=1e-5), "at the weights before the step"


def test_without_them_the_answer_says_so(late: Any) -> None:
    guard = late("batches")
    found = guard.explain(next(event for event in guard.events if event.step == SPIKE))
    assert found.cause == "unknown"
    assert "had moved on" in found.text
    assert 'keep="parameters"' in found.text
