"""What each of two processes does for test_distributed.py; it leaves what it found in a file."""

import contextlib
import time
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from asserts import whole
from distributed_runs import OPTIMIZERS, WORLD, Case, Mlp, Tied, data_of, shares, train, wrapped
from losses import cross_entropy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from smoothdiag import Diagonal, Euclidean, LocalSmoothness, Objective, Probe, budget, vectors
from smoothdiag.measure.loss.batches import MicroBatch, RandomState
from smoothdiag.measure.loss.coordinates import coordinates
from smoothdiag.measure.probe import probe as probe_module
from smoothdiag.measure.probe import schedule as schedule_module


def train_on_a_budget(rank: int, folder: Path) -> dict[str, Any]:
    """Trains with clocks that differ between ranks, stops, resumes; all ranks name the same trace file."""
    now = 0.0

    def slow_loss(model: nn.Module, batch: Any) -> Tensor:
        nonlocal now
        # On the second rank nothing seems to take any time, so it alone would measure every step.
        now += 0.0 if rank else 1.0
        return cross_entropy(model, batch)

    probe_module.time = schedule_module.time = SimpleNamespace(perf_counter=lambda: now)
    try:
        torch.manual_seed(0)
        model = wrapped(Mlp(), "ddp")
        optimizer = OPTIMIZERS["momentum"](model.parameters())
        batches = [shares(batch, Case(), rank)[0] for batch in data_of(Case(), 40, seed=3)]
        found: dict[str, Any] = {"steps": []}
        state = None
        for part in (batches[:20], batches[20:]):
            with Probe(model, optimizer, slow_loss, schedule=budget(0.5), trace=folder / "trace.jsonl") as probe:
                if state is not None:
                    probe.load_state_dict(state)
                for batch in part:
                    optimizer.zero_grad()
                    probe.observe(batch)
                    slow_loss(model, batch).backward()
                    optimizer.step()
                state = probe.state_dict()
                found["steps"].append([row["step"] for row in probe.trace])
                found["path"] = probe.trace.path
        return found | {"state": state}
    finally:
        probe_module.time = schedule_module.time = time


def measure_changed_data(rank: int) -> list[str]:
    """Returns the statuses of a step whose batch was written to on the second rank alone."""
    model = wrapped(Mlp(), "ddp")
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    probe = Probe(model, optimizer, cross_entropy, estimators=[LocalSmoothness()], data="step")
    (batch,) = shares(data_of(Case(), 1, seed=3)[0], Case(), rank)
    probe.observe(batch)
    cross_entropy(model, batch).backward()
    if rank == 1:
        batch[0].zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()
    return [row["status"] for row in probe.trace]


def evaluate_forward_only(rank: int) -> dict[str, float]:
    """Returns losses by forward passes alone, which leave gathered weights behind, and by others."""
    torch.manual_seed(0)
    model = wrapped(Tied(), "fsdp2")  # only weights of the root stay gathered
    (batch,) = shares(data_of(Case(), 1, seed=3)[0], Case(), rank)
    found = {"before": float(cross_entropy(model, batch).detach())}
    coordinates(model, OPTIMIZERS["momentum"](model.parameters()))
    parameters = list(model.parameters())
    micro = [MicroBatch(batch, RandomState.capture())]
    objective = Objective(model, cross_entropy, micro, parameters, distributed=True)
    far = vectors.add_scaled(objective.point(), objective.point(), 0.3)
    found |= {"value": objective.value(far), "evaluated": objective.evaluate(far).loss}
    found |= {"again": objective.value(far), "after": float(cross_entropy(model, batch).detach())}
    failing = Objective(model, _fail_after_forward, micro, parameters, distributed=True)
    with contextlib.suppress(RuntimeError):
        failing.value(far)
    return found | {"after a failure": float(cross_entropy(model, batch).detach())}


def _fail_after_forward(model: nn.Module, batch: Any) -> Tensor:
    cross_entropy(model, batch)
    raise RuntimeError("after the forward pass")


def try_vectors(rank: int) -> dict[str, Any]:
    """Returns results of the algebra on sharded vectors beside those on whole ones."""
    found = {}
    for replicas in (1, WORLD):
        mesh = init_device_mesh("cpu", (replicas, WORLD // replicas), mesh_dim_names=("replicate", "shard"))
        for rows in (1, 3, 4):
            torch.manual_seed(rows)
            a, b = torch.randn(rows, 5), torch.randn(rows, 5)
            placements = [Replicate(), Shard(0)]
            parts = [[distribute_tensor(t, mesh, placements), t[0].clone()] for t in (a, b)]
            drawn = vectors.random_like(parts[0], seed=1)
            geometry = [Diagonal(tuple(t.abs() for t in vector)) for vector in (parts[1], [b, b[0]])]
            found[replicas, rows] = {
                "norms": (vectors.norms(parts[0]), vectors.norms([a, a[0]])),
                "dot": (vectors.dot(*parts), vectors.dot([a, a[0]], [b, b[0]])),
                "difference": (whole(vectors.sub(*parts)[0]), a - b),
                "dual": (geometry[0].dual_norm(parts[0]), geometry[1].dual_norm([a, a[0]])),
                "minimiser": (whole(geometry[0].lmo(parts[0])[0]), geometry[1].lmo([a, a[0]])[0]),
                "euclidean": (whole(Euclidean().lmo(parts[0])[0]), Euclidean().lmo([a, a[0]])[0]),
                "drawn": (drawn[1], vectors.random_like([a[0]], seed=1)[0]),
                "local": vectors.local(drawn[0]).clone(),
                "full": whole(drawn[0]),
                "size": vectors.local(parts[0][0]).shape[0],
            }
    return found


def work(rank: int, folder: str, cases: Sequence[Case], extras: bool) -> None:
    """Takes all runs, and what else there is to try, as one of the processes."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=600))
    found: dict[Any, Any] = {}
    if extras:
        found["budget"] = train_on_a_budget(rank, Path(folder))
        found["changed"] = measure_changed_data(rank)
        found["forward"] = evaluate_forward_only(rank)
        found["vectors"] = try_vectors(rank)
    for case in cases:
        found[case] = {"probed": train(case, rank, probed=True), "bare": train(case, rank, probed=False)}
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
