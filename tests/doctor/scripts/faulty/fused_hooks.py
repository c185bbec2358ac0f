"""Hooks of fused optimizers under a GradScaler: a partial method, an object, and one for all optimizers."""

from functools import partial

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook


class Log:
    def __init__(self):
        self.largest = []

    def write(self, optimizers, optimizer, args, kwargs):
        if optimizer in optimizers:
            self.largest.append(max(p.grad.abs().max() for p in optimizer.param_groups[0]["params"]))

    def __call__(self, optimizer, args, kwargs):
        self.largest.append([p.grad.abs().max() for p in optimizer.param_groups[0]["params"]])


models = [torch.nn.Linear(4, 1) for _ in range(3)]
first, second, third = optimizers = [torch.optim.Adam(model.parameters(), fused=True) for model in models]
scaler, log = torch.amp.GradScaler("cpu"), Log()
first.register_step_pre_hook(partial(log.write, optimizers))
second.register_step_pre_hook(log)
for _ in range(5):
    for each in optimizers:
        each.zero_grad()
    scaler.scale(sum(model(torch.randn(8, 4)).square().mean() for model in models)).backward()
    scaler.step(first)  # fault: scaled-gradients-in-hook 5/5
    scaler.step(second)  # fault: scaled-gradients-in-hook 5/5
    handle = register_optimizer_step_pre_hook(partial(log.write, [third]))
    scaler.step(third)  # fault: scaled-gradients-in-hook 5/5
    handle.remove()
    scaler.update()
