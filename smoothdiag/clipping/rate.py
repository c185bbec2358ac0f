"""A learning rate for every step instead of a threshold: what remains safe where the slope is next to nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from smoothdiag.clipping.trust import check, distrust, gain_of
from smoothdiag.fits.base import SmoothnessFit


@dataclass(frozen=True)
class StepRate:
    """The largest learning rate for a step, kappa / (gain (L0 + L1 ||g||)).

    Called with a gradient norm [f/x], or an array or tensor of them, it returns the rate [x^2/f] of the same kind and
    waits for no device. With a schedule use the smaller of both.

    Attributes:
        L0: Smoothness at small gradients.
        L1: Its growth with the gradient norm.
        kappa: Bound on effective rate times smoothness.
        gain: Learning rates in a step, per norm of a constant gradient.
        reason: Where it comes from, in words.

    Units: L0 [f/x^2], L1 [1/x].
    """

    L0: float
    L1: float
    kappa: float
    gain: float
    reason: str

    def __call__(self, grad_norm: Any) -> Any:
        """Returns the rate for a step whose gradient has this norm."""
        return self.kappa / (self.gain * (self.L0 + self.L1 * grad_norm))


def step_rate(fit: SmoothnessFit, *, momentum: float = 0.0, dampening: float = 0.0, kappa: float = 1.0) -> StepRate:
    """Learning rate as a function of the gradient norm, from a fit.

    A threshold solved from the same constants grows without bound as L1 falls to zero; this only becomes the
    constant rate kappa / L0. So a fit that finds no growth is good enough here.

    Args:
        fit: from `fit_smoothness`.
        momentum: heavy-ball momentum in [0, 1) of the optimizer.
        dampening: its dampening in [0, 1).
        kappa: safety in (0, 2]: 1 is the theorem, the loss still falls up to 2.

    Returns:
        StepRate: a function of the gradient norm.

    Raises:
        ValueError: where the fit establishes no constants, and for parameters out of range.

    Source: the bound rate * (L0 + L1 ||g||) <= kappa at every single step, as in Vankov et al., 2024, whose smoothed
        descent takes 1 / (L0 + 1.5 L1 ||g||).
    """
    check(fit, momentum, dampening, kappa)
    if doubt := distrust(fit):
        raise ValueError(f"Parameter `fit` should establish constants to make a rate of. Found that {doubt}.")
    L0, note = fit.L0, ""
    if fit.L0_interval[0] <= 0:
        L0, note = fit.L0_interval[1], " The interval of L0 reaches zero, so its upper end stands in for L0."
    if not 0 < L0 < math.inf:
        raise ValueError(f"Parameter `fit` should have an L0 above zero. Found the interval {fit.L0_interval}.")
    gain = gain_of(momentum, dampening)
    reason = f"The rate is {kappa:g} / ({gain:.3g} (L0 + L1 ||g||)) with L0 {L0:.4g} and L1 {fit.L1:.4g}.{note}"
    return StepRate(L0, fit.L1, kappa, gain, reason)
