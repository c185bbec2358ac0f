"""What each of two processes does for test_scion.py: it trains sharded weights, and leaves them in a file."""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from smoothdiag.geometry import RMS, Column, Euclidean, Sign, Spectral
from smoothdiag.optim.ggnc import GGNC
from smoothdiag.optim.scion import ClippedScion, scion_groups

WORLD = 2
CASES = {
    "scion": {},
    "decay, bound": {"weight_decay": 0.2},
    "decay, norm": {"weight_decay": 0.2, "short_step": "norm"},
    "euclidean": {"geometry": Euclidean()},
    "euclidean, decay": {"geometry": Euclidean(), "weight_decay": 0.2, "short_step": "norm"},
}


class Net(nn.Module):
    """Rows that two ranks share unevenly, a kernel, a bias of one entry that only the first rank holds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(5, 3), nn.Conv1d(3, 3, 2), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(x).mT)).mean(dim=-1))


def train(case: str, rank: int | None) -> dict[str, Any]:
    """Takes ten steps with the rank's half of the data, or with all of it if there are no ranks."""
    torch.manual_seed(0)
    model = Net().double()
    if rank is not None:
        fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    options = {"lr": 0.05, "threshold": 0.3, "momentum": 0.5, **CASES[case]}
    if case.startswith("euclidean"):
        optimizer = GGNC(model.parameters(), **options)
    else:
        optimizer = ClippedScion(scion_groups(model, radii={"head": 3.0}), radius=1.0, **options)
        optimizer.param_groups[0]["geometry"] = Column()
    for step in range(10):
        x = torch.randint(5, (8, 6), generator=torch.Generator().manual_seed(step))
        y = torch.sin(x.double().sum(dim=1, keepdim=True))
        share = slice(None) if rank is None else slice(4 * rank, 4 * rank + 4)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x[share]), y[share]).backward()
        optimizer.step()
    found = {name: p.full_tensor() if rank is not None else p for name, p in model.named_parameters()}
    return {name: p.detach().clone() for name, p in found.items()}


def geometries(rank: int) -> list[tuple[Tensor, Tensor]]:
    """Returns results on sharded tensors beside those on whole ones."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, pairs = init_device_mesh("cpu", (WORLD,)), []
    torch.manual_seed(1)
    whole = torch.randn(5, 3, dtype=torch.float64)
    for dim in (0, 1):
        part = distribute_tensor(whole, mesh, [Shard(dim)])
        for geometry in (Spectral(exact=True), Spectral(), Sign(per_input=True), Column(), RMS()):
            minimiser = geometry.lmo(part)
            assert minimiser.placements == part.placements
            pairs.append((minimiser.full_tensor(), geometry.lmo(whole)))
            pairs.append((geometry.norm(part), geometry.norm(whole)))
            pairs.append((geometry.dual_norm(part), geometry.dual_norm(whole)))
    return pairs


def work(rank: int, folder: str) -> None:
    """Takes all cases as one of the processes."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=600))
    found: dict[str, Any] = {case: train(case, rank) for case in CASES}
    found["geometries"] = geometries(rank)
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()
