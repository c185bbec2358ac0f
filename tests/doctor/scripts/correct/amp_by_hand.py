"""Clips scaled gradients at a scaled threshold, or takes the factor out by hand."""

import torch
from torch.nn.functional import mse_loss

model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
for step in range(6):
    scaler.scale(mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1))).backward()
    if step % 2:
        torch.nn.utils.clip_grad_norm_(model.parameters(), scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
    else:
        for p in model.parameters():
            p.grad.div_(8.0)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    optimizer.zero_grad()
