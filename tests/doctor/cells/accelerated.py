"""Loops of Accelerate. Everything above the first cell is the beginning of every script."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, TensorDataset

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
model, optimizer, loader = accelerator.prepare(
    model,
    torch.optim.AdamW(model.parameters(), lr=0.01),
    DataLoader(TensorDataset(torch.randn(64, 6), torch.randint(3, (64,))), batch_size=4),
)

# --- torch's clip for every micro-batch
for x, y in loader:
    with accelerator.accumulate(model):
        accelerator.backward(F.cross_entropy(model(x), y))
        clip_grad_norm_(model.parameters(), 0.05)  # fault: clip-per-micro-batch: accelerator.sync_gradients
        optimizer.step()
        optimizer.zero_grad()

# --- Accelerate's clip for every micro-batch
for x, y in loader:
    with accelerator.accumulate(model):
        accelerator.backward(F.cross_entropy(model(x), y))
        accelerator.clip_grad_norm_(model.parameters(), 0.05)  # fault: clip-per-micro-batch: accelerator.sync_gradients
        optimizer.step()
        optimizer.zero_grad()

# --- clip after the step
for x, y in loader:
    with accelerator.accumulate(model):
        accelerator.backward(F.cross_entropy(model(x), y))
        optimizer.step()
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 0.05)  # fault: clip-after-step
        optimizer.zero_grad()

# --- clip where gradients are synchronised
for x, y in loader:
    with accelerator.accumulate(model):
        accelerator.backward(F.cross_entropy(model(x), y))
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()

# --- values where gradients are synchronised
for x, y in loader:
    with accelerator.accumulate(model):
        accelerator.backward(F.cross_entropy(model(x), y))
        if accelerator.sync_gradients:
            accelerator.clip_grad_value_(model.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad()

# --- from memory: clip above the backward pass
for x, y in loader:
    with accelerator.accumulate(model):
        loss = F.cross_entropy(model(x), y)
        # the clips that find no gradient are not named too: one remedy serves both
        accelerator.clip_grad_norm_(model.parameters(), 0.05)  # fault: clip-per-micro-batch: accelerator.sync_gradients
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

# --- from memory: the loop of diffusers
params_to_clip = list(model.parameters())
for _epoch in range(2):
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(x), y)
            avg_loss = accelerator.gather(loss.repeat(4)).mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(params_to_clip, 0.05)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

# --- gradients thrown away between the clip and the step
for x, y in loader:
    with accelerator.accumulate(model):
        accelerator.backward(F.cross_entropy(model(x), y))
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 0.05)  # fault: clip-of-unused-gradients: accelerator
        optimizer.zero_grad()
        optimizer.step()
