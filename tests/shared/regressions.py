"""A small regression in float64, and a loop over its batches."""

import torch
from torch import nn
from torch.nn import functional as F


def regression(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def small_run(num: int = 3, n: int = 8):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [(torch.randn(n, 4).double(), torch.randn(n, 2).double()) for _ in range(num)]
    return model, optimizer, batches


def step_over(model, optimizer, batches, loss_fn=regression) -> None:
    for batch in batches:
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
