"""spikes: on a GPU a guarded step does not wait, and the run equals the run on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import mlp
from torch.nn import functional as F

import smoothdiag as sd

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

STEPS, SPIKE = 60, 50

ACTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "log": ({}, {"update_norm": True}),
    "clip": ({}, {"action": "clip"}),
    "skip": ({"fused": True}, {"action": "skip"}),
}


def run(device: str, name: str, *, strict: bool = False) -> tuple[sd.SpikeGuard, torch.Tensor]:
    options, guarding = ACTIONS[name]
    torch.manual_seed(0)
    model = mlp(4, 16, 2).double().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, **options)
    guard = sd.SpikeGuard(optimizer, **guarding)
    source = torch.Generator().manual_seed(1)
    data = [torch.randn(16, 4, generator=source, dtype=torch.float64) for _ in range(STEPS)]
    data = [x.to(device) for x in data]
    for k, x in enumerate(data):
        loss = F.mse_loss(model(x), (50.0 if k == SPIKE else 1.0) * x[:, :2].sin())
        optimizer.zero_grad()
        loss.backward()
        torch.cuda.set_sync_debug_mode("error" if strict and k > 2 else "default")
        try:
            guard.observe(loss)
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return guard, torch.cat([p.detach().flatten() for p in model.parameters()]).cpu()


@pytest.mark.parametrize("name", ACTIONS)
def test_a_guarded_step_does_not_wait_and_does_what_it_does_on_a_cpu(name: str) -> None:
    there, weights = run("cuda", name, strict=True)
    here, expected = run("cpu", name)
    assert [(e.step, e.done) for e in there.events] == [(e.step, e.done) for e in here.events]
    assert there.events[0].step == SPIKE
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-7)


def test_the_host_learns_of_a_spike_without_asking() -> None:
    guard, _ = run("cuda", "log")
    torch.cuda.synchronize()
    assert [event.step for event in guard._stepping.journal.events][:1] == [SPIKE]


def test_a_spike_is_explained_from_kept_parameters() -> None:
    torch.manual_seed(0)
    model = mlp(4, 16, 2).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    probe = sd.Probe(
        model, optimizer, lambda m, b: F.mse_loss(m(b[0]), b[1]), estimators=(), schedule=lambda step: False
    )
    guard = sd.SpikeGuard(optimizer, probe, keep="parameters")
    for k in range(STEPS):
        x = torch.randn(16, 4, device="cuda")
        batch = x, (50.0 if k == SPIKE else 1.0) * x[:, :2].sin()
        probe.observe(batch)
        loss = F.mse_loss(model(batch[0]), batch[1])
        optimizer.zero_grad()
        loss.backward()
        guard.observe(loss)
        optimizer.step()
    found = guard.explain(guard.events[0])
    assert (found.event.step, found.cause) == (SPIKE, "data"), found
