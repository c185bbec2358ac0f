"""Clips while the gradients still carry the factor of the GradScaler."""

import torch
from torch.nn.functional import mse_loss

model = torch.nn.Linear(4, 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
scaler = torch.amp.GradScaler("cpu")
for _ in range(5):
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1))
    scaler.scale(loss).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # fault: clip-of-scaled-gradients 5/5
    scaler.step(optimizer)
    scaler.update()
