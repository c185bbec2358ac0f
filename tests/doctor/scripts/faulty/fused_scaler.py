"""Logs norms from a step pre-hook of a fused optimizer under a GradScaler."""

import torch
from torch.nn.functional import mse_loss

model = torch.nn.Linear(4, 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
norms = []


def log_norm(optimizer, args, kwargs):
    norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])))


optimizer.register_step_pre_hook(log_norm)
scaler = torch.amp.GradScaler("cpu")
for _ in range(5):
    optimizer.zero_grad()
    scaler.scale(mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1))).backward()
    scaler.step(optimizer)  # fault: scaled-gradients-in-hook 5/5
    scaler.update()
