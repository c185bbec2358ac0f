"""Gradient descent whose rate follows from the gradient norm: clipped, normalized, and smoothed steps.

A rule maps the norm of the gradient to a rate. The rules of this file are frozen dataclasses; give them fitted
constants, as in ``GradientDescent(params, LogSmoothed(fit.L0, fit.L1))``.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from smoothdiag.optim.arithmetic import global_norm, scalar, subtract_scaled_
from smoothdiag.optim.base import COMMON, NON_NEGATIVE, Bucket, Group, Option, StepOptimizer, check_option

StepSize = Callable[[Tensor], Tensor]
"""Maps a 0-dim gradient norm to a 0-dim rate, without waiting for the device."""

_POSITIVE = Option(lambda v: 0 < v < math.inf, "finite and positive")
_CAP = Option(lambda v: v > 0, "positive")


@dataclass(frozen=True)
class Clipped:
    """The rate min(lr, lr threshold/||g||): clipped gradient descent.

    On an (L0, L1)-smooth function the loss never rises if lr (L0 + threshold L1) <= 1.

    Attributes:
        lr: eta, the rate while the gradient is small.
        threshold: Norm from which no step is longer than lr * threshold; ``inf`` never clips.

    Units: lr [x^2/f], threshold [f/x].

    Source: Zhang, He, Sra, Jadbabaie 2020 (ICLR), Theorem 3; Pethick et al. 2025 (NeurIPS), Theorem 4.3.
    """

    lr: float
    threshold: float

    def __post_init__(self) -> None:
        check_option("lr", self.lr, NON_NEGATIVE)
        check_option("threshold", self.threshold, _CAP)

    def __call__(self, norm: Tensor) -> Tensor:
        """Returns the rate at a gradient of this norm; 0-dim."""
        if math.isinf(self.threshold):
            return torch.full_like(norm, self.lr)
        return self.lr * (self.threshold / norm).clamp(max=1.0)


@dataclass(frozen=True)
class Normalized:
    """The rate lr/(||g|| + beta): normalized gradient descent.

    No step is longer than ``lr``, and the rate of a small gradient is lr/beta. The rate lies between half the rate of
    ``Clipped(lr / beta, beta)`` and that whole rate, so a promise that holds for every smaller rate holds here too.

    Attributes:
        lr: eta, the longest step.
        beta: Norm at which the step has half the longest length.

    Units: lr [x], beta [f/x].

    Source: Zhang, He, Sra, Jadbabaie 2020 (ICLR), "Why gradient clipping accelerates training", normalized GD.
    """

    lr: float
    beta: float

    def __post_init__(self) -> None:
        check_option("lr", self.lr, NON_NEGATIVE)
        check_option("beta", self.beta, _POSITIVE)

    def __call__(self, norm: Tensor) -> Tensor:
        """Returns the rate at a gradient of this norm; 0-dim."""
        return self.lr / (norm + self.beta)


@dataclass(frozen=True)
class _WithConstants:
    """Constants of smoothness: ||H|| <= L0 + L1 ||g||."""

    L0: float
    L1: float

    def __post_init__(self) -> None:
        check_option("L0", self.L0, NON_NEGATIVE)
        check_option("L1", self.L1, NON_NEGATIVE)
        if self.L0 == 0 == self.L1:
            raise ValueError("Parameter `L0` should be positive if `L1` is zero. Found `L0 = 0`.")


@dataclass(frozen=True)
class Smoothed(_WithConstants):
    """The rate 1/(L0 + 1.5 L1 ||g||).

    On an (L0, L1)-smooth function every step lowers the loss by at least half of rate * ||g||^2. No step is longer than
    2/(3 L1).

    Attributes:
        L0: Smoothness at a zero gradient. If it is 0, the rate at a zero gradient is infinite.
        L1: Growth of the smoothness with the gradient norm; 0 gives the constant rate 1/L0.

    Units: L0 [f/x^2], L1 [1/x], the rate [x^2/f].

    Source: Vankov, Rodomanov, Nedich, Sankar, Stich 2024, "Optimizing (L0, L1)-smooth functions by gradient methods".
    """

    def __call__(self, norm: Tensor) -> Tensor:
        """Returns the rate at a gradient of this norm; 0-dim."""
        return 1.0 / (self.L0 + 1.5 * self.L1 * norm)


@dataclass(frozen=True)
class LogSmoothed(_WithConstants):
    """The rate ln(1 + L1 ||g||/(L0 + L1 ||g||))/(L1 ||g||).

    This rate minimizes the bound on the next loss that follows from L0, L1 and ||g||.

    On an (L0, L1)-smooth function every step lowers the loss by at least a/L1^2 ((1 + u) ln(1 + u) - u), where
    a = L0 + L1 ||g|| and u = L1 ||g||/a. No step is longer than ln 2/L1.

    Attributes:
        L0: Smoothness at a zero gradient. If it is 0, the rate at a zero gradient is infinite.
        L1: Growth of the smoothness with the gradient norm; 0 gives the constant rate 1/L0.

    Units: L0 [f/x^2], L1 [1/x], the rate [x^2/f].

    Source: Vankov, Rodomanov, Nedich, Sankar, Stich 2024, "Optimizing (L0, L1)-smooth functions by gradient methods";
    the same rule is in Tyurin 2024, "Toward a unified theory of gradient descent under generalized smoothness".
    """

    def __call__(self, norm: Tensor) -> Tensor:
        """Returns the rate at a gradient of this norm; 0-dim."""
        growth = self.L1 * norm
        curvature = self.L0 + growth
        u = growth / curvature
        # ln(1 + u)/u has the limit 1 at u = 0, which 0/0 would not give; log1p keeps the digits of small u.
        return torch.where(growth == 0, 1.0, torch.log1p(u) / u) / curvature


class GradientDescent(StepOptimizer):
    """Gradient descent with a rate that a rule computes from the norm of the whole gradient: x -= lr * rule(||g||) g.

    Things to know:
        * The promises of the rules are about gradients of the whole loss, not of a minibatch.
        * One norm covers all groups. A parameter without a gradient does not move and does not count.
        * A learning-rate schedule changes ``lr``, a factor on the rate. The longest step shrinks with it; the gradient
          norm at which the rule begins to limit the step stays.
        * ``state_dict`` does not hold the rule: resume with the same rule.
        * ``.grad`` is only read. A zero gradient gives a zero step with every rule. A gradient with an inf or a NaN is
          not filtered.

    Args:
        params: Parameters, named parameters or groups of them.
        step_size: Rule: `Clipped`, `Normalized`, `Smoothed`, `LogSmoothed`, or a function of a 0-dim norm.
        lr: Factor kappa on the rate, without unit, a number or a 0-dim tensor. The promises hold for 1. The constants
            of a fit are estimates, so a smaller factor may be safer.
        maximize: Whether to ascend instead of descending.
        foreach: Whether to use operations on lists of tensors. None: wherever that is faster, at present everywhere.
        capturable: Promises that a CUDA graph may capture the step, see `ClippedMomentum`.

    Raises:
        ValueError: If an option is out of its range, now or at a later step.
        RuntimeError: If a step meets a gradient that is sparse or complex, or whose dtype or mesh differs from the
            parameter's.

    Source: see the rule.

    Examples:
        With L0 = 1, L1 = 2 and the gradient norm 3 the rate is 1 / (1 + 1.5 * 2 * 3) = 0.1:

        >>> weight = nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = sd.GradientDescent([weight], sd.optim.Smoothed(L0=1.0, L1=2.0))
        >>> weight.grad = torch.tensor([3.0])
        >>> optimizer.step()
        >>> print(weight.data)
        tensor([0.7000])
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = COMMON

    def __init__(
        self,
        params: ParamsT,
        step_size: StepSize,
        *,
        lr: float | Tensor = 1.0,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
    ) -> None:
        if isinstance(step_size, type) or not callable(step_size):
            raise ValueError(
                "Parameter `step_size` should be a rule, such as `Smoothed(L0, L1)` with its constants, or a function. "
                f"Found `step_size = {step_size!r}`."
            )
        self.step_size = step_size
        super().__init__(params, {"lr": lr, "maximize": maximize, "foreach": foreach, "capturable": capturable})

    def __getstate__(self) -> dict[str, Any]:
        """Returns the content of pickles and copies: the rule beside the usual state of an optimizer."""
        return {**super().__getstate__(), "step_size": self.step_size}

    def _kept(self, group: Group) -> Sequence[str]:
        return ()

    def _update(self, buckets: list[Bucket]) -> None:
        norm = global_norm([(b.grads, b.owners) for b in buckets], foreach=all(b.foreach for b in buckets))
        # If L0 is 0, the rate at a zero gradient is infinite, and infinity times zero is not a number.
        rate = torch.where(norm == 0, 0.0, self.step_size(norm))
        for b in buckets:
            factor = scalar(-1.0 * b.group["lr"] if b.group["maximize"] else b.group["lr"], norm)
            subtract_scaled_(b.params, b.grads, factor * rate, foreach=b.foreach)
