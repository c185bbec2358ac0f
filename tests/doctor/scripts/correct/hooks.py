"""Clips in a step pre-hook, and in hooks that step within the backward pass; two passes per step as in SAM."""

import torch
from torch.nn.functional import mse_loss
from torch.nn.utils import clip_grad_norm_, get_total_norm

model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
early = {p: torch.optim.Adam([p]) for p in model[2].parameters()}


def clip(optimizer, args, kwargs):
    clip_grad_norm_(model[0].parameters(), 0.1)


def step(p):
    clip_grad_norm_(p, 0.1)
    early[p].step()
    early[p].zero_grad()


optimizer.register_step_pre_hook(clip)
for p in early:
    p.register_post_accumulate_grad_hook(step)
for _ in range(6):
    x, y = torch.randn(8, 4), torch.randn(8, 1)
    mse_loss(model(x), y).backward()
    length = get_total_norm([p.grad for p in model[0].parameters()])
    ascent = [0.05 * p.grad / length for p in model[0].parameters()]
    with torch.no_grad():
        torch._foreach_add_(list(model[0].parameters()), ascent)
    optimizer.zero_grad()
    mse_loss(model(x), y).backward()
    with torch.no_grad():
        torch._foreach_sub_(list(model[0].parameters()), ascent)
    optimizer.step()
    optimizer.zero_grad()
