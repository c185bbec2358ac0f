"""A probe and AutoClip measure the loop, which is compiled; both evaluate the loss again within the step."""

import torch
from torch.nn.functional import mse_loss

import smoothdiag as sd

model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
compiled = torch.compile(model, backend="aot_eager")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)


def loss_fn(model, batch):
    return mse_loss(compiled(batch), batch.sum(1, keepdim=True))


with sd.Probe(model, optimizer, loss_fn, schedule=sd.every(2)) as probe:
    sd.AutoClip(optimizer, probe)
    for batch in probe.watch([torch.randn(8, 4) for _ in range(6)]):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e3)  # a safety net: AutoClip clips
        optimizer.step()
