"""Logs the norm of gradients that were clipped already, in three ways."""

import torch
from torch.nn.functional import mse_loss
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm

model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)


def gradients():
    optimizer.zero_grad()
    mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()
    return [p.grad for p in model.parameters()]


logged = []
for _ in range(5):
    grads = gradients()
    clip_grad_norm_(model.parameters(), 0.5)
    logged.append(get_total_norm(grads).item())  # fault: norm-after-clipping 5/15
    optimizer.step()

    gradients()
    clip_grad_value_(model.parameters(), 0.1)
    logged.append(clip_grad_norm_(model.parameters(), 0.5).item())  # fault: norm-after-clipping 5/15
    optimizer.step()

    gradients()
    clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    logged.append(sum(p.grad.norm().item() ** 2 for p in model.parameters()) ** 0.5)  # fault: norm-after-clipping 5/15
