"""Curvature measured by one process or by two together; what each of them does for test_curvature_distributed.py."""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import distributed_runs as runs
import torch
import torch.distributed as dist
from asserts import state_of
from distributed_runs import Case
from losses import cross_entropy

from smoothdiag import DirectionalCurvature, HessianNorm, Probe, Sharpness, by_module, every

CASES = [
    Case("mlp", "momentum", "ddp", 2),
    Case("normed", "momentum", "ddp"),
    Case("uneven", "adamw", "ddp_unused"),
    Case("mlp", "momentum", "fsdp2", 2),
    Case("tied", "adamw", "fsdp2"),
    Case("uneven", "momentum", "fsdp2"),
    Case("smooth", "momentum", "fsdp2_bf16"),
]
SLOW = [
    Case("mlp", "adamw", "ddp_view"),
    Case("attention", "momentum", "ddp"),
    Case("lstm", "momentum", "ddp_view"),
    Case("smooth", "momentum", "fsdp2"),
]
"""Other models, wrapped as one of the cases is."""
FIRST_ALONE = ("normed", "smooth", "tied", "uneven")
"""Models measured at the first of two steps; what another step changes, the others show."""


def train(case: Case, rank: int | None, *, probed: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Trains, and returns the state after it and the rows."""
    torch.manual_seed(0)
    model = runs.wrapped(runs.MODELS[case.model](), "alone" if rank is None else case.wrap)
    optimizer = runs.OPTIMIZERS[case.optimizer]([p for p in model.parameters() if p.requires_grad])
    torch.manual_seed(1 + (rank or 0))
    limit = 12 if case.wrap == "fsdp2_bf16" else 40  # bfloat16 is not exact enough for more to help
    estimators = [
        HessianNorm(max_products=limit, by_group=case.wrap.startswith("ddp") or case.model == "uneven"),
        Sharpness(max_products=limit),
        *(DirectionalCurvature(direction=d) for d in ("gradient", "update")),
    ]
    schedule = every(2 if case.model in FIRST_ALONE else 1)
    options = {"estimators": estimators, "schedule": schedule, "group_by": by_module()}
    probe = Probe(model, optimizer, cross_entropy, **options) if probed else None
    for batch in runs.data_of(case, case.steps, seed=3):
        optimizer.zero_grad()
        parts = runs.shares(batch, case, rank)
        for part in parts:
            if probe:
                probe.observe(part)
            (cross_entropy(model, part) / len(parts)).backward()
        optimizer.step()
    return state_of(model, optimizer), list(probe.trace) if probe else []


def work(rank: int, folder: str, cases: Sequence[Case]) -> None:
    """Takes all runs as one of the processes, and leaves what it found in a file."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", runs.WORLD)
    timeout = timedelta(seconds=600)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=runs.WORLD, timeout=timeout)
    found = {c: {"probed": train(c, rank, probed=True), "bare": train(c, rank, probed=False)} for c in cases}
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
