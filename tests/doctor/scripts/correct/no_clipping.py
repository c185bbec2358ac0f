"""Never clips; reads the norm before the step, and steps one layer inside the backward pass."""

import torch
from torch.nn.functional import mse_loss

model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
early = torch.optim.SGD([model[2].weight], lr=0.1)
model[2].weight.register_post_accumulate_grad_hook(lambda p: early.step())
logged = []
for _ in range(6):
    model.zero_grad()
    mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()
    logged.append(sum(p.grad.pow(2).sum() for p in model.parameters()).sqrt().item())
    logged.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
    optimizer.step()
