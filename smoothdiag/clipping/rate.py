"""A learning rate for every step instead of a threshold: what remains safe where the slope is next to nothing."""

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
    """The largest learning rate for a step, kappa / (L0 + L1 ||g||), and what to multiply gradients by instead.

    Called with a gradient norm [f/x], or an array or tensor of them, it returns the rate [x^2/f] of the same kind and
    waits for no device.

    Attributes:
        L0: Smoothness at small gradients.
        L1: Its growth with the gradient norm.
        kappa: Bound on effective rate times smoothness.
        reason: Where it comes from, in words.

    Units: L0 [f/x^2], L1 [1/x].
    """

    L0: float
    L1: float
    kappa: float
    reason: str

    def __call__(self, grad_norm: Any) -> Any:
        """Returns the rate for a plain step whose gradient has this norm."""
        return self.kappa / (self.L0 + self.L1 * grad_norm)

    def scale(self, grad_norm: Any, lr: float, *, momentum: float = 0.0, dampening: float = 0.0) -> Any:
        """Returns what to multiply the gradient by before an optimizer with a fixed rate and momentum, 1 at most.

        1. Momentum keeps gradients for later steps: a rate that rises as they become small would prolong the old, large
           ones, and diverge. A factor on each gradient does not.

        Args:
            grad_norm: its norm [f/x].
            lr: the optimizer's learning rate [x^2/f].
            momentum: its heavy-ball momentum in [0, 1).
            dampening: its dampening in [0, 1).
        """
        arguments.number("lr", lr, "positive and finite", lambda v: 0 < v < math.inf)
        check_momentum(momentum, dampening)
        factor = self(grad_norm) / (lr * gain_of(momentum, dampening))
        return factor.clip(max=1.0) if hasattr(factor, "clip") else min(factor, 1.0)


def step_rate(fit: SmoothnessFit, *, kappa: float = 1.0) -> StepRate:
    """Learning rate as a function of the gradient norm, from a fit.

    A threshold solved from the same constants grows without bound as L1 falls to zero; this only becomes the
    constant rate kappa / L0. So a fit that finds no growth is good enough here.

    Args:
        fit: from `fit_smoothness`.
        kappa: safety in (0, 2]: 1 is the theorem, the loss still falls up to 2.

    Returns:
        StepRate: a function of the gradient norm, for descent without momentum; with momentum use its `scale`.

    Raises:
        ValueError: where the fit establishes no constants, and for parameters out of range.

    Source: the bound rate * (L0 + L1 ||g||) <= kappa at every single step, as in Vankov et al., 2024, whose smoothed
        descent takes 1 / (L0 + 1.5 L1 ||g||).
    """
    check(fit, kappa)
    if doubt := distrust(fit):
        raise ValueError(f"Parameter `fit` should establish constants to make a rate of. Found that {doubt}.")
    L0, note = fit.L0, ""
    if fit.L0_interval[0] <= 0:
        L0, note = fit.L0_interval[1], " The interval of L0 reaches zero, so its upper end stands in for L0."
    if not 0 < L0 < math.inf:
        raise ValueError(f"Parameter `fit` should have an L0 above zero. Found the interval {fit.L0_interval}.")
    reason = f"The rate is {kappa:g} / (L0 + L1 ||g||) with L0 {L0:.4g} and L1 {fit.L1:.4g}.{note}"
    return StepRate(L0, fit.L1, kappa, reason)
