"""Clips each micro-batch of an accumulated step."""

import torch
from torch import nn
from torch.nn.functional import mse_loss

model = nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(20):
    (mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)) / 4).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)  # fault: clip-per-micro-batch 5/5
    if step % 4 == 3:
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
