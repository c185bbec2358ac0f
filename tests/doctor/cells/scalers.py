"""Loops with a GradScaler. Everything above the first cell is the beginning of every script."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)


def batches(number):
    for _ in range(number):
        yield torch.randn(16, 6), torch.randint(3, (16,))


def loss_of(x, y):
    with torch.autocast("cpu", torch.bfloat16):
        return F.cross_entropy(model(x), y)


# --- clip of scaled gradients
for x, y in batches(6):
    optimizer.zero_grad()
    scaler.scale(loss_of(x, y)).backward()
    clip_grad_norm_(model.parameters(), 0.1)  # fault: clip-of-scaled-gradients
    scaler.step(optimizer)
    scaler.update()

# --- both steps
for x, y in batches(6):
    optimizer.zero_grad()
    scaler.scale(loss_of(x, y)).backward()
    scaler.unscale_(optimizer)
    clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(optimizer)
    optimizer.step()  # fault: step-with-used-gradients
    scaler.update()

# --- the optimizer's own step in place of the scaler's
for x, y in batches(6):
    optimizer.zero_grad()
    scaler.scale(loss_of(x, y)).backward()
    optimizer.step()  # fault: step-of-scaled-gradients

# --- as the documentation has it
for x, y in batches(6):
    optimizer.zero_grad()
    scaler.scale(loss_of(x, y)).backward()
    scaler.unscale_(optimizer)
    clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(optimizer)
    scaler.update()

# --- accumulation
for _ in range(6):
    for x, y in batches(2):
        scaler.scale(loss_of(x, y) / 2).backward()
    scaler.unscale_(optimizer)
    clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()

# --- every step skipped at first
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
for x, y in batches(12):
    optimizer.zero_grad()
    scaler.scale(100 * loss_of(x, y)).backward()
    scaler.unscale_(optimizer)
    clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(optimizer)
    scaler.update()

# --- from memory: nanoGPT with grad_clip = 0.0 and without its if
grad_clip = 0.0
for _ in range(6):
    for x, y in batches(2):
        scaler.scale(loss_of(x, y) / 2).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)  # fault: threshold-without-meaning
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)

# --- from memory: one optimizer unscaled, both clipped
first, second = (torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (model[0], model[2]))
for x, y in batches(8):
    model.zero_grad()
    scaler.scale(loss_of(x, y)).backward()
    scaler.unscale_(first)
    clip_grad_norm_(model.parameters(), 0.1)  # fault: clip-of-scaled-gradients
    scaler.step(first)
    scaler.step(second)
    scaler.update()


# --- from memory: a scaler class that clips before it unscales
class NativeScaler:
    def __init__(self):
        self._scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def __call__(self, loss, optimizer, clip_grad=None, parameters=None):
        self._scaler.scale(loss).backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip_grad)  # fault: clip-of-scaled-gradients
        self._scaler.unscale_(optimizer)
        self._scaler.step(optimizer)
        self._scaler.update()


loss_scaler = NativeScaler()
for x, y in batches(8):
    optimizer.zero_grad()
    loss_scaler(loss_of(x, y), optimizer, clip_grad=0.1, parameters=model.parameters())

# --- from memory: nanoGPT
grad_clip = 0.1
for _ in range(6):
    for x, y in batches(2):
        scaler.scale(loss_of(x, y) / 2).backward()
    if grad_clip != 0.0:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


# --- from memory: a scaler class with accumulation
class NativeScaler:
    def __init__(self):
        self._scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def __call__(self, loss, optimizer, clip_grad=None, parameters=None, update_grad=True):
        self._scaler.scale(loss).backward()
        norm = None
        if update_grad:
            self._scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(parameters, clip_grad)
            self._scaler.step(optimizer)
            self._scaler.update()
        return norm


loss_scaler = NativeScaler()
optimizer.zero_grad()
for k, (x, y) in enumerate(batches(12)):
    loss_scaler(loss_of(x, y) / 2, optimizer, 0.1, model.parameters(), update_grad=(k + 1) % 2 == 0)
    if (k + 1) % 2 == 0:
        optimizer.zero_grad()

# --- the factor is read or taken out by hand, before the optimizer's own step
for k, (x, y) in enumerate(batches(8)):
    optimizer.zero_grad()
    scaler.scale(loss_of(x, y)).backward()
    factor = 1024.0 if k % 2 else scaler.get_scale()
    if k % 2:
        for p in model.parameters():
            p.grad.div_(factor)
        clip_grad_norm_(model.parameters(), 0.1)
    else:
        clip_grad_norm_(model.parameters(), 0.1 * factor)
        torch._foreach_div_([p.grad for p in model.parameters()], factor)
    optimizer.step()

# --- the factor is read before the optimizer's own step, whose rate is divided by it
for x, y in batches(6):
    optimizer.zero_grad()
    scaler.scale(loss_of(x, y)).backward()
    optimizer.param_groups[0]["lr"] = 0.1 / scaler.get_scale()
    optimizer.step()

# --- a fused optimizer divides by itself
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
for x, y in batches(6):
    optimizer.zero_grad()
    scaler.scale(loss_of(x, y)).backward()
    scaler.step(optimizer)
    scaler.update()

# --- clip of scaled gradients, often enough for a note on the line
for x, y in batches(34):
    optimizer.zero_grad()
    scaler.scale(loss_of(x, y)).backward()
    clip_grad_norm_(model.parameters(), 0.1)  # fault: clip-of-scaled-gradients
    scaler.step(optimizer)
    scaler.update()

# --- a network whose steps are all skipped, beside one that is never clipped
other = nn.Linear(6, 3)
beside = torch.optim.SGD(other.parameters(), lr=0.1)
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
for x, y in batches(6):
    optimizer.zero_grad()
    scaler.scale(1e9 * loss_of(x, y)).backward()
    scaler.unscale_(optimizer)
    clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(optimizer)
    scaler.update()
    beside.zero_grad()
    F.cross_entropy(other(x), y).backward()
    beside.step()
optimizer.zero_grad()

# --- third round: optimizer.step first and scaler.step after
for x, y in batches(8):
    optimizer.zero_grad()
    scaler.scale(loss_of(x, y)).backward()
    scaler.unscale_(optimizer)
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    scaler.step(optimizer)  # fault: step-with-used-gradients
    scaler.update()

# --- third round: micro batches clipped with scale
for _ in range(6):
    for x, y in batches(2):
        scaler.scale(loss_of(x, y)).backward()
    clip_grad_value_ = nn.utils.clip_grad_value_
    clip_grad_value_(model.parameters(), 0.5)  # fault: clip-of-scaled-gradients
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()

# --- third round: disabled scaler
scaler = torch.amp.GradScaler("cpu", enabled=False)
for x, y in batches(8):
    optimizer.zero_grad()
    scaler.scale(loss_of(x, y)).backward()
    scaler.unscale_(optimizer)
    clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(optimizer)
    scaler.update()

# --- fourth round: total norm of scaled gradients
for x, y in batches(6):
    optimizer.zero_grad()
    scaler.scale(loss_of(x, y)).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), 0.1, norm)  # fault: clip-with-old-norm
    scaler.step(optimizer)
    scaler.update()

# --- fourth round: total norm of scaled gradients, divided by the factor
for x, y in batches(6):
    optimizer.zero_grad()
    scaler.scale(loss_of(x, y)).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]) / scaler.get_scale()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), 0.1, norm)
    scaler.step(optimizer)
    scaler.update()
