"""No backward(): gradients come from torch.func and are put into .grad, which is reused."""

import torch
from torch.func import functional_call, grad
from torch.nn.functional import mse_loss
from torch.nn.utils import clip_grad_norm_

model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)


def loss_fn(weights, x, y):
    return mse_loss(functional_call(model, weights, x), y)


for step in range(8):
    weights = {name: p.detach() for name, p in model.named_parameters()}
    gradients = grad(loss_fn)(weights, torch.randn(8, 4), torch.randn(8, 1))
    for name, p in model.named_parameters():
        if step < 4:
            p.grad = gradients[name]
        else:
            p.grad.copy_(gradients[name])
    clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
