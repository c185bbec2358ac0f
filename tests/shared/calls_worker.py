"""What each of two processes does for test_calls_distributed.py: models that return their loss, under DDP and FSDP2."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from asserts import state_of, whole, without_cost
from distributed_runs import OPTIMIZERS, WORLD, Case, Dropped, data_of, shares, wrapped
from torch import Tensor, nn
from torch.nn import functional as F

from smoothdiag import LocalSmoothness, Probe, every

CASES = [Case("returning", "adamw", wrap, 3) for wrap in ("ddp", "ddp_view", "ddp_unused", "fsdp2")]


class Returning(Dropped):
    """A model in the way of nanoGPT, which returns logits and loss."""

    def forward(self, x: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits = super().forward(x)
        return logits, None if targets is None else F.cross_entropy(logits, targets)


def train(case: Case, rank: int, shows: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Trains with a probe that sees ``shows``: calls, batches, or nothing; returns the state and the rows."""
    torch.manual_seed(0)
    model = wrapped(Returning(), case.wrap)
    optimizer = OPTIMIZERS[case.optimizer](model.parameters())
    torch.manual_seed(1 + rank)
    probes = []
    if shows != "nothing":
        loss_fn = None if shows == "calls" else lambda model, batch: model(batch[0], targets=batch[1])[1]
        probes = [Probe(model, optimizer, loss_fn, schedule=every(2), data=data) for data in ("step", "fixed")]
    for batch in data_of(case, 4, seed=3):
        optimizer.zero_grad()
        parts = shares(batch, case, rank)
        for number, (x, targets) in enumerate(parts):
            if shows == "batches":
                for probe in probes:
                    probe.observe((x, targets))
            if case.wrap == "fsdp2":  # gradients stay unreduced until the last micro-batch
                model.set_requires_gradient_sync(number == len(parts) - 1)
            (model(x, targets=targets)[1] / len(parts)).backward()
        optimizer.step()
    return state_of(model, optimizer), [without_cost(row) for probe in probes for row in probe.trace]


def measure_after_an_abandoned_pass(rank: int) -> list[tuple[str, float, float]]:
    """Returns the statuses under FSDP2, and the gradient norms as measured and as in the loop."""
    torch.manual_seed(0)
    model = wrapped(Returning(), "fsdp2").eval()  # no dropout
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    probe = Probe(model, optimizer, estimators=[LocalSmoothness()], data="step")
    first, second = (shares(batch, Case(), rank)[0] for batch in data_of(Case(), 2, seed=3))
    model(*first)[1].backward()
    optimizer.zero_grad()
    model(*second)[1].backward()
    norm = float(torch.cat([whole(p.grad).flatten() for p in model.parameters()]).norm())
    optimizer.step()
    return [(row["status"], row["grad_norm"], norm) for row in probe.trace]


def measure_within(rank: int) -> str:
    """Returns the error of a probe for the module inside of the one that the loop calls."""
    inner = Returning()
    model = nn.parallel.DistributedDataParallel(inner)
    Probe(inner, OPTIMIZERS["momentum"](inner.parameters()))
    ((x, targets),) = shares(data_of(Case(), 1, seed=3)[0], Case(), rank)
    try:
        model(x, targets)
    except ValueError as error:
        return str(error)
    return ""


def work(rank: int, folder: str) -> None:
    """Takes all runs as one of the processes."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=600))
    found: dict[str, Any] = {"within": measure_within(rank), "abandoned": measure_after_an_abandoned_pass(rank)}
    for case in CASES:
        found[case.wrap] = {shows: train(case, rank, shows) for shows in ("nothing", "calls", "batches")}
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
