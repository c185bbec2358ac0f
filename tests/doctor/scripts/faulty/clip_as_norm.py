"""Reads the gradient norm by clipping at infinity."""

import math

import torch
from torch.nn.functional import mse_loss
from torch.nn.utils import clip_grad_norm_

model = torch.nn.Linear(4, 1)
optimizer = torch.optim.Adam(model.parameters())
norms = []
for _ in range(5):
    optimizer.zero_grad()
    mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()
    norms.append(float(clip_grad_norm_(model.parameters(), math.inf)))  # fault: clip-as-norm 5/5
    optimizer.step()
