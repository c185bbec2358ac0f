"""Two networks, two optimizers. Everything above the first cell is the beginning of every script."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 6))
critic = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1))
optimizer_g = torch.optim.Adam(generator.parameters(), 1e-3)
optimizer_d = torch.optim.Adam(critic.parameters(), 1e-3)
model = nn.ModuleList([generator, critic])


def loss_d():
    real, fake = critic(torch.randn(16, 6)), critic(generator(torch.randn(16, 4)).detach())
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def loss_g():
    return F.softplus(-critic(generator(torch.randn(16, 4)))).mean()


# --- the other network is clipped
for _ in range(6):
    optimizer_d.zero_grad()
    loss_d().backward()
    clip_grad_norm_(critic.parameters(), 0.1)
    optimizer_d.step()
    optimizer_g.zero_grad()
    loss_g().backward()
    clip_grad_norm_(critic.parameters(), 0.1)  # fault: clip-of-unused-gradients
    optimizer_g.step()

# --- both are clipped after the first one has stepped
actor, value = generator, critic
for _ in range(6):
    features = actor(torch.randn(16, 4))
    loss = features.square().mean() + value(features).square().mean()
    optimizer_g.zero_grad()
    optimizer_d.zero_grad()
    loss.backward()
    optimizer_g.step()
    clip_grad_norm_(model.parameters(), 0.1)  # fault: clip-after-step
    optimizer_d.step()

# --- each its own
for _ in range(6):
    optimizer_d.zero_grad()
    loss_d().backward()
    clip_grad_norm_(critic.parameters(), 0.1)
    optimizer_d.step()
    optimizer_g.zero_grad()
    loss_g().backward()
    clip_grad_norm_(generator.parameters(), 0.1)
    optimizer_g.step()

# --- the critic is clipped alone, on purpose
for _ in range(6):
    optimizer_d.zero_grad()
    loss_d().backward()
    clip_grad_norm_(critic.parameters(), 0.1)
    optimizer_d.step()
    optimizer_g.zero_grad()
    loss_g().backward()
    optimizer_g.step()

# --- one clip for both
for _ in range(6):
    features = generator(torch.randn(16, 4))
    (features.square().mean() + critic(features).square().mean()).backward()
    clip_grad_norm_([*generator.parameters(), *critic.parameters()], 0.1)
    for optimizer in (optimizer_g, optimizer_d):
        optimizer.step()
        optimizer.zero_grad()

# --- five steps of the critic for one of the generator
for k in range(12):
    optimizer_d.zero_grad()
    loss_d().backward()
    clip_grad_norm_(critic.parameters(), 0.1)
    optimizer_d.step()
    if k % 5 == 0:
        optimizer_g.zero_grad()
        loss_g().backward()
        clip_grad_norm_(generator.parameters(), 0.1)
        optimizer_g.step()
