"""Clips inside the closure, where the gradients are made, and logs the norm of the last of them."""

import torch
from torch.nn.functional import mse_loss
from torch.nn.utils import clip_grad_norm_, get_total_norm

model = torch.nn.Linear(4, 1)
optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
x, y, logged = torch.randn(8, 4), torch.randn(8, 1), []


def closure():
    optimizer.zero_grad()
    loss = mse_loss(model(x), y)
    loss.backward()
    logged.append(clip_grad_norm_(model.parameters(), 1.0).item())
    return loss


for _ in range(5):
    optimizer.step(closure)
    logged.append(get_total_norm([p.grad for p in model.parameters()]).item())
