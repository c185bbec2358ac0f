"""Steps in hooks of the parameters, during the backward pass, and clips after it."""

import torch
from torch.nn.functional import mse_loss

model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}


def step(parameter):
    optimizers[parameter].step()
    optimizers[parameter].zero_grad()


for p in model.parameters():
    p.register_post_accumulate_grad_hook(step)
for _ in range(5):
    mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # fault: clip-after-optimizer-in-backward 5/5
