"""DDP and FSDP2 in a group of one. Everything above the first cell is the beginning of every script."""

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))


def batches(number):
    for _ in range(number):
        yield torch.randn(16, 6), torch.randint(3, (16,))


def loss_of(x, y):
    return F.cross_entropy(model(x), y)


# --- DDP: clip after every micro-batch, under no_sync
model = DistributedDataParallel(net)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
for _ in range(6):
    (first, second) = batches(2)
    with model.no_sync():
        loss_of(*first).backward()
        clip_grad_norm_(model.parameters(), 0.1)  # fault: clip-per-micro-batch
    loss_of(*second).backward()
    optimizer.step()
    optimizer.zero_grad()

# --- DDP: clip after the step
model = DistributedDataParallel(net)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
for x, y in batches(6):
    loss_of(x, y).backward()
    optimizer.step()
    clip_grad_norm_(model.module.parameters(), 0.1)  # fault: clip-after-step
    optimizer.zero_grad(set_to_none=False)

# --- FSDP2: clip after the step
model = fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
for x, y in batches(6):
    loss_of(x, y).backward()
    optimizer.step()
    clip_grad_norm_(model.parameters(), 0.1)  # fault: clip-after-step
    optimizer.zero_grad()

# --- FSDP2: minus one to switch clipping off
model = fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
for x, y in batches(6):
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), -1)  # fault: threshold-without-meaning
    optimizer.step()
    optimizer.zero_grad()

# --- DDP: accumulation under no_sync
model = DistributedDataParallel(net, gradient_as_bucket_view=True)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
for _ in range(6):
    (first, second) = batches(2)
    with model.no_sync():
        loss_of(*first).backward()
    loss_of(*second).backward()
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    optimizer.zero_grad()

# --- FSDP2: accumulation
model = fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
for _ in range(6):
    for k, (x, y) in enumerate(batches(2)):
        model.set_requires_gradient_sync(k == 1)
        loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    optimizer.zero_grad()

# --- from memory: FSDP2, a clip for every micro-batch
model = fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
for _ in range(6):
    for x, y in batches(2):
        loss_of(x, y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=0.1)  # fault: clip-per-micro-batch
    optimizer.step()
    optimizer.zero_grad()

# --- from memory: DDP, the backbone is clipped and the head is not
model = DistributedDataParallel(net, find_unused_parameters=True)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
for x, y in batches(6):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    nn.utils.clip_grad_norm_(model.module[0].parameters(), 0.01)  # fault: clip-of-a-part
    optimizer.step()

# --- from memory: FSDP2, the loop of torchtitan
model = fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
for _ in range(6):
    optimizer.zero_grad()
    for x, y in batches(2):
        (loss_of(x, y) / 2).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    total_norm = torch.nn.utils.get_total_norm(grads, 2.0, error_if_nonfinite=False, foreach=True)
    total_norm = total_norm.full_tensor()
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), 0.1, total_norm, True)
    optimizer.step()
