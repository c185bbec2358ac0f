"""Slow, literal twins of the optimizers: the formulas of the papers, one scalar at a time, in float64."""

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor


class SlowClippedMomentum:
    """Framework of Zhang et al. 2020 with one global norm, decoupled decay, and gradients passed in.

    Args:
        groups: One list of float64 tensors per group, moved in place.
        options: One dict per group: lr, threshold, momentum, nu, clip, weight_decay, maximize; and, if they differ
            from the paper: longest_step (threshold None), decoupled_weight_decay, bias_correction, norm_scope.
    """

    def __init__(self, groups: Sequence[Sequence[Tensor]], options: Sequence[dict]) -> None:
        self.groups = groups
        self.options = options
        self.momenta = [[[0.0] * p.numel() for p in group] for group in groups]
        self.ages = [[0 for _ in group] for group in groups]

    def step(self, grads: Sequence[Sequence[Tensor | None]]) -> None:
        """Takes one step; a gradient of None leaves its parameter and its momentum alone."""
        live = []
        for i, group in enumerate(self.groups):
            for j, p in enumerate(group):
                if grads[i][j] is not None:
                    o = self.options[i]
                    sign = -1.0 if o["maximize"] else 1.0
                    g = [sign * v.item() for v in grads[i][j].flatten()]
                    if not o.get("decoupled_weight_decay", True):
                        g = [v + o["weight_decay"] * x.item() for v, x in zip(g, p.flatten(), strict=True)]
                    live.append((o, p, g, i, j))

        averages = {}
        for o, _, g, i, j in live:
            beta, m = o["momentum"], self.momenta[i][j]
            for k in range(len(g)):
                m[k] = beta * m[k] + (1 - beta) * g[k]
            self.ages[i][j] += 1
            corrected = o.get("bias_correction", False)
            averages[i, j] = [v / (1 - beta ** self.ages[i][j]) for v in m] if corrected else m

        for o, p, g, i, j in live:
            counted = [e for e in live if o.get("norm_scope", "all") == "all" or e[3] == i]
            g_norm = math.sqrt(sum(v**2 for e in counted for v in e[2]))
            m_norm = math.sqrt(sum(v**2 for e in counted for v in averages[e[3], e[4]]))
            eta, nu, m = o["lr"], o["nu"], averages[i, j]
            flat = p.view(-1)
            for k in range(len(g)):
                x = flat[k].item()
                if o.get("decoupled_weight_decay", True):
                    x = x - eta * o["weight_decay"] * x
                x = x - nu * _rate(m_norm, o) * m[k] - (1 - nu) * _rate(g_norm, o) * g[k]
                flat[k] = x


def _rate(norm: float, o: dict) -> float:
    eta = o["lr"]
    if norm == 0 or math.inf in (o["threshold"], o.get("longest_step")) or (eta == 0 and o["clip"] != "normalize"):
        return eta
    gamma = o["longest_step"] if o["threshold"] is None else eta * o["threshold"]
    if o["clip"] == "soft":
        return eta / (1 + eta * norm / gamma)
    if o["clip"] == "normalize":
        return gamma / norm
    return min(eta, gamma / norm)


def slow_geometry(name: str, g: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Returns ||g||, ||g||_* and lmo(g) of a layer's geometry, from the tables of Pethick et al. 2025, entry by entry.

    Args:
        name: "frobenius", "rms", "row", "table", "column", "sign", "sign_per_input", "spectral", "convolution",
            "transposed".
        g: float64 array.
    """
    if name in ("frobenius", "rms"):
        n = max(g.size, 1) if name == "rms" else 1
        length = math.sqrt(sum(v * v for v in g.ravel()))
        return length / math.sqrt(n), length * math.sqrt(n), -math.sqrt(n) * g / (length or 1.0)
    if name in ("sign", "sign_per_input"):
        d_in = g[0].size if name == "sign_per_input" else 1
        absolute = [abs(v) for v in g.ravel()]
        lmo = np.array([(int(v < 0) - int(v > 0)) / d_in for v in g.ravel()], dtype=float).reshape(g.shape)
        return d_in * max(absolute), sum(absolute) / d_in, lmo
    if name in ("row", "table", "column"):
        slices = g.T if name == "column" else g.reshape(len(g), -1)
        scale = math.sqrt(slices.shape[1]) if name != "row" else 1 / math.sqrt(slices.shape[1])
        lengths = [math.sqrt(sum(v * v for v in part)) for part in slices]
        lmo = np.array([-scale * part / (length or 1.0) for part, length in zip(slices, lengths, strict=True)])
        lmo = lmo.T if name == "column" else lmo.reshape(g.shape)
        return max(lengths) / scale, sum(lengths) * scale, lmo
    swapped = g.swapaxes(0, 1) if name == "transposed" else g
    positions = math.prod(g.shape[2:])
    scale = math.sqrt(swapped.shape[0] / swapped.shape[1]) / positions
    u, s, vt = np.linalg.svd(swapped.reshape(len(swapped), -1), full_matrices=False)
    rank = int((s > 1e-13 * max(s[0], 1e-300) * max(g.shape)).sum())
    lmo = (-scale * u[:, :rank] @ vt[:rank]).reshape(swapped.shape)
    return s[0] / scale, s.sum() * scale, lmo.swapaxes(0, 1) if name == "transposed" else lmo


class SlowGGNC:
    """Algorithms 1 and 2 of Pethick et al. 2025 over a product of norms, with the direction u formed as written.

    Args:
        groups: One list of float64 tensors per group, moved in place.
        options: One dict per group, with the options of GGNC; geometries by the names of `slow_geometry`, or
            "euclidean" for the tensors that share one Euclidean norm.
    """

    def __init__(self, groups: Sequence[Sequence[Tensor]], options: Sequence[dict]) -> None:
        self.groups = groups
        self.options = options
        self.momenta = [[np.zeros(p.shape) for p in group] for group in groups]

    def step(self, grads: Sequence[Sequence[Tensor | None]]) -> None:
        """Takes one step; a gradient of None leaves its parameter and its momentum alone."""
        live = []
        for i, group in enumerate(self.groups):
            for j, p in enumerate(group):
                if grads[i][j] is not None:
                    o = self.options[i]
                    g = -grads[i][j].numpy() if o["maximize"] else grads[i][j].numpy()
                    self.momenta[i][j] = np.asarray(o["momentum"] * self.momenta[i][j] + (1 - o["momentum"]) * g)
                    live.append((o, p.numpy(), self.momenta[i][j]))
        joint = math.sqrt(sum(((o["radius"] * d) ** 2).sum() for o, _, d in live if o["geometry"] == "euclidean"))

        inner, largest, joint_square, directions = 0.0, 0.0, 0.0, []
        for o, x, d in live:
            if o["geometry"] == "euclidean":
                lmo = -(o["radius"] ** 2) * d / (joint or 1.0)
            else:
                lmo = o["radius"] * slow_geometry(o["geometry"], d)[2]
            u = o["weight_decay"] * x - lmo
            inner += float((d * u).sum())
            if o["geometry"] == "euclidean":
                joint_square += float(((u / o["radius"]) ** 2).sum())
            else:
                largest = max(largest, slow_geometry(o["geometry"], u)[0] / o["radius"])
            directions.append(u)
        square = max(largest**2, joint_square)
        if all(o["weight_decay"] == 0 for o, _, _ in live):
            square = 1.0
        elif self.options[0]["short_step"] == "bound":
            square = 4.0
        tau = max(inner / square, 0.0) if square else 0.0

        for (o, x, _), u in zip(live, directions, strict=True):
            if o["longest_step"] is None:
                x -= o["lr"] * min(o["threshold"], tau) * u
            else:
                x -= min(o["longest_step"], o["lr"] * tau) * u
