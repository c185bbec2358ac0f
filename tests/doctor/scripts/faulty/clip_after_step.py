"""Clips once the optimizer has used the gradients."""

import torch
from torch.nn.functional import mse_loss
from torch.nn.utils import clip_grad_norm_

model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(5):
    optimizer.zero_grad()
    mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()
    optimizer.step()
    clip_grad_norm_(model.parameters(), 1.0)  # fault: clip-after-step 5/5
