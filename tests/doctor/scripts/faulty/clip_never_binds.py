"""Clips at a norm that no gradient comes near."""

import torch
from torch.nn.functional import mse_loss
from torch.nn.utils import clip_grad_norm_ as clip

model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
for _ in range(40):
    optimizer.zero_grad()
    mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()
    clip(model.parameters(), 1000.0)  # fault: clip-never-binds 40/40
    optimizer.step()
