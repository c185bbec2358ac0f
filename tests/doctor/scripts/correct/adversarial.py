"""Two networks that train against each other, each with its own clip; the gradients of one leak into the other."""

import torch
from torch.nn.functional import softplus
from torch.nn.utils import clip_grad_norm_

generator, critic = torch.nn.Linear(3, 4), torch.nn.Linear(4, 1)
first = torch.optim.Adam(generator.parameters(), lr=0.01)
second = torch.optim.Adam(critic.parameters(), lr=0.01)
for _ in range(6):
    second.zero_grad()
    real, fake = critic(torch.randn(8, 4)), critic(generator(torch.randn(8, 3)).detach())
    (softplus(-real).mean() + softplus(fake).mean()).backward()
    clip_grad_norm_(critic.parameters(), 0.1)
    second.step()

    first.zero_grad()
    softplus(-critic(generator(torch.randn(8, 3)))).mean().backward()
    clip_grad_norm_(generator.parameters(), 0.1)
    first.step()
