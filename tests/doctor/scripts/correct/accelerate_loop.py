"""A loop of Accelerate with accumulation; the optimizer is wrapped, and so is the clip."""

import torch
from accelerate import Accelerator
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model = torch.nn.Linear(4, 1)
model, optimizer, loader = accelerator.prepare(
    model,
    torch.optim.AdamW(model.parameters(), lr=0.01),
    DataLoader(TensorDataset(torch.randn(32, 4), torch.randn(32, 1)), batch_size=4),
)
norms = []
for x, y in loader:
    with accelerator.accumulate(model):
        accelerator.backward(mse_loss(model(x), y))
        if accelerator.sync_gradients:
            norms.append(accelerator.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
