"""What people do instead: clipping per tensor, clipping of spectra, skipped steps, optimizers without rates."""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from training import Clipper, Loop
from workloads import Workload


class AdaGC(Clipper):
    """Clips the gradient of each tensor to 1.05 times the average of its clipped norms.

    In the first 100 steps all gradients together are clipped to norm 1, and the smallest norm of each is kept.
    Source: Wang et al. 2025 (ICML 2026), "AdaGC", with its settings.
    """

    ABSOLUTE, RELATIVE, BETA, WARMUP = 1.0, 1.05, 0.98, 100

    def __init__(self, loop: Loop) -> None:
        self.loop, self.step = loop, 0
        self.averages: list[Tensor] = []

    def before(self) -> None:
        gradients = self.loop.gradients
        norms = torch.stack(torch._foreach_norm(gradients))
        if self.step < self.WARMUP:
            scale = (self.ABSOLUTE / torch.linalg.vector_norm(norms)).clamp(max=1.0)
            norms = norms * scale
            torch._foreach_mul_(gradients, scale)
            self.averages = [torch.minimum(norms, self.averages[0]) if self.averages else norms]
            self.clipped += bool(scale < 1)
        else:
            scales = (self.RELATIVE * self.averages[0] / norms).nan_to_num(1.0).clamp(max=1.0)
            torch._foreach_mul_(gradients, list(scales))
            self.averages = [self.BETA * self.averages[0] + (1 - self.BETA) * norms * scales]
            self.clipped += bool((scales < 1).any())
        self.step += 1


class Spectral(Clipper):
    """Bends the singular values of each update of a matrix down to 10 rates at most.

    Source: Jiang, Semenov, Stich 2026 (ICML), SPECTRA, as released: U -> (I + U U' / c^2)^{-1/2} U for matrices alone,
    c = 10 at a constant rate and 5 under a cosine, times sqrt(rows / columns) where there are more rows.
    """

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.most = 10.0 if loop.workload.schedule == "constant" else 5.0
        self.rates = {
            p: group
            for optimizer in loop.optimizers
            for group in optimizer.param_groups
            for p in group["params"]
            if p.ndim == 2
        }
        self.start: dict[Tensor, Tensor] = {}

    def before(self) -> None:
        self.start = {p: p.detach().clone() for p in self.rates}

    @torch.no_grad()
    def after(self) -> None:
        for p, x in self.start.items():
            lr, decay = float(self.rates[p]["lr"]), self.rates[p].get("weight_decay", 0.0)
            if lr == 0 or not torch.isfinite(p).all():
                continue
            update = ((x - p) / lr - decay * x).double()
            u, s, v = torch.linalg.svd(update, full_matrices=False)
            bent = u @ ((s / (1 + (s / self.most).square()).sqrt())[:, None] * v)
            self.clipped += bool(s[0] > self.most)
            scale = max(1.0, p.shape[0] / p.shape[1]) ** 0.5
            p.copy_((1 - decay * lr) * x - lr * scale * bent.to(p.dtype))


class SkipStep(Clipper):
    """Skips a step whose loss or gradient norm lies six deviations away from the last 128.

    Source: OLMo-core's `SkipStepOptimizer`, with its settings: the rule begins when half of the window is full. A
    skipped step leaves parameters and the state of the optimizer as they were.
    """

    WINDOW, SIGMAS = 128, 6.0

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.seen: tuple[deque[float], deque[float]] = (deque(maxlen=self.WINDOW), deque(maxlen=self.WINDOW))
        self.start: list[Tensor] = []
        self.kept: list[Any] = []

    def before(self) -> None:
        self.start = []
        values = (self.loop.loss, float(get_total_norm(self.loop.gradients)))
        if len(self.seen[0]) + 1 >= self.WINDOW // 2:
            for seen, value in zip(self.seen, values, strict=True):
                past = torch.tensor(seen, dtype=torch.float64)
                if not abs(value - float(past.mean())) <= self.SIGMAS * float(past.std()):
                    self.start = [p.detach().clone() for p in self.loop.parameters]
                    self.kept = [
                        {
                            p: {k: torch.clone(v) for k, v in state.items() if isinstance(v, Tensor)}
                            for p, state in pairs
                        }
                        for pairs in (optimizer.state.items() for optimizer in self.loop.optimizers)
                    ]
        for seen, value in zip(self.seen, values, strict=True):
            seen.append(value)

    @torch.no_grad()
    def after(self) -> None:
        if self.start:
            self.clipped += 1
            torch._foreach_copy_([p.detach() for p in self.loop.parameters], self.start)
            for optimizer, kept in zip(self.loop.optimizers, self.kept, strict=True):
                for p, entries in kept.items():
                    for name, value in entries.items():
                        optimizer.state[p][name].copy_(value)


class StableAdamW(torch.optim.AdamW):
    """AdamW with the rate of each tensor over max(1, root mean square of g / sqrt(v)).

    Source: Wortsman et al. 2023 (NeurIPS), "Stable and low-precision training", section 3.
    """

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        start = {p: p.detach().clone() for group in self.param_groups for p in group["params"] if p.grad is not None}
        found = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p not in start:
                    continue
                state = self.state[p]
                second = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
                ratio = (p.grad.square() / second.clamp(min=group["eps"] ** 2)).mean().sqrt()
                p.lerp_(start[p], 1 - 1 / max(1.0, float(ratio)))
        return found


def stable(workload: Workload, model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Returns AdamW with bounded updates."""
    return [StableAdamW(model.parameters(), lr=lr)]


def prodigy(workload: Workload, model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Returns Prodigy, whose rate is 1. Source: Mishchenko and Defazio 2024 (ICML), package `prodigyopt`."""
    from prodigyopt import Prodigy

    return [Prodigy(model.parameters(), lr=1.0)]


def schedule_free(workload: Workload, model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Returns schedule-free AdamW at its default rate. Source: Defazio et al. 2024, package `schedulefree`."""
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(model.parameters())
    optimizer.train()
    return [optimizer]
