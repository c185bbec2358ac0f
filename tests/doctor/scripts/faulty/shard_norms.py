"""Takes the norm of one FSDP2 shard for that of the whole, in three ways; started once for each rank."""

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
for _ in range(3):
    optimizer.zero_grad()
    loss = mse_loss(model(torch.randn(8, 4)), torch.randn(8, 2))
    loss.backward()
    first = next(model.parameters()).grad
    logged.append(first.norm().item())  # fault: norm-of-one-shard 3/3
    logged.append(get_total_norm([p.grad.to_local() for p in model.parameters()]))  # fault: norm-of-one-shard 3/3
    logged.append(float(first.square().sum()) ** 0.5)  # fault: norm-of-one-shard 3/3
    dist.all_reduce(loss.detach())  # this has nothing to do with the norms
    logged.append(clip_grad_norm_(model.parameters(), 0.1).item())  # that of all ranks, sent by the clip itself
    optimizer.step()
dist.destroy_process_group()
