"""A gradient penalty under a GradScaler beside a model without; a fused optimizer with a hook for learning rates."""

import torch
from torch.nn.utils import clip_grad_norm_

model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
beside = torch.nn.Linear(4, 1)
optimizer, plain = torch.optim.Adam(model.parameters(), fused=True), torch.optim.SGD(beside.parameters(), lr=0.1)
scaler, rates = torch.amp.GradScaler("cpu", init_scale=2.0**10), []
optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
for _ in range(5):
    optimizer.zero_grad()
    plain.zero_grad()
    losses = scaler.scale([model(torch.randn(8, 4)).square().mean(), model(torch.randn(8, 4)).mean()])
    slope = torch.autograd.grad(losses[0], model.parameters(), create_graph=True)
    penalty = sum(each.square().sum() for each in slope).sqrt() / 2.0**10
    beside(torch.randn(8, 4)).square().mean().backward()
    clip_grad_norm_(beside.parameters(), 0.1)
    plain.step()

    sum(losses).backward(retain_graph=True)
    scaler.scale(penalty).backward()
    scaler.unscale_(optimizer)
    norm = clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(optimizer)
    scaler.update()
