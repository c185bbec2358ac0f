"""DDP with accumulation under no_sync, one clip per step; started once for each rank."""

import os
import sys
from contextlib import nullcontext

import torch
from torch import distributed as dist
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=world)
for view in (False, True):
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    model = DistributedDataParallel(layers, gradient_as_bucket_view=view)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(4):
        for micro in range(2):
            with nullcontext() if micro else model.no_sync():
                (mse_loss(model(torch.randn(8, 4)), torch.randn(8, 2)) / 2).backward()
        norm = clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=not view)
dist.destroy_process_group()
