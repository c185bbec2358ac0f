"""A helper clips and returns the norm, nobody looks at it, and another one reads the norm every other step."""

import torch
from torch.nn.functional import mse_loss
from torch.nn.utils import clip_grad_norm_, get_total_norm


@torch.no_grad()
def clip(model):
    return clip_grad_norm_(model.parameters(), 0.1)


@torch.no_grad()
def log_norm(model):
    return get_total_norm(tensors=(p.grad for p in model.parameters()))  # fault: norm-after-clipping 3/6


model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)
for step in range(6):
    mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()
    clip(model)
    optimizer.step()
    if step % 2:
        log_norm(model)
    optimizer.zero_grad()
