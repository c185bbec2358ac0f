"""A small regression in float64, and a loop over its batches."""

import torch
from losses import regression
from networks import mlp


def small_run(num: int = 3, n: int = 8):
    model = mlp(4, 8, 2).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [(torch.randn(n, 4).double(), torch.randn(n, 2).double()) for _ in range(num)]
    return model, optimizer, batches


def step_over(model, optimizer, batches, loss_fn=regression) -> None:
    for batch in batches:
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
