"""Loops in plain PyTorch. Everything above the first cell is the beginning of every script."""

import math
from itertools import chain

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm

model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)


def batches(number):
    for _ in range(number):
        yield torch.randn(16, 6), torch.randint(3, (16,))


def loss_of(x, y):
    return F.cross_entropy(model(x), y)


# --- clip after the step
for x, y in batches(6):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    optimizer.step()
    clip_grad_norm_(model.parameters(), 0.1)  # fault: clip-after-step

# --- clip before the backward pass, gradients zeroed in place
for x, y in batches(6):
    optimizer.zero_grad(set_to_none=False)
    loss = loss_of(x, y)
    clip_grad_norm_(model.parameters(), 0.1)  # fault: clip-of-nothing
    loss.backward()
    optimizer.step()

# --- generator used up by the optimizer
parameters = model.parameters()
optimizer = torch.optim.SGD(parameters, lr=0.1)
for x, y in batches(6):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(parameters, 0.1)  # fault: clip-of-nothing
    optimizer.step()

# --- duplicates in a chain of a network and its own head
for x, y in batches(6):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(chain(model.parameters(), model[2].parameters()), 0.1)  # fault: clip-of-duplicates
    optimizer.step()

# --- gradients instead of parameters
for x, y in batches(6):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_([p.grad for p in model.parameters()], 0.1)  # fault: clip-of-nothing
    optimizer.step()

# --- tensors that share the memory of the parameters
for x, y in batches(6):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_([p.data for p in model.parameters()], 0.1)  # fault: clip-of-nothing
    optimizer.step()

# --- values of a state dict
for x, y in batches(6):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(model.state_dict().values(), 0.1)  # fault: clip-of-nothing
    optimizer.step()

# --- half of the network
for x, y in batches(6):
    optimizer.zero_grad()
    (5 * loss_of(x, y)).backward()
    clip_grad_norm_(model[0].parameters(), 0.1)  # fault: clip-of-a-part
    optimizer.step()

# --- layers that came after the list of parameters was made
mine = list(model.parameters())
extra = nn.Linear(3, 3)
optimizer.add_param_group({"params": extra.parameters()})
for x, y in batches(6):
    optimizer.zero_grad()
    (5 * F.cross_entropy(extra(model(x)), y)).backward()
    clip_grad_norm_(mine, 0.1)  # fault: clip-of-a-part
    optimizer.step()

# --- minus one to switch clipping off
for x, y in batches(3):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), -1)  # fault: threshold-without-meaning
    optimizer.step()

# --- zero to switch clipping off
for x, y in batches(3):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    norm = clip_grad_norm_(model.parameters(), max_norm=0.0)  # fault: threshold-without-meaning
    optimizer.step()

# --- values clipped at NaN
for x, y in batches(1):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_value_(model.parameters(), clip_value=math.nan)  # fault: threshold-without-meaning
    optimizer.step()

# --- two steps in a row
for x, y in batches(6):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    optimizer.step()  # fault: step-with-used-gradients

# --- gradients thrown away between the clip and the step
for x, y in batches(6):
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), 0.1)  # fault: clip-of-unused-gradients
    optimizer.zero_grad()
    optimizer.step()

# --- hooks that clip every micro-batch


def clip(p):
    clip_grad_norm_(p, 0.05)  # fault: clip-per-micro-batch


for p in model.parameters():
    p.register_post_accumulate_grad_hook(clip)
for _ in range(6):
    for x, y in batches(2):
        loss_of(x, y).backward()
    optimizer.step()
    optimizer.zero_grad()

# --- the loop of every tutorial
for x, y in batches(6):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()

# --- values
for x, y in batches(6):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_value_(model.parameters(), 0.01)
    optimizer.step()

# --- accumulation with a rest
optimizer.zero_grad()
for k, (x, y) in enumerate(batches(11)):
    (loss_of(x, y) / 4).backward()
    if (k + 1) % 4 == 0 or k == 10:
        clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()

# --- steps left out where the norm is not finite
for k, (x, y) in enumerate(batches(13)):
    optimizer.zero_grad()
    (loss_of(x, y) * (math.nan if k % 3 else 1.0)).backward()
    norm = clip_grad_norm_(model.parameters(), 0.1)
    if not torch.isfinite(norm):
        continue
    optimizer.step()

# --- gradients dropped where the norm is not finite, and the step goes on
for k, (x, y) in enumerate(batches(12)):
    optimizer.zero_grad()
    (loss_of(x, y) * (math.nan if k < 6 else 1.0)).backward()
    norm = clip_grad_norm_(model.parameters(), 0.1)
    if not torch.isfinite(norm):
        optimizer.zero_grad()
    optimizer.step()

# --- each layer on its own
for x, y in batches(6):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    for layer in (model[0], model[2]):
        clip_grad_norm_(layer.parameters(), 0.05)
    optimizer.step()

# --- two lines that share the work
for x, y in batches(6):
    optimizer.zero_grad()
    (5 * loss_of(x, y)).backward()
    clip_grad_norm_(model[0].parameters(), 0.05)
    clip_grad_value_(model[2].parameters(), 0.05)
    optimizer.step()

# --- one norm, clipped by hand of it
for x, y in batches(6):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    norm = get_total_norm([p.grad for p in model.parameters()])
    clip_grads_with_norm_(model.parameters(), 0.1, norm)
    optimizer.step()

# --- a part of the gradient that stays below the threshold is left out
for x, y in batches(6):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(model[0].parameters(), 100.0)
    optimizer.step()

# --- clip in a hook of the step


def clip(*_):
    clip_grad_norm_(model.parameters(), 0.1)


optimizer.register_step_pre_hook(clip)
for _ in range(6):
    for x, y in batches(2):
        loss_of(x, y).backward()
    optimizer.step()
    optimizer.zero_grad()

# --- hooks that clip one gradient each


def clip(p):
    clip_grad_norm_(p, 0.05)


for p in model.parameters():
    p.register_post_accumulate_grad_hook(clip)
for x, y in batches(6):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    optimizer.step()

# --- sharpness-aware: two passes, one step
for x, y in batches(6):
    loss_of(x, y).backward()
    norm = get_total_norm([p.grad for p in model.parameters()])
    with torch.no_grad():
        moves = [0.05 * p.grad / norm for p in model.parameters()]
        for p, move in zip(model.parameters(), moves, strict=True):
            p.add_(move)
    optimizer.zero_grad()
    loss_of(x, y).backward()
    with torch.no_grad():
        for p, move in zip(model.parameters(), moves, strict=True):
            p.sub_(move)
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    optimizer.zero_grad()
