"""Optimizers whose own arithmetic reads norms, of clipped gradients: with a closure, and in two halves as SAM."""

import torch
from torch.nn.functional import mse_loss
from torch.nn.utils import clip_grad_norm_


class Lars(torch.optim.SGD):
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        for p in self.param_groups[0]["params"]:
            with torch.no_grad():
                p.grad.mul_(p.norm() / (p.grad.norm() + 1e-6))
        super().step()
        return loss


class SAM(torch.optim.Optimizer):
    def __init__(self, params, rho):
        super().__init__(params, {"rho": rho})
        self.base = torch.optim.SGD(self.param_groups, lr=0.1)

    @torch.no_grad()
    def first_half(self):
        for p in self.param_groups[0]["params"]:
            self.state[p] = p.grad * (self.param_groups[0]["rho"] / p.grad.norm())
            p.add_(self.state[p])
        self.zero_grad()

    @torch.no_grad()
    def second_half(self):
        for p in self.param_groups[0]["params"]:
            p.sub_(self.state[p])
        self.base.step()
        self.zero_grad()

    def step(self, closure):
        self.first_half()
        closure()
        self.second_half()


model = torch.nn.Linear(4, 1)
lars, sam = Lars(model.parameters(), lr=0.1), SAM(model.parameters(), rho=0.05)
for _ in range(4):
    x, y = torch.randn(8, 4), torch.randn(8, 1)

    def clipped_loss():
        loss = mse_loss(model(x), y)  # noqa: B023
        loss.backward()
        clip_grad_norm_(model.parameters(), 0.1)
        return loss

    lars.zero_grad()
    lars.step(clipped_loss)
    lars.zero_grad()
    clipped_loss()
    sam.step(clipped_loss)
    clipped_loss()
    sam.first_half()
    clipped_loss()
    sam.second_half()
