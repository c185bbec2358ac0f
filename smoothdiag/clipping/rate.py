"""A learning rate for every step instead of a threshold; it stays safe if L1 is close to zero."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from smoothdiag import arguments
from smoothdiag.clipping.trust import check, check_momentum, distrust
from smoothdiag.fits.base import SmoothnessFit
from smoothdiag.momentum import gain as gain_of


@dataclass(frozen=True)
class StepRate:
    """The largest learning rate for a step, kappa / (L0 + L1 ||g||), or the factor on the gradient that replaces it.

    Call it with a gradient norm [f/x], or an array or tensor of norms. It returns the rate [x^2/f] as the same kind of
    object and never waits for a device.

    Attributes:
        L0: Smoothness at small gradients.
        L1: Growth of smoothness with the gradient norm.
        kappa: Bound on effective rate times smoothness.
        reason: Where the rate comes from, in words.

    Units: L0 [f/x^2], L1 [1/x].

    Examples:
        >>> rate = sd.StepRate(L0=1.0, L1=2.0, kappa=1.0, reason="constants from a paper")
        >>> print(rate(0.0), rate(4.5))  # the larger the gradient, the smaller the rate
        1.0 0.1
        >>> print(rate.scale(4.5, lr=0.2))  # factor on the gradient if the learning rate stays at 0.2
        0.5
    """

    L0: float
    L1: float
    kappa: float
    reason: str

    def __call__(self, grad_norm: Any) -> Any:
        """Returns the learning rate for a plain step whose gradient has this norm."""
        return self.kappa / (self.L0 + self.L1 * grad_norm)

    def scale(self, grad_norm: Any, lr: float, *, momentum: float = 0.0, dampening: float = 0.0) -> Any:
        """Returns the factor, 1 at most, for the gradient of an optimizer with a fixed rate and momentum.

        1. Momentum keeps gradients for later steps. If the rate rose while gradients become small, it would prolong the
           old, large gradients, and the run would diverge. A factor on each gradient does not do that.

        Args:
            grad_norm: norm of the gradient [f/x].
            lr: the optimizer's learning rate [x^2/f].
            momentum: the optimizer's heavy-ball momentum in [0, 1).
            dampening: the optimizer's dampening in [0, 1).
        """
        arguments.number("lr", lr, "positive and finite", lambda v: 0 < v < math.inf)
        check_momentum(momentum, dampening)
        factor = self(grad_norm) / (lr * gain_of(momentum, dampening))
        return factor.clip(max=1.0) if hasattr(factor, "clip") else min(factor, 1.0)


def step_rate(fit: SmoothnessFit, *, kappa: float = 1.0) -> StepRate:
    """Learning rate as a function of the gradient norm, from a fit.

    As L1 falls to zero, a threshold from the same constants grows without bound, but this rate only approaches the
    constant kappa / L0. So a fit whose verdict is CONSTANT is good enough here.

    Args:
        fit: from `fit_smoothness`.
        kappa: bound on effective rate times smoothness, in (0, 2]. The theorem has 1; up to 2 the loss still falls.

    Returns:
        StepRate: a function of the gradient norm, for descent without momentum; with momentum use its `scale`.

    Raises:
        ValueError: if the fit establishes no constants, or a parameter is out of range.

    Source: the bound rate * (L0 + L1 ||g||) <= kappa at every single step, as in Vankov et al., 2024, whose smoothed
        descent takes 1 / (L0 + 1.5 L1 ||g||).

    Examples:
        >>> import pandas as pd
        >>> norms = 10 ** torch.arange(200.0).sin().double().numpy()
        >>> table = pd.DataFrame({"grad_norm": norms, "smoothness": 1 + 2 * norms, "saturation": 0.1})
        >>> rate = sd.step_rate(sd.fit_smoothness(table, num_boot=50))
        >>> print(round(rate(0.0), 2), round(rate(4.5), 2))
        1.0 0.1
    """
    check(fit, kappa)
    if doubt := distrust(fit):
        raise ValueError(f"Parameter `fit` should have constants that a rate can rest on. Found that {doubt}.")
    L0, note = fit.L0, ""
    if fit.L0_interval[0] <= 0:
        L0, note = fit.L0_interval[1], " The interval of L0 reaches zero, so its upper end stands in for L0."
    if not 0 < L0 < math.inf:
        raise ValueError(f"Parameter `fit` should have an L0 above zero. Found the interval {fit.L0_interval}.")
    reason = f"For a gradient g the rate is {kappa:g} / (L0 + L1 ||g||), with L0 {L0:.4g} and L1 {fit.L1:.4g}.{note}"
    return StepRate(L0, fit.L1, kappa, reason)
