"""spikes: a guard beside an AutoClip sees gradients before they are clipped, and changes nothing unless it acts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import mlp
from torch import nn
from torch.nn import functional as F

import smoothdiag as sd

SPIKE = 60


def squares(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def run(make: Callable[[Any], torch.optim.Optimizer], **guarding: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(mlp(4, 16, 16), nn.Dropout(0.1), mlp(16, 2))
    optimizer = make(model.parameters())
    probe = sd.Probe(model, optimizer, squares, estimators=())
    guard = sd.SpikeGuard(optimizer, probe, keep="parameters", **guarding) if guarding else None
    clipper = sd.AutoClip(optimizer, probe)
    for k in range(SPIKE + 4):
        x = torch.randn(32, 4)
        batch = x, x[:, :2].sin() + (20.0 if k == SPIKE else 0.1)
        probe.observe(batch)
        loss = squares(model, batch)
        optimizer.zero_grad()
        loss.backward()
        if guard is not None:
            guard.observe(loss)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), clipper, guard


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, lr=1.0), lambda p: torch.optim.AdamW(p, lr=3e-3)])
def test_both_at_once(make: Any) -> None:
    expected, alone, _ = run(make)
    weights, clipper, guard = run(make, action="log")
    assert torch.equal(weights, expected)
    assert clipper.longest_step == alone.longest_step
    assert guard.events[0].step == SPIKE
    assert guard.explain(guard.events[0]).cause == "data"
    _, clipper, guard = run(make, action="skip")
    assert guard.events[0].done == "skipped"
    assert "lowered" not in set(clipper.history["event"])
