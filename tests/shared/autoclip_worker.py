"""What each of two processes does for test_autoclip_distributed.py, and one process for comparison."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from asserts import whole
from autoclip_runs import batches, network, never
from losses import cross_entropy
from ranks import parted
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from smoothdiag import AutoClip, ClippedMomentum, Probe, StepRule

WORLD = 2
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=4.0, momentum=0.9), {}),
    "relative": (lambda p: torch.optim.AdamW(p, lr=0.1), {}),
    "adamw": (lambda p: torch.optim.AdamW(p, lr=0.1), {"rule": StepRule(0.5)}),
    "set": (lambda p: ClippedMomentum(p, lr=9.0, longest_step=1.0), {"mode": "set"}),
}
STEPS, BAD = 36, 33


def wants_whole_batches(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """A loss that the second of two ranks cannot evaluate on a half."""
    if dist.get_rank() == 1 and len(batch[1]) < 16 // WORLD:
        raise ValueError("Half a batch is no batch.")
    return cross_entropy(model, batch)


def train(name: str, wrap: str = "alone", rank: int | None = None, loss_fn: Any = cross_entropy) -> dict[str, Any]:
    make, options = CASES[name]
    model: nn.Module = network(dtype=torch.float64)
    if wrap == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif wrap == "fsdp2":
        for part in (model[0], model[2], model):
            fully_shard(part)
    optimizer = make(model.parameters())
    probe = Probe(model, optimizer, loss_fn, schedule=never)
    clipper = AutoClip(optimizer, probe, **options)
    for k, batch in enumerate(batches(STEPS, dtype=torch.float64)):
        batch = parted(batch, rank, WORLD)
        probe.observe(batch)
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        if k == BAD and rank in (None, 1):  # on one rank alone, as far as ranks have parts of their own
            grad = model.module[0].weight.grad if wrap == "ddp" else model[0].weight.grad
            part = grad.to_local() if hasattr(grad, "to_local") else grad
            part[-1, 0] = torch.inf
        if k == BAD and wrap == "ddp" and rank == 0:
            model.module[0].weight.grad[-1, 0] = torch.inf  # the same on every rank, as after a reduction
        optimizer.step()
    return {
        "weights": [whole(p) for p in model.parameters()],
        "longest_step": clipper.longest_step,
        "history": clipper.history.drop(columns=["longest_step", "threshold", "note"]).to_dict("list"),
        "state": clipper.state_dict(),
    }


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=600))
    found = {(name, wrap): train(name, wrap, rank) for name in CASES for wrap in ("ddp", "fsdp2")}
    found["sgd", "halves fail"] = train("sgd", "ddp", rank, wants_whole_batches)
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
