"""What each of two processes does for test_spike_distributed.py."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from asserts import whole
from autoclip_runs import batches, network, never
from ranks import parted
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from smoothdiag import SPAM, Probe, SpikeGuard

WORLD = 2
STEPS, HARD, LOST = 40, 30, 36

GUARDS: dict[str, dict[str, Any]] = {
    "log": {"modules": True},
    "skip": {"modules": True, "action": "skip"},
    "clip": {"modules": True, "action": "clip"},
    "the loop clips": {},
    "SPAM": {"rule": SPAM(warm_up=5), "action": "clip"},
}


def squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def spoilt(y: Tensor, rank: int | None) -> Tensor:
    """Returns targets that are wrong in what the second rank holds, which `parted` deals to one process in quarters."""
    parts = list(y.chunk(4 if rank is None else 1))
    return torch.cat([40 * part if rank == 1 or i % 2 else part for i, part in enumerate(parts)])


def train(kind: str, wrap: str = "alone", rank: int | None = None) -> dict[str, Any]:
    model: nn.Module = network(dtype=torch.float64)
    if wrap == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif wrap == "fsdp2":
        for part in (model[0], model[2], model):
            fully_shard(part)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    probe = Probe(model, optimizer, squares, estimators=(), schedule=never)
    guard = SpikeGuard(optimizer, probe, update_norm=True, **GUARDS[kind])
    for k, (x, y) in enumerate(batches(STEPS, dtype=torch.float64)):
        x, y = parted((x, F.one_hot(y, 3).double()), rank, WORLD)
        if k == HARD:
            y = spoilt(y, rank)
        if k == LOST and rank in (None, 1):
            x = x * torch.inf
        probe.observe((x, y))
        optimizer.zero_grad()
        loss = squares(model, (x, y))
        loss.backward()
        clips = kind == "the loop clips"
        guard.observe(loss, grad_norm=nn.utils.clip_grad_norm_(model.parameters(), 1.0) if clips else None)
        optimizer.step()
    return {
        "weights": [whole(p) for p in model.parameters()],
        "events": [(e.step, e.spiked, e.done, dict(e.values)) for e in guard.events],
        "causes": [guard.explain(e).cause for e in guard.events],
    }


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = Path(folder, "store")
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=120)
    )
    found = {(kind, wrap): train(kind, wrap, rank) for kind in GUARDS for wrap in ("ddp", "fsdp2")}
    torch.save(found, Path(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()
