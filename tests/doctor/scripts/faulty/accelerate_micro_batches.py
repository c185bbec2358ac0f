"""A loop of Accelerate that clips at every micro-batch."""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
model = torch.nn.Linear(4, 1)
model, optimizer, loader = accelerator.prepare(
    model, torch.optim.AdamW(model.parameters(), lr=0.01), DataLoader(TensorDataset(torch.randn(64, 4)), batch_size=4)
)
for (x,) in loader:
    with accelerator.accumulate(model):
        accelerator.backward(model(x).square().mean())
        accelerator.clip_grad_norm_(model.parameters(), 1e-3)  # fault: clip-per-micro-batch 4/4
        optimizer.step()
        optimizer.zero_grad()
