"""Updates without an optimizer. Everything above the first cell is the beginning of every script."""

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
lr = 0.1


def batches(number):
    for _ in range(number):
        yield torch.randn(16, 6), torch.randint(3, (16,))


def loss_of(x, y):
    return F.cross_entropy(model(x), y)


# --- clip after the update
for x, y in batches(6):
    model.zero_grad()
    loss_of(x, y).backward()
    for p in model.parameters():
        p.data -= lr * p.grad
    clip_grad_norm_(model.parameters(), 0.1)  # fault: clip-after-step

# --- every micro-batch is clipped
for _ in range(6):
    model.zero_grad()
    for x, y in batches(2):
        loss_of(x, y).backward()
        clip_grad_norm_(model.parameters(), 0.1)  # fault: clip-per-micro-batch
    with torch.no_grad():
        for p in model.parameters():
            p -= lr * p.grad

# --- minus one to switch clipping off
for x, y in batches(6):
    model.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), -1.0)  # fault: threshold-without-meaning
    for p in model.parameters():
        p.data.add_(p.grad, alpha=-lr)

# --- always binding
for x, y in batches(32):
    model.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), 0.001)  # fault: clip-always-binds
    for p in model.parameters():
        p.data.add_(p.grad, alpha=-lr)

# --- through data
for x, y in batches(6):
    model.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), 0.1)
    for p in model.parameters():
        p.data.add_(p.grad.data, alpha=-lr)

# --- without a gradient of the update
for x, y in batches(6):
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), 0.1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p - lr * p.grad)
            p.grad.zero_()

# --- all at once
for x, y in batches(6):
    model.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), 0.1)
    with torch.no_grad():
        parameters = list(model.parameters())
        torch._foreach_add_(parameters, [p.grad for p in parameters], alpha=-lr)

# --- a new tensor for every step
weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
for x, y in batches(6):
    F.cross_entropy(functional_call(model, weights, x), y).backward()
    clip_grad_norm_(weights.values(), 0.1)
    weights = {name: (w - lr * w.grad).detach().requires_grad_() for name, w in weights.items()}


# --- from memory: the update stands in a function, the clip below its call
def sgd_step(params, lr):
    with torch.no_grad():
        for p in params:
            p -= lr * p.grad
            p.grad.zero_()


for x, y in batches(8):
    loss_of(x, y).backward()
    sgd_step(model.parameters(), lr)
    clip_grad_norm_(model.parameters(), 0.25)  # fault: clip-of-nothing

# --- from memory: parameters of parts that overlap
for x, y in batches(8):
    model.zero_grad()
    loss_of(x, y).backward()
    params = list(model.parameters()) + list(model[0].parameters())
    clip_grad_norm_(params, 0.1)  # fault: clip-of-duplicates
    for p in model.parameters():
        p.data.sub_(lr * p.grad.data)

# --- from memory: the language model of the examples
for x, y in batches(8):
    model.zero_grad()
    loss_of(x, y).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
    for p in model.parameters():
        p.data.add_(p.grad, alpha=-lr)

# --- from memory: momentum in a list
velocity = [torch.zeros_like(p) for p in model.parameters()]
for x, y in batches(8):
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), 0.25)
    with torch.no_grad():
        for p, v in zip(model.parameters(), velocity, strict=True):
            v.mul_(0.9).add_(p.grad)
            p -= lr * v
            p.grad = None

# --- gradients that autograd.grad returns, put into grad
for x, y in batches(6):
    parameters = list(model.parameters())
    for p, g in zip(parameters, torch.autograd.grad(loss_of(x, y), parameters), strict=True):
        p.grad = g.clone()
    clip_grad_norm_(parameters, 0.1)
    with torch.no_grad():
        for p in parameters:
            p -= lr * p.grad

# --- never zeroed
for x, y in batches(36):
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), 0.001)  # fault: zero-grad-missing
    for p in model.parameters():
        p.data.add_(p.grad, alpha=-lr)

# --- weights that are NaN
for p in model.parameters():
    p.data.fill_(float("nan"))
for x, y in batches(6):
    model.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), 0.1)
    for p in model.parameters():
        p.data.add_(p.grad, alpha=-lr)
model.zero_grad()
for p in model.parameters():
    p.data.zero_()

# --- a loop that only reads norms
norms = []
for x, y in batches(6):
    model.zero_grad()
    loss_of(x, y).backward()
    norms.append(clip_grad_norm_(model.parameters(), 0.1).item())
    clip_grad_norm_(model.parameters(), 0.05)

# --- new tensors for every step, a clip for every micro-batch
weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
for _ in range(6):
    for x, y in batches(2):
        F.cross_entropy(functional_call(model, weights, x), y).backward()
        clip_grad_norm_(weights.values(), 0.05)  # fault: clip-per-micro-batch
    weights = {name: (w - lr * w.grad).detach().requires_grad_() for name, w in weights.items()}


# --- third round: class without torch optim, clip late
class SGD:
    def __init__(self, params, lr):
        self.params, self.lr = list(params), lr

    def step(self):
        for p in self.params:
            p.data = p.data - self.lr * p.grad

    def zero_grad(self):
        for p in self.params:
            p.grad = None


optimizer = SGD(model.parameters(), lr)
for x, y in batches(8):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    optimizer.step()
    clip_grad_norm_(model.parameters(), 0.1)  # fault: clip-after-step


# --- third round: class without torch optim, zero threshold
class SGD:
    def __init__(self, params, lr):
        self.params, self.lr = list(params), lr

    @torch.no_grad()
    def step(self):
        for p in self.params:
            p -= self.lr * p.grad


optimizer = SGD(model.parameters(), lr)
for x, y in batches(8):
    model.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), 0)  # fault: threshold-without-meaning
    optimizer.step()

# --- third round: data copies by hand
for x, y in batches(8):
    model.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_([p.data for p in model.parameters()], 0.1)  # fault: clip-of-nothing
    for p in model.parameters():
        p.data -= lr * p.grad

# --- third round: manual linear regression
w = torch.zeros(6, 1, requires_grad=True)
b = torch.zeros(1, requires_grad=True)
for x, _ in batches(12):
    loss = (x @ w + b - x.sum(1, keepdim=True)).square().mean()
    loss.backward()
    clip_grad_norm_([w, b], 1.0)
    with torch.no_grad():
        w -= 0.1 * w.grad
        b -= 0.1 * b.grad
    w.grad.zero_()
    b.grad.zero_()

# --- third round: langevin with noise by foreach
for x, y in batches(8):
    parameters = list(model.parameters())
    loss_of(x, y).backward()
    clip_grad_norm_(parameters, 0.5)
    with torch.no_grad():
        grads = [p.grad for p in parameters]
        torch._foreach_add_(parameters, grads, alpha=-lr)
        torch._foreach_add_(parameters, [0.01 * torch.randn_like(p) for p in parameters])
    for p in parameters:
        p.grad = None
