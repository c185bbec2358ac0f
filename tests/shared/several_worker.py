"""What each of two processes does for test_several_distributed.py, and one process for comparison."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from asserts import state_of, whole, without_cost
from autoclip_runs import batches
from losses import bce, critic_loss, cross_entropy, generator_loss
from networks import mlp
from ranks import parted
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from smoothdiag import AutoClip, Probe, every

WORLD = 2
STEPS = 12
Make = Callable[[nn.Module], list[torch.optim.Optimizer]]


class Returning(nn.Module):
    """A classifier; with targets it returns the loss beside the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp(6, 16, 16, 3)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Any:
        logits = self.layers(x)
        return logits if targets is None else (logits, F.cross_entropy(logits, targets))


def network() -> nn.Module:
    torch.manual_seed(0)
    return Returning().double()


def parts(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    held = list(model.parameters())
    return [p for p in held if p.ndim == 2], [p for p in held if p.ndim != 2]


def muon_and_adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices, others = parts(model)
    return [torch.optim.Muon(matrices, lr=0.05), torch.optim.AdamW(others, lr=0.05)]


def shared_out(kind: type[torch.optim.Optimizer], **options: Any) -> Make:
    return lambda model: [ZeroRedundancyOptimizer(model.parameters(), kind, **options)]


def shared_out_each(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices, others = parts(model)
    return [
        ZeroRedundancyOptimizer(matrices, torch.optim.Muon, lr=0.05),
        ZeroRedundancyOptimizer(others, torch.optim.AdamW, lr=0.05),
    ]


OPTIMIZERS: dict[str, tuple[Make, Make]] = {
    "muon and adamw": (muon_and_adamw, muon_and_adamw),
    "ZeRO of sgd": (
        shared_out(torch.optim.SGD, lr=2.0, momentum=0.9),
        lambda model: [torch.optim.SGD(model.parameters(), lr=2.0, momentum=0.9)],
    ),
    "ZeRO of adamw, views": (
        shared_out(torch.optim.AdamW, lr=0.05, parameters_as_bucket_view=True),
        lambda model: [torch.optim.AdamW(model.parameters(), lr=0.05)],
    ),
    "ZeRO of muon and adamw": (shared_out_each, muon_and_adamw),
}
"""Optimizers of two processes, and of one that takes the same steps."""


@dataclass(frozen=True)
class Case:
    """One training run; ``wrap`` is what its model is wrapped in where there are several ranks."""

    optimizers: str
    wrap: str = "ddp"
    returns_loss: bool = False
    micro_batches: int = 1


CASES = [
    *(Case("muon and adamw", w, r, 1 + r) for w in ("ddp", "fsdp2") for r in (False, True)),
    *(Case(name) for name in OPTIMIZERS if name.startswith("ZeRO")),
]
SHOWN = ("nothing", "probe", "shadow", "clip", "clip alone")
"""What accompanies a run: a probe at every step, with AutoClip beside it or without, or AutoClip alone."""


def train(case: Case, rank: int | None, shows: str) -> dict[str, Any]:
    model = network()
    if rank is not None and case.wrap == "ddp":
        model = DistributedDataParallel(model)
    elif rank is not None:
        for layer in (model.layers[0], model.layers[2], model.layers[4], model):
            fully_shard(layer)
    optimizers = OPTIMIZERS[case.optimizers][rank is None](model)
    probe = clipper = None
    if shows != "nothing":
        schedule = (lambda step: False) if shows == "clip alone" else every(1)
        loss_fn = None if case.returns_loss else cross_entropy
        probe = Probe(model, optimizers, loss_fn, schedule=schedule, data="step")
    if probe is not None and shows != "probe":
        clipper = AutoClip(optimizers, probe, mode="shadow" if shows == "shadow" else "clip")
    starts = []
    for batch in batches(STEPS, dtype=torch.float64):
        mine = parted(batch, rank, WORLD)
        micro = list(zip(*(t.chunk(case.micro_batches) for t in mine), strict=True))
        for optimizer in optimizers:
            optimizer.zero_grad()
        for number, (x, targets) in enumerate(micro):
            if probe is not None and not case.returns_loss:
                probe.observe((x, targets))
            if rank is not None and case.wrap == "fsdp2":
                model.set_requires_gradient_sync(number == len(micro) - 1)
            (model(x, targets)[1] / len(micro)).backward()
        starts.append([whole(p) for p in model.parameters()])
        for optimizer in optimizers:
            optimizer.step()
    return {
        "state": state_of(model),
        "weights": [whole(p) for p in model.parameters()],
        "starts": starts,
        "rows": [without_cost(row) for row in probe.trace] if probe is not None else [],
        "longest_step": clipper.longest_step if clipper is not None else None,
        "clip_fraction": clipper.clip_fraction if clipper is not None else None,
    }


# Generative adversarial networks


def play(rank: int | None, *, probed: bool, looks_for_unused: bool = False) -> dict[str, Any]:
    """Trains as the tutorial of DCGAN does: what the critic saw of the generator trains the generator afterwards."""
    torch.manual_seed(0)
    generator, critic = mlp(3, 8, 4).double(), mlp(4, 8, 1).double()
    if rank is not None:
        generator, critic = (
            DistributedDataParallel(m, find_unused_parameters=looks_for_unused) for m in (generator, critic)
        )
    optimizer, of_critic = (torch.optim.Adam(m.parameters(), lr=0.02) for m in (generator, critic))
    pairs = ((optimizer, generator_loss), (of_critic, critic_loss)) if probed else ()
    probes = [Probe([generator, critic], o, loss_fn, schedule=every(1), data="step") for o, loss_fn in pairs]
    source = torch.Generator().manual_seed(1)
    for _ in range(6):
        drawn = [torch.randn(16, width, generator=source).double() for width in (4, 3)]
        real, z = [t if rank is None else t.chunk(WORLD)[rank] for t in drawn]
        for probe, batch in zip(probes, (z, (real, z)), strict=False):
            probe.observe(batch)
        critic.zero_grad()
        bce(critic(real), 1.0).backward()
        fake = generator(z)
        bce(critic(fake.detach()), 0.0).backward()
        of_critic.step()
        generator.zero_grad()
        bce(critic(fake), 1.0).backward()
        optimizer.step()
    rows = [[without_cost(row) for row in probe.trace] for probe in probes]
    return {"state": [state_of(m, o) for m, o in ((generator, optimizer), (critic, of_critic))], "rows": rows}


def refused(rank: int) -> str:
    """Returns the error for an optimizer that steps within backward."""
    model = DistributedDataParallel(network())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.05, overlap_with_ddp=True)
    try:
        Probe(model, optimizer, cross_entropy)
    except ValueError as error:
        return str(error)
    return ""


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=600))
    found: dict[Any, Any] = {(case, shows): train(case, rank, shows) for case in CASES for shows in SHOWN}
    for looks in (False, True):
        found["gan", looks] = [play(rank, probed=probed, looks_for_unused=looks) for probed in (False, True)]
    found["refused"] = refused(rank)
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
