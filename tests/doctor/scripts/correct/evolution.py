"""Gradients without a backward pass, made in inference mode, where tensors count no writes."""

import torch
from torch.nn.utils import clip_grad_norm_, get_total_norm

model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
logged = []
for step in range(6):
    with torch.inference_mode():
        for p in model.parameters():
            p.grad = torch.randn_like(p) if step % 2 == 0 else p.grad.normal_()
        clip_grad_norm_(model.parameters(), 0.1)
        logged.append(get_total_norm([p.grad for p in model.parameters()]))
    optimizer.step()
