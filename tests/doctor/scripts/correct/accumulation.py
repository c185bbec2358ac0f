"""Accumulates four micro-batches, clips once, and leaves out gradients that are not finite."""

import torch
from torch.nn.functional import mse_loss
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
for step in range(6):
    for micro in range(4):
        x = torch.randn(8, 4) * (torch.inf if step == 2 and micro == 1 else 1.0)
        (mse_loss(model(x), torch.randn(8, 1)) / 4).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    clip_grad_value_(model.parameters(), 0.5)
    clip_grad_norm_(model.parameters(), 0.1)
    clipped = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])  # beside the norm before
    if norm.isfinite():
        optimizer.step()
    for p in model.parameters():
        p.grad.zero_()
