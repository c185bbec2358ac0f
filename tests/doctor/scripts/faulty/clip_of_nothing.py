"""Clips without gradients: a generator that serves once, an empty list, another model, and gradients zeroed before."""

import warnings

import torch
from torch.nn.functional import mse_loss
from torch.nn.utils import clip_grad_norm_

warnings.simplefilter("ignore")  # PyTorch warns of the generator, once
model, other = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)


def backward():
    mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()


parameters = model.parameters()
for _ in range(5):
    optimizer.zero_grad()
    backward()
    clip_grad_norm_(parameters, 0.1)  # fault: clip-of-nothing 4/5
    optimizer.step()
for _ in range(30):
    optimizer.zero_grad()
    backward()
    clip_grad_norm_([p for p in model.parameters() if not p.requires_grad], 0.1)  # fault: clip-of-nothing 30/30
    optimizer.step()
for _ in range(30):
    optimizer.zero_grad()
    backward()
    clip_grad_norm_(other.parameters(), 0.1)  # fault: clip-of-nothing 30/30
    optimizer.step()
for to_none in (True, False):
    for _ in range(16):
        backward()
        optimizer.zero_grad(set_to_none=to_none)
        clip_grad_norm_(model.parameters(), 0.1)  # fault: clip-of-nothing 31/32
        optimizer.step()
