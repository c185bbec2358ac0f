"""FSDP2; norms of shards are put together in every way there is; started once for each rank."""

import os
import sys

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss
from torch.nn.utils import clip_grad_norm_, get_total_norm

rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=world)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
logged = []
for _ in range(4):
    optimizer.zero_grad()
    mse_loss(model(torch.randn(8, 4)), torch.randn(8, 2)).backward()
    gradients = [p.grad for p in model.parameters()]

    total = get_total_norm([g.to_local() for g in gradients]).square()
    dist.all_reduce(total)
    logged.append(total.sqrt().item())

    squares = torch.stack([g.to_local().norm() for g in gradients]).square()
    dist.all_reduce(squares)
    logged.append(squares.sum().sqrt().item())

    parts = [None] * world
    dist.all_gather_object(parts, [g.to_local().norm(1).item() for g in gradients])
    logged.append(parts)

    logged.append(gradients[0].norm().full_tensor().item())
    norm = clip_grad_norm_(model.parameters(), 0.1)
    logged.append(norm.full_tensor().item())
    optimizer.step()
dist.destroy_process_group()
