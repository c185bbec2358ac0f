"""What each of two processes does for test_optim_distributed.py: whole, sharded and mixed parameters."""

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from asserts import whole
from networks import mlp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from smoothdiag.optim import ClippedMomentum, GradientDescent, LogSmoothed

WORLD = 2
OPTIMIZERS = {
    "momentum": lambda p: ClippedMomentum(p, 0.3, threshold=0.5),
    "mix": lambda p: ClippedMomentum(p, 0.3, longest_step=0.1, nu=0.5, clip="soft", weight_decay=0.1),
    "corrected": lambda p: ClippedMomentum(
        p, 0.3, threshold=0.5, bias_correction=True, weight_decay=0.1, decoupled_weight_decay=False
    ),
    "group": lambda p: ClippedMomentum(p, 0.3, threshold=0.5, norm_scope="group", foreach=False),
    "descent": lambda p: GradientDescent(p, LogSmoothed(1.0, 2.0)),
}
# One row is held by one rank alone, three rows are shared unevenly.
SHAPES = [(4, 3), (1, 3), (3, 2), (5,)]


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]


def train_tensors(name, mesh=None, placements=None, grad_placements=None):
    """Trains three parameters, sharded if there is a mesh, beside a plain one."""

    def share(index, x, where):
        return x.clone() if mesh is None or index == 3 else distribute_tensor(x, mesh, where)

    params = [nn.Parameter(share(i, x, placements)) for i, x in enumerate(tensors(0))]
    optimizer = OPTIMIZERS[name]([{"params": params[:2]}, {"params": params[2:]}])
    for step in range(5):
        for i, (p, g) in enumerate(zip(params, tensors(1 + step), strict=True)):
            p.grad = None if (step, i) == (2, 0) else share(i, g, grad_placements or placements)
        optimizer.step()
    return [whole(p) for p in params], [{k: whole(v) for k, v in optimizer.state[p].items()} for p in params]


def train_model(name, sharded):
    torch.manual_seed(0)
    model = mlp(6, 5, 3).double()
    if sharded:
        for part in (model[0], model[2], model):
            fully_shard(part)
    optimizer = OPTIMIZERS[name](model.parameters())
    x = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if sharded:
        x = x.chunk(WORLD)[dist.get_rank()]
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return [whole(p) for p in model.parameters()]


def work(rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=600))
    flat = init_device_mesh("cpu", (WORLD,))
    hybrid = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("replicate", "shard"))
    found = {}
    for name in OPTIMIZERS:
        found[name, "sharded"] = train_tensors(name, flat, [Shard(0)])
        found[name, "replicated"] = train_tensors(name, flat, [Replicate()])
        found[name, "hybrid"] = train_tensors(name, hybrid, [Replicate(), Shard(0)])
        found[name, "gradient elsewhere"] = train_tensors(name, flat, [Shard(0)], [Replicate()])
        found[name, "fsdp2"] = train_model(name, sharded=True)
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
