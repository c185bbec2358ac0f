"""Slow, literal twins of the optimizers: the formulas of the papers, one scalar at a time, in float64."""

import math
from collections.abc import Sequence

from torch import Tensor


class SlowClippedMomentum:
    """Framework of Zhang et al. 2020 with one global norm, decoupled decay, and gradients passed in.

    Args:
        groups: One list of float64 tensors per group, moved in place.
        options: One dict per group: lr, threshold, momentum, nu, clip, weight_decay, maximize.
    """

    def __init__(self, groups: Sequence[Sequence[Tensor]], options: Sequence[dict]) -> None:
        self.groups = groups
        self.options = options
        self.momenta = [[[0.0] * p.numel() for p in group] for group in groups]

    def step(self, grads: Sequence[Sequence[Tensor | None]]) -> None:
        """Takes one step; a gradient of None leaves its parameter and its momentum alone."""
        live = []
        for i, group in enumerate(self.groups):
            for j, p in enumerate(group):
                if grads[i][j] is not None:
                    sign = -1.0 if self.options[i]["maximize"] else 1.0
                    live.append((self.options[i], p, [sign * v.item() for v in grads[i][j].flatten()], i, j))

        for o, _, g, i, j in live:
            beta, m = o["momentum"], self.momenta[i][j]
            for k in range(len(g)):
                m[k] = beta * m[k] + (1 - beta) * g[k]
        g_norm = math.sqrt(sum(v**2 for _, _, g, _, _ in live for v in g))
        m_norm = math.sqrt(sum(v**2 for _, _, _, i, j in live for v in self.momenta[i][j]))

        for o, p, g, i, j in live:
            eta, nu, m = o["lr"], o["nu"], self.momenta[i][j]
            flat = p.view(-1)
            for k in range(len(g)):
                x = flat[k].item()
                x = x - eta * o["weight_decay"] * x
                x = x - nu * _rate(m_norm, o) * m[k] - (1 - nu) * _rate(g_norm, o) * g[k]
                flat[k] = x


def _rate(norm: float, o: dict) -> float:
    eta = o["lr"]
    if norm == 0 or o["threshold"] == math.inf:
        return eta
    gamma = eta * o["threshold"]
    if o["clip"] == "soft":
        return eta / (1 + eta * norm / gamma)
    return min(eta, gamma / norm)
