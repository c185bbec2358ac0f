"""Two scaled losses with a backward pass each, and a clip in a helper before the factor is taken out."""

import torch
from torch.nn.utils import clip_grad_value_

model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scaler = torch.amp.GradScaler("cpu")


def clip():
    clip_grad_value_(model.parameters(), 0.1)  # fault: clip-of-scaled-gradients 5/5


for step in range(5):
    optimizer.zero_grad()
    losses = [each.square().mean() for each in model(torch.randn(2, 8, 4))]
    for loss in scaler.scale(losses if step % 2 else iter(losses)):
        (loss / 2).backward(retain_graph=True)
    clip()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
