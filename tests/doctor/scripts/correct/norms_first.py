"""Reads norms before the clip in every way, so that norms after it are right beside them."""

import torch
from torch.nn.functional import mse_loss
from torch.nn.utils import clip_grad_norm_, get_total_norm

model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
logged, handles = [], []
for step in range(12):
    if step == 8:
        handles = [
            p.register_post_accumulate_grad_hook(lambda p: logged.append(p.grad.norm())) for p in model.parameters()
        ]
    mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    if step < 2:
        logged.append(get_total_norm(tensors=(g for g in gradients.values())))
    elif step < 4:
        logged.append(get_total_norm(gradients.values()))
    elif step < 6:
        logged.extend(torch._foreach_norm(tuple(gradients.values())))
    elif step < 8:
        logged.extend(torch.linalg.vector_norm(g.data) for g in gradients.values())
    clip_grad_norm_(model.parameters(), 0.05)
    optimizer.step(lambda: torch.zeros(()))  # makes no gradients
    logged.append(torch.stack([g.norm() for g in gradients.values()]).norm())
    optimizer.zero_grad()
