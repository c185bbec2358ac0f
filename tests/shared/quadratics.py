"""A quadratic in ten dimensions, and the points that an optimizer comes to on it."""

import torch

CURVATURE = torch.linspace(0.1, 2, 10, dtype=torch.float64)


def start(dtype=torch.float64):
    return torch.linspace(-3, 4, 10, dtype=dtype).requires_grad_()


def descend(optimizer, params, num_steps=50, scheduler=None):
    """Descends the quadratic in every parameter; returns the points after each step."""
    path = []
    for _ in range(num_steps):
        for p in params:
            p.grad = CURVATURE.to(p.dtype) * p.detach()
        optimizer.step()
        if scheduler:
            scheduler.step()
        path.append(torch.cat([p.detach().clone() for p in params]))
    return torch.stack(path)


def lengths(path):
    """Returns how long each step was, from the start."""
    return torch.linalg.vector_norm(torch.diff(torch.cat([start().detach()[None], path]), dim=0), dim=1)
