"""Unscales before it clips; a fused optimizer beside it takes the factor out by itself and is not clipped."""

import torch
from torch.nn.functional import mse_loss

body, head = torch.nn.Linear(4, 8), torch.nn.Linear(8, 1)
clipped = torch.optim.AdamW(body.parameters(), lr=0.01)
fused = torch.optim.AdamW(head.parameters(), lr=0.01, fused=True)
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
for step in range(6):
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = mse_loss(head(body(torch.randn(8, 4))), torch.randn(8, 1)) / 2
        scaler.scale(loss * (torch.inf if step == 3 else 1.0)).backward()
    scaler.unscale_(clipped)
    norm = torch.nn.utils.clip_grad_norm_(body.parameters(), 1.0)
    scaler.step(clipped)
    scaler.step(fused)
    scaler.update()
    clipped.zero_grad()
    fused.zero_grad()
