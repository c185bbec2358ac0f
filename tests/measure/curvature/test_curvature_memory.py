"""measure.curvature.operator: products cost the memory they promise, as the profile of every allocation shows."""

import gc
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from curved import objective_of
from losses import classification
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from smoothdiag import vectors
from smoothdiag.measure.curvature import hvp


class Deep(nn.Module):
    """A network whose activations take some twenty times the memory of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(24, 24) for _ in range(8)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def peak_of(action: Callable[[], object], folder: Path) -> int:
    """Returns the bytes allocated at the most, beyond what was before; the same in every run."""
    action()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        action()
    profiled.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    steps = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    peak = now = 0
    for _, change in steps:
        now += change
        peak = max(peak, now)
    return peak


@pytest.mark.thorough
@pytest.mark.parametrize("rung", ["central", "one_sided"])
def test_differences_take_hardly_more_memory_than_a_gradient(rung, tmp_path, record_property) -> None:
    model = Deep()
    batch = (torch.randn(512, 24), torch.randint(24, (512,)))
    objective = objective_of(model, classification, batch)
    copy = sum(4 * p.numel() for p in model.parameters())
    v = vectors.random_like(objective.point(), seed=0)

    def gradient() -> None:
        model.zero_grad()
        classification(model, batch).backward()
        model.zero_grad()

    def products(backend: str) -> None:
        with hvp(objective, backend=backend) as product:
            for _ in range(3):
                product(v)

    one = peak_of(gradient, tmp_path)
    found = peak_of(lambda: products(rung), tmp_path)
    exact = peak_of(lambda: products("retained"), tmp_path)
    record_property("peak", f"{found / one:.2f} gradients, or one and {(found - one) / copy:.1f} copies")
    assert one > 15 * copy
    assert found < 1.4 * one
    assert found - one < 10 * copy
    assert exact > 2 * one  # so that the profile is seen to tell one way from another
