"""measure.probe, autoclip: how often a due step waits for the device, and that other steps never do."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from losses import cross_entropy
from networks import mlp
from places import REPOSITORY
from torch import nn

from smoothdiag import AutoClip, HessianNorm, LocalSmoothness, PathSmoothness, Probe, StepRule, every
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
GROUPS = {"alone": None, "6 groups": lambda name: name}
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
    # No step of the three is one that AutoClip may measure.
    loop.probe.load_state_dict({"version": 1, "steps": 32, "next": None})
    if clips:
        clipper = AutoClip(loop.optimizer, loop.probe, rule=StepRule(multiple=None))
        assert "AutoClip" in repr(clipper)
    for _ in range(3):
        loop.step()
    assert loop.probe.steps == 35
    assert len(loop.probe.trace) == 0


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_default_rows_wait_once_for_each_gradient(make: str, groups: str) -> None:
    waits, gradients = Loop(DEFAULT, OPTIMIZERS[make], group_by=GROUPS[groups]).third()
    assert waits.number <= gradients + 1 <= 6, waits.reads
    assert waits.synchronized <= 2


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("estimator", [PathSmoothness(), LocalSmoothness()], ids=["path", "local"])
def test_one_row_waits_once_for_each_gradient(estimator: Any, groups: str) -> None:
    waits, gradients = Loop([estimator], group_by=GROUPS[groups]).third()
    assert waits.number <= gradients + 1 <= 4, waits.reads


def test_the_row_of_a_clipper_waits_hardly_more_often() -> None:
    loop = Loop((), data="step")
    AutoClip(loop.optimizer, loop.probe)
    waits, gradients = loop.third()
    assert gradients <= 3, "one of them is that of two halves"
    # On a CPU AutoClip itself reads numbers where on a GPU it does not, so only the measurement counts.
    measuring = {line: n for line, n in waits.reads.items() if not line.startswith("autoclip/")}
    assert sum(measuring.values()) <= 8, f"one for the loss of each half: {measuring}"


def test_a_hessian_norm_waits_once_for_each_product() -> None:
    loop = Loop([HessianNorm(backend="retained")])
    waits, _ = loop.third()
    # Beside the products: lengths of gradient, start and challenger, and what the row says about the search.
    assert waits.number <= loop.probe.trace[-1]["num_hvps"] + 8, waits.reads
