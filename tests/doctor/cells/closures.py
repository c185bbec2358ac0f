"""Steps with closures. Everything above the first cell is the beginning of every script."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)


def batches(number):
    for _ in range(number):
        yield torch.randn(16, 6), torch.randint(3, (16,))


def backward(x, y):
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


# --- first micro-batch clipped, last one in the closure
for _ in range(6):
    (first, second) = batches(2)
    optimizer.zero_grad()
    backward(*first)
    clip_grad_norm_(model.parameters(), 0.1)  # fault: clip-per-micro-batch
    optimizer.step(lambda: backward(*second))  # noqa: B023

# --- clip above the step whose closure makes the gradients
optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)
for x, y in batches(6):

    def closure():
        optimizer.zero_grad()
        return backward(x, y)  # noqa: B023

    clip_grad_norm_(model.parameters(), 0.1)  # fault: stale-gradients
    optimizer.step(closure)

# --- clip within the closure
optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
for x, y in batches(6):

    def closure():
        optimizer.zero_grad()
        loss = backward(x, y)  # noqa: B023
        clip_grad_norm_(model.parameters(), 0.1)
        return loss

    optimizer.step(closure)

# --- clip within the closure, gradients zeroed in place, micro-batches within
for _ in range(6):

    def closure():
        optimizer.zero_grad(set_to_none=False)
        losses = [backward(x, y) for x, y in batches(2)]
        clip_grad_norm_(model.parameters(), 0.1)
        return losses[0]

    optimizer.step(closure)

# --- from memory: clip below the step with its closure
optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4, line_search_fn="strong_wolfe")
for x, y in batches(6):

    def closure():
        optimizer.zero_grad()
        return backward(x, y)  # noqa: B023

    optimizer.step(closure)
    clip_grad_norm_(model.parameters(), 0.1)  # fault: stale-gradients

# --- from memory: three micro-batches, a clip after each, the last one in the closure
for _ in range(6):
    optimizer.zero_grad()
    for x, y in batches(2):
        backward(x, y)
        clip_grad_norm_(model.parameters(), 0.05)  # fault: clip-per-micro-batch
    last = next(batches(1))
    optimizer.step(lambda: backward(*last))  # noqa: B023

# --- from memory: a line search with the clip inside
optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4, line_search_fn="strong_wolfe")
for x, y in batches(2):

    def closure():
        if torch.is_grad_enabled():
            optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)  # noqa: B023
        if loss.requires_grad:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        return loss

    optimizer.step(closure)

# --- fourth round: the loop calls the closure, clips, and gives the closure to the step
optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)
for x, y in batches(6):

    def closure():
        optimizer.zero_grad(set_to_none=False)
        return backward(x, y)  # noqa: B023

    closure()
    clip_grad_norm_(model.parameters(), 0.1)  # fault: stale-gradients: into the closure
    optimizer.step(closure)

# --- fourth round: clip for a closure that only returns the loss
for x, y in batches(6):
    optimizer.zero_grad()
    loss = backward(x, y)
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step(lambda: loss)  # noqa: B023
