"""Clips between backward and step, and logs the norm that the clip returns."""

import torch
from torch.nn.functional import mse_loss
from torch.nn.utils import clip_grad_norm_

model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
logged = []
for _ in range(60):
    optimizer.zero_grad()
    loss = mse_loss(model(torch.randn(4, 4)), torch.randn(4, 1))
    loss.backward()
    norm = clip_grad_norm_(model.parameters(), max_norm=1.0)
    optimizer.step()
    scheduler.step()
    logged.append((loss.item(), norm.item(), max(p.grad.abs().max().item() for p in model.parameters())))
