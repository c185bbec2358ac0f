"""measure.probe, autoclip: waits are counted line by line, and steps that are not due never wait."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from losses import cross_entropy
from networks import mlp
from places import REPOSITORY
from torch import nn

from smoothdiag import AutoClip, LocalSmoothness, PathSmoothness, Probe, StepRule, every
from smoothdiag.autoclip.rows import ForClipping

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
from overhead.counting import Waits

Make = Callable[[nn.Module], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    "sgd, fused": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True),
    "adamw, fused": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
}
DEFAULT = [PathSmoothness(), LocalSmoothness()]


class Loop:
    """Training of six tensors, measured at every step unless told otherwise."""

    def __init__(self, estimators: Any, make: Make = OPTIMIZERS["sgd"], device: str = "cpu", **options: Any) -> None:
        self.model = mlp(8, 16, 16, 5).to(device)
        self.optimizer = make(self.model)
        options = {"schedule": every(1), **options}
        self.probe = Probe(self.model, self.optimizer, cross_entropy, estimators=estimators, **options)
        self.batch = (torch.randn(32, 8, device=device), torch.zeros(32, dtype=torch.long, device=device))

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.probe.observe(self.batch)
        cross_entropy(self.model, self.batch).backward()
        self.optimizer.step()

    def third(self) -> tuple[Waits, int]:
        """Returns the waits of the third step, and the gradients that its rows count; the first step tests the loss."""
        self.step()
        self.step()
        with Waits() as waits:
            self.step()
        return waits, sum(row["num_grads"] for row in self.probe.trace if row["step"] == 2)


READS = {
    "float": lambda x: float(x[0]),
    "bool": lambda x: bool(x.isfinite().all()),
    "tolist": lambda x: x.tolist(),
    "cpu, tolist": lambda x: x.cpu().tolist(),
    "equal": lambda x: torch.equal(x, x),
}


@pytest.mark.parametrize("name", READS)
def test_every_read_counts_once_and_only_where_the_library_makes_it(name: str) -> None:
    x = torch.ones(3)
    with Waits() as waits:
        READS[name](x)
        assert waits.number == 0
        with pytest.raises(AttributeError):  # what it returns is no estimate, but it was made within the library
            ForClipping(lambda step: READS[name](x))(None)
    assert waits.number == 1
    assert next(iter(waits.reads)).startswith("autoclip/rows.py:")


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("make", ["sgd", "adamw"])
def test_a_step_that_is_not_due_never_waits(make: str, clips: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Meta tensors have no values, so any read of one is an error; hooks, graphs and gradients are those of training.
    def parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
        return list(model.parameters())

    monkeypatch.setattr("smoothdiag.measure.probe.probe.coordinates", parameters)  # it refuses the meta device
    optimizers = {"sgd": OPTIMIZERS["sgd"], "adamw": lambda m: torch.optim.AdamW(m.parameters(), foreach=True)}
    loop = Loop(DEFAULT, optimizers[make], device="meta", schedule=every(10**9))
    loop.probe.load_state_dict({"version": 1, "steps": 1, "next": None})
    if clips:
        clipper = AutoClip(loop.optimizer, loop.probe, rule=StepRule(multiple=None))
        assert "AutoClip" in repr(clipper)
    for _ in range(3):
        loop.step()
    assert loop.probe.steps == 4
    assert len(loop.probe.trace) == 0
