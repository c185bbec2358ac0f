"""examples, integrations: a plain probe works under Fabric and Accelerate, and the examples run in two processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from examples_worker import WORLD, work
from lightning.fabric import Fabric
from losses import cross_entropy
from ranks import run_ranks
from torch import nn

from smoothdiag import Probe, Trace, every

pytestmark = pytest.mark.thorough


def fabric_run(precision: Any, *, probed: bool) -> tuple[list[torch.Tensor], list[float], Probe | None]:
    torch.manual_seed(0)
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 3))
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
    batches = [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(6)]
    probe = None
    if probed and precision == "32-true":
        probe = Probe(model, optimizer, cross_entropy, schedule=every(1), data="step")
    elif probed:
        # Fabric's module refuses any backward but its own in mixed precision; the module within it does not.
        def autocast_loss(module: nn.Module, batch: Any) -> torch.Tensor:
            with fabric.autocast():
                return cross_entropy(module, batch)

        probe = Probe(model.module, optimizer, autocast_loss, schedule=every(1), data="step")
    norms = []
    for batch in probe.watch(batches) if probe else batches:
        fabric.backward(cross_entropy(model, batch))
        norms.append(sum(float(p.grad.double().square().sum()) for p in net.parameters()) ** 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return [*net.state_dict().values(), torch.get_rng_state()], norms, probe


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_fabric_loop_is_unchanged_and_seen_as_it_is(precision) -> None:
    bare, _, _ = fabric_run(precision, probed=False)
    found, norms, probe = fabric_run(precision, probed=True)
    assert all(torch.equal(a, b) for a, b in zip(found, bare, strict=True))
    rows = [row for row in probe.trace if row["estimator"] == "local"]
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=1e-12)
    assert probe.self_test.reproduced


EXAMPLES = {
    "fabric": (["--epochs", "1"], "AutoClip: no step is longer than", 57),
    "accelerate_loop": (["--epochs", "2"], "training loss", 56),
    "lightning_module": (["--epochs", "2", "--auto-clip"], "AutoClip: no step is longer than", 44),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the examples ran, all of them in the same two processes."""
    path = tmp_path_factory.mktemp("examples")
    run_ranks(work, path, WORLD, {name: options for name, (options, _, _) in EXAMPLES.items()})
    return path


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_run_in_two_processes(folder, example) -> None:
    _, line, steps = EXAMPLES[example]
    printed = "".join(path.read_text() for path in (folder / example).glob("printed*.txt"))
    assert printed.count(line) == 1
    assert printed.count("VERDICT") == 1
    frame = Trace.read(next((folder / example).glob("*.jsonl"))).to_frame()
    assert set(frame["status"]) <= {"ok", "saturated"}
    assert set(range(0, steps, 5)) <= set(frame["step"])
