"""Reads the norm before the closure makes the gradients of the step."""

import torch
from torch.nn.functional import mse_loss

model = torch.nn.Linear(4, 1)
optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)
norms = []


def train(x, y):
    def closure():
        optimizer.zero_grad()
        loss = mse_loss(model(x), y)
        loss.backward()
        return loss

    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norms.append(float(torch.nn.utils.get_total_norm(gradients)))  # fault: stale-gradients 4/5
    optimizer.step(closure)


for _ in range(5):
    train(torch.randn(8, 4), torch.randn(8, 1))
