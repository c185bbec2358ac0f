"""A learning rate for every step instead of a threshold; it stays safe if L1 is close to zero."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from smoothdiag.clipping.law import EVERYWHERE, LawRate, PowerLaw, Rate
from smoothdiag.clipping.trust import check, distrust, one_direction, only_range_is_short, power_of
from smoothdiag.fits.base import Interval, SmoothnessFit, Verdict


@dataclass(frozen=True)
class StepRate(Rate):
    """The largest learning rate for a step, kappa / (L0 + L1 ||g||), or the factor on the gradient that replaces it.

    Call it with a gradient norm [f/x], or an array or tensor of norms. It returns the rate [x^2/f] as the same kind of
    object and never waits for a device.

    Attributes:
        L0: Smoothness at small gradients.
        L1: Growth of smoothness with the gradient norm.
        kappa: Bound on effective rate times smoothness.
        reason: Where the rate comes from, in words.
        valid: Smallest and largest gradient norm that the rate is for. Outside of them a number raises a ValueError,
            and arrays and tensors hold NaN.

    Units: L0 [f/x^2], L1 [1/x], valid [f/x].

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
    valid: Interval = EVERYWHERE

    def formula(self, grad_norm: Any) -> Any:
        """Returns kappa / (L0 + L1 * grad_norm)."""
        return self.kappa / (self.L0 + self.L1 * grad_norm)


def step_rate(fit: SmoothnessFit, *, kappa: float = 1.0) -> StepRate | LawRate:
    """Learning rate as a function of the gradient norm, from a fit.

    As L1 falls to zero, a threshold from the same constants grows without bound, but this rate only approaches the
    constant kappa / L0. So a fit whose verdict is CONSTANT is good enough here.

    1. If the verdict is POWER, the rate is the `LawRate` of the fitted power. Below the smallest recorded gradient norm
       it stays at the rate of that norm.
    2. If the verdict is NOT_IDENTIFIED for no other reason than a short range of gradient norms, the rate is kappa over
       the largest recorded smoothness. It is for gradient norms between the 2% and 98% quantiles of the recorded ones,
       and refuses others (`StepRate.valid`). Whatever the law is, smoothness was below that constant inside this range.

    Args:
        fit: from `fit_smoothness`.
        kappa: bound on effective rate times smoothness, in (0, 2]. Up to 1.25 the loss falls at every full step, if the
            law holds; that it falls up to 2 is measured on the landscapes of `sd.problems`, not proved. With a power,
            the factor on the rate of `LawRate`, for which it is proved up to 1.

    Returns:
        StepRate or LawRate: a function of the gradient norm, for descent without momentum; with momentum use its
        `scale`.

    Raises:
        ValueError: if the fit establishes no constants, or a parameter is out of range.

    Source: for a line, the bound on the next loss of Vankov et al., 2024, which promises descent while
        e^kappa < 1 + 2 kappa; for a power, Tyurin, 2025. Both are derived on docs/rates.md.

    Examples:
        >>> import pandas as pd
        >>> norms = 10 ** torch.arange(200.0).sin().double().numpy()
        >>> table = pd.DataFrame({"grad_norm": norms, "smoothness": 1 + 2 * norms, "saturation": 0.1})
        >>> rate = sd.step_rate(sd.fit_smoothness(table, num_boot=50))
        >>> print(round(rate(0.0), 2), round(rate(4.5), 2))
        1.0 0.1
    """
    check(fit, kappa)
    short = only_range_is_short(fit)
    allowed = (Verdict.L0L1, Verdict.CONSTANT, Verdict.POWER, *((Verdict.NOT_IDENTIFIED,) if short else ()))
    if doubt := distrust(fit, allowed):
        raise ValueError(f"Parameter `fit` should have constants that a rate can rest on. Found that {doubt}.")
    if fit.verdict is Verdict.POWER:
        return _from_power(fit, kappa)
    if short:
        return _in_range(fit, kappa)
    L0, note = fit.L0, ""
    if fit.L0_interval[0] <= 0:
        L0, note = fit.L0_interval[1], " The interval of L0 reaches zero, so its upper end stands in for L0."
    if not 0 < L0 < math.inf:
        raise ValueError(f"Parameter `fit` should have an L0 above zero. Found the interval {fit.L0_interval}.")
    reason = f"For a gradient g the rate is {kappa:g} / (L0 + L1 ||g||), with L0 {L0:.4g} and L1 {fit.L1:.4g}.{note}"
    return StepRate(L0, fit.L1, kappa, reason + one_direction(fit))


def _from_power(fit: SmoothnessFit, kappa: float) -> LawRate:
    power, (low, high) = power_of(fit), (fit.grad_norm_quantiles[0], fit.grad_norm_quantiles[-1])
    law = PowerLaw(power.intercept, power.coefficient, power.exponent)
    reason = (
        f"For a gradient g the rate is {kappa:g} times the mean of 1/l from ||g|| to 2 ||g||, with the law l(norm) = "
        f"{power.intercept:.4g} + {power.coefficient:.4g} norm^{power.exponent:.2f}. The rows reach from {low:.4g} to "
        f"{high:.4g}: below, the rate stays at that of {low:.4g}; above, the law is extrapolated."
    )
    return LawRate(law, kappa, reason + one_direction(fit), low=low)


def _in_range(fit: SmoothnessFit, kappa: float) -> StepRate:
    largest = float(fit.frontier([0.0])["L0"].iloc[0])
    low, high = fit.grad_norm_quantiles[2], fit.grad_norm_quantiles[98]
    reason = (
        f"The rate is {kappa:g} over the largest recorded smoothness, {largest:.4g}, for gradient norms from {low:.4g} "
        f"to {high:.4g}. The law is not identified, because gradient norms cover too short a range; within that range "
        "a constant bounds smoothness whatever the law is. Outside of it the rate is refused."
    )
    return StepRate(largest, 0.0, kappa, reason + one_direction(fit), valid=(low, high))
