"""spikes: rehearsed without a GPU, a guarded step waits for nothing, except where `skip` has to hide the gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import mlp
from rehearsed import Waited, fake_gpu, moved
from torch import nn

import smoothdiag as sd

Make = Callable[[nn.Module], torch.optim.Optimizer]

SGD: Make = lambda m: torch.optim.SGD(m.parameters(), lr=0.1)  # noqa: E731
ADAMW: Make = lambda m: torch.optim.AdamW(m.parameters(), lr=0.1)  # noqa: E731
FUSED: Make = lambda m: torch.optim.AdamW(m.parameters(), lr=0.1, fused=True)  # noqa: E731

NAMED: Make = lambda m: torch.optim.SGD(m.named_parameters(), lr=0.1)  # noqa: E731

FREE: dict[str, tuple[Make, dict[str, Any]]] = {
    "log": (SGD, {}),
    "clip": (ADAMW, {"action": "clip"}),
    "update": (ADAMW, {"update_norm": True}),
    "skip, fused": (FUSED, {"action": "skip"}),
    "six sigma": (SGD, {"rule": sd.SixSigma()}),
    "zclip": (SGD, {"action": "clip", "rule": sd.ZClip()}),
    "spam": (ADAMW, {"action": "clip", "rule": sd.SPAM(warm_up=1)}),
    "spam, skip, fused": (FUSED, {"action": "skip", "rule": sd.SPAM(warm_up=1)}),
    "modules": (NAMED, {"action": "clip", "modules": True}),
}


def steps(name: str, make: Make, options: dict[str, Any]) -> sd.SpikeGuard:
    model = moved(mlp(6, 16, 3))
    optimizer = make(model)
    guard = sd.SpikeGuard(optimizer, **options)
    if name.endswith("skip, fused"):  # its first step has no state yet, and reads one number
        for p in model.parameters():
            kept = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            optimizer.state[p] = {"step": torch.zeros((), device="cuda"), **kept}
    for k in range(4):
        guard.observe(torch.ones((), device="cuda") if k % 2 else 1.0, grad_norm=None if k else 2.0)
        optimizer.step()
    assert guard._stepping.journal.log.device.type == "cuda"
    return guard


@pytest.mark.parametrize("name", FREE)
def test_a_guarded_step_waits_for_nothing(name: str) -> None:
    with fake_gpu():
        steps(name, *FREE[name])


def test_to_ask_for_events_waits() -> None:
    with fake_gpu():
        guard = steps("log", *FREE["log"])
        with pytest.raises(Waited):
            _ = guard.events


def test_to_skip_steps_of_other_optimizers_reads_one_number() -> None:
    with fake_gpu(), pytest.raises(Waited, match="__bool__"):
        steps("skip", ADAMW, {"action": "skip"})
