"""Two networks, two optimizers. Everything above the first cell is the beginning of every script."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

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

# --- from memory: DDPG, the critic is clipped in the actor's update
for _ in range(6):
    state = torch.randn(16, 4)
    critic_loss = F.mse_loss(critic(generator(state).detach()), torch.randn(16, 1))
    optimizer_d.zero_grad()
    critic_loss.backward()
    nn.utils.clip_grad_norm_(critic.parameters(), 0.5)
    optimizer_d.step()
    actor_loss = -critic(generator(state)).mean()
    optimizer_g.zero_grad()
    actor_loss.backward()
    nn.utils.clip_grad_norm_(critic.parameters(), 0.5)  # fault: clip-of-unused-gradients
    optimizer_g.step()

# --- from memory: SAC, one chain of parameters for everything
from itertools import chain  # noqa: E402

second = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1))
q_params = chain(critic.parameters(), second.parameters())
q_optimizer = torch.optim.Adam(q_params, lr=1e-3)
for _ in range(6):
    x, target = torch.randn(16, 6), torch.randn(16, 1)
    q_optimizer.zero_grad()
    (F.mse_loss(critic(x), target) + F.mse_loss(second(x), target)).backward()
    nn.utils.clip_grad_norm_(q_params, 1.0)  # fault: clip-of-nothing
    q_optimizer.step()

# --- from memory: WGAN, weights clamped by hand
for k in range(10):
    optimizer_d.zero_grad()
    (critic(generator(torch.randn(16, 4)).detach()).mean() - critic(torch.randn(16, 6)).mean()).backward()
    optimizer_d.step()
    for p in critic.parameters():
        p.data.clamp_(-0.01, 0.01)
    if k % 5 == 0:
        optimizer_g.zero_grad()
        (-critic(generator(torch.randn(16, 4))).mean()).backward()
        optimizer_g.step()

# --- from memory: DDPG with frozen critic and soft updates
import copy  # noqa: E402

target = copy.deepcopy(critic)
for _ in range(6):
    state = torch.randn(16, 4)
    optimizer_d.zero_grad()
    F.mse_loss(critic(generator(state).detach()), target(generator(state)).detach() + 0.1).backward()
    nn.utils.clip_grad_norm_(critic.parameters(), 0.5)
    optimizer_d.step()
    for p in critic.parameters():
        p.requires_grad = False
    optimizer_g.zero_grad()
    (-critic(generator(state)).mean()).backward()
    nn.utils.clip_grad_norm_(generator.parameters(), 0.5)
    optimizer_g.step()
    for p in critic.parameters():
        p.requires_grad = True
    with torch.no_grad():
        for p, q in zip(critic.parameters(), target.parameters(), strict=True):
            q.data.mul_(0.99).add_(0.01 * p.data)

# --- the first is clipped before its step, everything before the second's
for _ in range(6):
    features = generator(torch.randn(16, 4))
    optimizer_g.zero_grad()
    optimizer_d.zero_grad()
    (features.square().mean() + critic(features).square().mean()).backward()
    clip_grad_norm_(generator.parameters(), 0.1)
    optimizer_g.step()
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer_d.step()

# --- everything is clipped before the second's step, the first has no gradients by then
for _ in range(6):
    optimizer_g.zero_grad()
    loss_g().backward()
    optimizer_g.step()
    optimizer_g.zero_grad()
    optimizer_d.zero_grad()
    loss_d().backward()
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer_d.step()

# --- both passes first, one of two is clipped, and the other one steps first
for _ in range(6):
    features = generator(torch.randn(16, 4))
    optimizer_g.zero_grad()
    optimizer_d.zero_grad()
    (features.square().mean() + critic(features).square().mean()).backward()
    clip_grad_norm_(critic.parameters(), 0.1)
    optimizer_g.step()
    optimizer_d.step()

# --- one line clips both networks in turn, and one of them steps
for _ in range(6):
    optimizer_g.zero_grad()
    optimizer_d.zero_grad()
    loss_g().backward()
    for net in (generator, critic):
        clip_grad_norm_(net.parameters(), 0.1)
    optimizer_g.step()

# --- the other network is clipped, gradients zeroed in place
for _ in range(6):
    optimizer_d.zero_grad(set_to_none=False)
    loss_d().backward()
    clip_grad_norm_(critic.parameters(), 0.1)
    optimizer_d.step()
    optimizer_g.zero_grad(set_to_none=False)
    loss_g().backward()
    clip_grad_norm_(critic.parameters(), 0.1)  # fault: clip-of-unused-gradients
    optimizer_g.step()

# --- both networks in one clip, one of them steps
for _ in range(6):
    optimizer_d.zero_grad()
    loss_d().backward()
    clip_grad_norm_(critic.parameters(), 0.1)
    optimizer_d.step()
    optimizer_g.zero_grad()
    loss_g().backward()
    clip_grad_norm_(model.parameters(), 0.1)  # fault: clip-with-unused-gradients
    optimizer_g.step()

# --- both networks in one clip, the other one has no gradients left
for _ in range(6):
    optimizer_d.zero_grad()
    loss_d().backward()
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer_d.step()
    critic.requires_grad_(False)
    optimizer_d.zero_grad(set_to_none=False)
    optimizer_g.zero_grad()
    loss_g().backward()
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer_g.step()
    critic.requires_grad_(True)
    optimizer_g.zero_grad()

# --- both networks in one clip, the second one steps every other time
for k in range(8):
    features = generator(torch.randn(16, 4))
    optimizer_g.zero_grad()
    optimizer_d.zero_grad()
    (features.square().mean() + critic(features).square().mean()).backward()
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer_g.step()
    if k % 2:
        optimizer_d.step()

# --- values of both networks, one of them steps
for _ in range(6):
    optimizer_d.zero_grad()
    loss_d().backward()
    optimizer_d.step()
    optimizer_g.zero_grad()
    loss_g().backward()
    clip_grad_value_(model.parameters(), 0.01)
    optimizer_g.step()

# --- both networks in one clip, and no step at all; then two dry runs of one that steps
for _ in range(6):
    model.zero_grad()
    loss_g().backward()
    norm = clip_grad_norm_(model.parameters(), 0.1)
for _ in range(2):
    model.zero_grad()
    loss_g().backward()
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer_g.step()
model.zero_grad()

# --- both networks are clipped in one clip and thrown away, a third one trains
third = nn.Linear(4, 1)
optimizer = torch.optim.SGD(third.parameters(), lr=0.1)
for _ in range(6):
    model.zero_grad()
    loss_g().backward()
    clip_grad_norm_(model.parameters(), 0.1)  # fault: clip-of-unused-gradients
    optimizer.zero_grad()
    third(torch.randn(16, 4)).square().mean().backward()
    optimizer.step()

# --- third round: by value, wrong network
for _ in range(8):
    optimizer_d.zero_grad()
    loss_d().backward()
    optimizer_d.step()
    optimizer_g.zero_grad()
    loss_g().backward()
    torch.nn.utils.clip_grad_value_(critic.parameters(), 0.001)  # fault: clip-of-unused-gradients
    optimizer_g.step()

# --- third round: clip of the generator before its own backward
for _ in range(8):
    optimizer_d.zero_grad()
    loss_d().backward()
    clip_grad_norm_(generator.parameters(), 0.01)  # fault: clip-after-step
    optimizer_d.step()
    optimizer_g.zero_grad()
    loss_g().backward()
    optimizer_g.step()

# --- third round: alternating by epoch
for epoch in range(4):
    for _ in range(4):
        if epoch % 2:
            optimizer_d.zero_grad()
            loss_d().backward()
            clip_grad_norm_(critic.parameters(), 0.1)
            optimizer_d.step()
        else:
            optimizer_g.zero_grad()
            loss_g().backward()
            clip_grad_norm_(generator.parameters(), 0.1)
            optimizer_g.step()

# --- third round: losses summed, two optimizers, clip each
for _ in range(8):
    features = generator(torch.randn(16, 4))
    loss = features.square().mean() + critic(features).square().mean()
    for o in (optimizer_g, optimizer_d):
        o.zero_grad()
    loss.backward()
    for net, o in ((generator, optimizer_g), (critic, optimizer_d)):
        clip_grad_norm_(net.parameters(), 0.05)
        o.step()
