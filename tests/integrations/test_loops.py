"""examples, integrations: a plain probe works under Fabric and Accelerate, and the examples run in two processes."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from losses import cross_entropy
from places import REPOSITORY
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


@pytest.mark.parametrize(
    ("example", "options", "printed", "steps"),
    [
        ("fabric", [], "AutoClip: no step is longer than", 114),
        ("accelerate_loop", [], "training loss", 56),
        ("lightning_module", ["--auto-clip"], "AutoClip: no step is longer than", 44),
    ],
)
def test_examples_run_in_two_processes(example, options, printed, steps, tmp_path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [
            *launch,
            "--rdzv-endpoint",
            "localhost:0",
            str(REPOSITORY / "examples" / f"{example}.py"),
            "--epochs",
            "2",
            *options,
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=900,
    )
    # At the very end gloo at times aborts a process that has done everything, with or without a probe.
    assert run.returncode == 0 or "terminate called without an active exception" in run.stderr, run.stderr
    assert run.stdout.count(printed) == 1
    assert run.stdout.count("VERDICT") == 1
    frame = Trace.read(next(tmp_path.glob("*.jsonl"))).to_frame()
    assert set(frame["status"]) <= {"ok", "saturated"}
    assert set(range(0, steps, 5)) <= set(frame["step"])
