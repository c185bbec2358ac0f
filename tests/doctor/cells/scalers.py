"""Loops with a GradScaler. Everything above the first cell is the beginning of every script."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)


def batches(number):
    for _ in range(number):
        yield torch.randn(16, 6), torch.randint(3, (16,))


def loss_of(x, y):
    with torch.autocast("cpu", torch.bfloat16):
        return F.cross_entropy(model(x), y)


# --- clip of scaled gradients
for x, y in batches(6):
    optimizer.zero_grad()
    scaler.scale(loss_of(x, y)).backward()
    clip_grad_norm_(model.parameters(), 0.1)  # fault: clip-of-scaled-gradients
    scaler.step(optimizer)
    scaler.update()

# --- both steps
for x, y in batches(6):
    optimizer.zero_grad()
    scaler.scale(loss_of(x, y)).backward()
    scaler.unscale_(optimizer)
    clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(optimizer)
    optimizer.step()  # fault: step-with-used-gradients
    scaler.update()

# --- the optimizer's own step in place of the scaler's
for x, y in batches(6):
    optimizer.zero_grad()
    scaler.scale(loss_of(x, y)).backward()
    optimizer.step()  # fault: step-of-scaled-gradients

# --- as the documentation has it
for x, y in batches(6):
    optimizer.zero_grad()
    scaler.scale(loss_of(x, y)).backward()
    scaler.unscale_(optimizer)
    clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(optimizer)
    scaler.update()

# --- accumulation
for _ in range(6):
    for x, y in batches(2):
        scaler.scale(loss_of(x, y) / 2).backward()
    scaler.unscale_(optimizer)
    clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()

# --- every step skipped at first
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
for x, y in batches(12):
    optimizer.zero_grad()
    scaler.scale(100 * loss_of(x, y)).backward()
    scaler.unscale_(optimizer)
    clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(optimizer)
    scaler.update()
