"""Heads that take turns, each with a clip of its own; a critic whose step is left out now and then."""

import torch
from torch.nn.functional import mse_loss
from torch.nn.utils import clip_grad_norm_

body, heads = torch.nn.Linear(4, 8), torch.nn.ModuleList(torch.nn.Linear(8, 1) for _ in range(3))
optimizer = torch.optim.SGD([*body.parameters(), *heads[0].parameters()], lr=0.1)
others = [torch.optim.SGD(heads[k].parameters(), lr=0.1) for k in (1, 2)]
for step in range(9):
    body.zero_grad()
    heads.zero_grad()
    mse_loss(heads[step % 3](body(torch.randn(8, 4))), torch.randn(8, 1)).backward()
    clip_grad_norm_(body.parameters(), 0.1)
    for head in heads:
        clip_grad_norm_(head.parameters(), 0.1)
    for each in (optimizer, *others):
        each.step()

critic = torch.nn.Linear(8, 1)
second = torch.optim.SGD(critic.parameters(), lr=0.1)
for step in range(8):
    second.zero_grad(set_to_none=step < 4)
    critic(body(torch.randn(8, 4)).detach()).mean().backward()
    clip_grad_norm_(critic.parameters(), 0.1)
    if step % 2:
        second.step()
    optimizer.zero_grad()
    critic(body(torch.randn(8, 4))).mean().backward()  # leaks into the critic
    clip_grad_norm_(body.parameters(), 0.1)
    optimizer.step()
