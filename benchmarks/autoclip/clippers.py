"""Clipping rules of others, and the step caps that every measurement must beat."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from training import Clipper, Loop


class GradientClipper(Clipper):
    """Scales the gradient to a limit that depends on its norm and on earlier norms."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop

    def limit(self, norm: float) -> float:
        raise NotImplementedError

    def before(self) -> None:
        norm = float(get_total_norm(self.loop.gradients))
        limit = self.limit(norm)
        if norm > limit:
            self.clipped += 1
            torch._foreach_mul_(self.loop.gradients, limit / norm)


class MaxNorm(GradientClipper):
    """A fixed threshold on the norm of the gradient."""

    def __init__(self, loop: Loop, max_norm: float) -> None:
        super().__init__(loop)
        self.max_norm = max_norm

    def limit(self, norm: float) -> float:
        return self.max_norm


class Percentile(GradientClipper):
    """A percentile of all norms so far. Source: Seetharaman, Wichern, Pardo, Le Roux 2020 (MLSP), "AutoClip"."""

    def __init__(self, loop: Loop, percent: float) -> None:
        super().__init__(loop)
        self.percent = percent
        self.norms: list[float] = []

    def limit(self, norm: float) -> float:
        if math.isfinite(norm):  # the published code lets one NaN spoil all later thresholds
            self.norms.append(norm)
        return float(np.percentile(self.norms, self.percent)) if self.norms else math.inf


class ZClip(GradientClipper):
    """Clips norms that are outliers among recent ones, by their z-score.

    The score comes from moving averages of mean and variance, with the published constants. The larger the outlier, the
    smaller the norm it is clipped to. The published code also has a fixed threshold, which is left out here.
    Source: Kumar et al. 2025, "ZClip".
    """

    ALPHA, Z, WARMUP = 0.97, 2.5, 25

    def __init__(self, loop: Loop) -> None:
        super().__init__(loop)
        self.first: list[float] = []
        self.mean = self.variance = math.nan

    def limit(self, norm: float) -> float:
        if not math.isfinite(norm):
            return math.inf
        if len(self.first) < self.WARMUP:
            self.first.append(norm)
            self.mean, self.variance = float(np.mean(self.first)), float(np.var(self.first))
            return math.inf
        deviation = math.sqrt(self.variance)
        z = (norm - self.mean) / (deviation + 1e-6)
        limit = self.mean + self.Z**2 / z * deviation if z > self.Z else math.inf
        kept = min(norm, limit)
        self.variance = self.ALPHA * self.variance + (1 - self.ALPHA) * (kept - self.mean) ** 2
        self.mean = self.ALPHA * self.mean + (1 - self.ALPHA) * kept
        return limit


class AdaptiveGradientClipping(Clipper):
    """Clips the gradient of every unit by a share of the norm of its weights.

    It clips all parameters; the paper leaves out the last layer. Source: Brock, De, Smith, Simonyan 2021 (ICML),
    "High-performance large-scale image recognition without normalization".
    """

    def __init__(self, loop: Loop, share: float = 0.01, smallest: float = 1e-3) -> None:
        self.loop, self.share, self.smallest = loop, share, smallest

    def before(self) -> None:
        any_clipped = False
        for p in self.loop.parameters:
            assert p.grad is not None
            limit = self.share * _unit_norms(p.detach()).clamp(min=self.smallest)
            norms = _unit_norms(p.grad)
            any_clipped = any_clipped or bool((norms > limit).any())
            p.grad.mul_((limit / norms.clamp(min=1e-12)).clamp(max=1.0))
        self.clipped += any_clipped


def _unit_norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)) if x.ndim > 1 else None, keepdim=True)


class StepCap(Clipper):
    """Keeps steps within a length: under SGD the step that equal gradients add up to, otherwise the update itself."""

    def __init__(self, loop: Loop, longest: Callable[[], float]) -> None:
        self.loop, self.longest = loop, longest
        self.start: list[Tensor] = []

    def before(self) -> None:
        self.longest_step = self.longest()
        if self.loop.workload.kind != "sgd":
            self.start = [p.detach().clone() for p in self.loop.parameters]
            return
        length = self.loop.steady_rate * float(get_total_norm(self.loop.gradients))
        if length > self.longest_step:
            self.clipped += 1
            torch._foreach_mul_(self.loop.gradients, self.longest_step / length)

    def after(self) -> None:
        if not self.start:
            return
        parameters = [p.detach() for p in self.loop.parameters]
        length = float(get_total_norm([p - x for p, x in zip(parameters, self.start, strict=True)]))
        if length > self.longest_step:
            self.clipped += 1
            torch._foreach_lerp_(parameters, self.start, 1 - self.longest_step / length)


def relative_cap(loop: Loop, share: float) -> StepCap:
    """Returns a cap at a share of the current length of the parameters, which needs no measurement."""
    return StepCap(loop, lambda: share * float(get_total_norm(loop.parameters)))
