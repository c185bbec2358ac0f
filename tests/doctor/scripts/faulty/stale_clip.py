"""Clips outside of the closure that makes the gradients."""

import torch
from torch.nn.functional import mse_loss

model = torch.nn.Linear(4, 1)
optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)
for _ in range(5):
    x, y = torch.randn(8, 4), torch.randn(8, 1)

    def closure():
        optimizer.zero_grad()
        loss = mse_loss(model(x), y)  # noqa: B023
        loss.backward()
        return loss

    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # fault: stale-gradients 4/5
    optimizer.step(closure)
