"""Networks whose turn comes after more than 30 clips: frozen, left out, with a loss times 0, skipped after overflow."""

import torch
from torch.nn.functional import softplus
from torch.nn.utils import clip_grad_norm_

body, head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)
critic, spare = torch.nn.Linear(1, 1), torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(head.parameters(), lr=0.01)
second = torch.optim.SGD([*critic.parameters(), *spare.parameters()], lr=0.01)
body.requires_grad_(False)
for step in range(40):
    out = head(body(torch.randn(8, 4)))
    (out.square().mean() + 0.0 * softplus(-critic(out)).mean()).backward()
    clip_grad_norm_(body.parameters(), 0.1)
    clip_grad_norm_([p for p in body.parameters() if p.requires_grad], 0.1)
    clip_grad_norm_(spare.parameters(), 0.1)
    clip_grad_norm_(head.parameters(), 0.1 + step)
    optimizer.step()
    optimizer.zero_grad()

    second.zero_grad(set_to_none=step % 2 == 0)
    (0.0 * softplus(critic(out.detach())).mean()).backward()
    clip_grad_norm_(critic.parameters(), 0.1)
    second.step()
for _ in range(40):  # what is clipped is frozen so far, and the rest is not clipped on purpose
    head(body(torch.randn(8, 4))).square().mean().backward()
    clip_grad_norm_(body.parameters(), 0.1)
    optimizer.step()
    optimizer.zero_grad()
for _ in range(20):  # gradients are thrown away, as after overflow, and the rest of the step goes on
    head(body(torch.randn(8, 4))).mean().backward()
    optimizer.zero_grad()
    clip_grad_norm_(head.parameters(), 0.1)
    optimizer.step()
model = head
