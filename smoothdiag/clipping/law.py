"""Step rules from any law that bounds smoothness by a function of the gradient norm that never falls."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from smoothdiag import arguments
from smoothdiag.clipping.trust import check_kappa, check_momentum
from smoothdiag.fits.base import Interval
from smoothdiag.momentum import gain as gain_of
from smoothdiag.notebooks import as_html

EVERYWHERE: Interval = (0.0, math.inf)
# For L0 + L ||g||^rho with rho from .25 to 3 ten nodes are exact to 1e-12 (tests/clipping/test_law.py).
_NODES, _WEIGHTS = ((1 + np.polynomial.legendre.leggauss(10)[0]) / 2, np.polynomial.legendre.leggauss(10)[1] / 2)
_BISECTIONS = 64  # They narrow a bracket of 1400 in logarithms down to rounding.


class Rate:
    """A learning rate for every step, as a function of the gradient norm, inside the norms for which it is valid.

    Attributes:
        valid: smallest and largest gradient norm that the rate is for.
    """

    valid: Interval

    def formula(self, grad_norm: Any) -> Any:
        """Returns the rate at a gradient norm, by elementwise arithmetic."""
        raise NotImplementedError

    def __call__(self, grad_norm: Any) -> Any:
        """Returns the learning rate for a plain step whose gradient has this norm.

        Outside of `valid` a number raises a ValueError. In an array or a tensor the rate there is NaN: an error would
        have to wait for the device.
        """
        if isinstance(grad_norm, Real) and float(grad_norm) < 0:
            raise arguments.wrong("grad_norm", "a norm, which is at least 0", grad_norm)
        if self.valid == EVERYWHERE:
            return self.formula(grad_norm)
        low, high = self.valid
        if isinstance(grad_norm, Real):
            if not low <= float(grad_norm) <= high:
                raise ValueError(
                    f"Parameter `grad_norm` should be in [{low:.4g}, {high:.4g}], the gradient norms whose smoothness "
                    f"was measured. Found `grad_norm = {float(grad_norm):.6g}`."
                )
            return self.formula(grad_norm)
        inside = (grad_norm >= low) & (grad_norm <= high)
        return _masked(self.formula(grad_norm), ~inside)

    def __str__(self) -> str:
        reason: str = getattr(self, "reason", "")
        low, high = self.valid
        span = "any gradient norm" if self.valid == EVERYWHERE else f"gradient norms from {low:.4g} to {high:.4g}"
        return (
            f"{type(self).__name__}: a learning rate for {span}.\nNEXT: set lr = rate(grad_norm) before each step or, "
            f"with momentum, scale gradients by rate.scale(grad_norm, lr).\n{reason}"
        )

    def _repr_html_(self) -> str:
        return as_html(str(self))

    def scale(self, grad_norm: Any, lr: float, *, momentum: float = 0.0, dampening: float = 0.0) -> Any:
        """Returns the factor, 1 at most, for the gradient of an optimizer with a fixed rate and momentum.

        1. Momentum keeps gradients for later steps. If the rate rose while gradients become small, it would prolong the
           old, large gradients, and the run would diverge. A factor on each gradient does not do that (measured, not
           proved).

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


@dataclass(frozen=True)
class PowerLaw:
    """The law smoothness <= intercept + coefficient * grad_norm ** exponent.

    Units: intercept [f/x^2], coefficient [f/x^2 (x/f)^exponent].
    """

    intercept: float
    coefficient: float
    exponent: float

    def __call__(self, grad_norm: Any) -> Any:
        """Returns the smoothness; infinite where it is beyond the largest float."""
        try:
            with np.errstate(over="ignore"):
                return self.intercept + self.coefficient * grad_norm**self.exponent
        except OverflowError:  # Python's own floats raise where those of numpy and torch become infinite.
            return math.inf


@dataclass(frozen=True)
class LawRate(Rate):
    """The largest learning rate by a law: kappa times the integral over v in [0, 1] of dv / law(||g|| (1 + v)).

    If ||H(x)|| <= law(||g(x)||) and the law never falls, a step of descent along the full gradient at this rate, with
    kappa 1 at most, lowers the loss by at least rate * ||g||^2 / 2. With kappa 1 the rate makes the upper bound on the
    next loss as small as possible. A fit whose verdict is POWER gives such a rate (`step_rate`).

    1. The integral is a sum over ten points of Gauss and Legendre. For a constant plus a power from .25 to 3 it is
       exact to 1e-12. At a kink of the law it can be off by some tenths of a percent.

    Attributes:
        law: smoothness [f/x^2] as a function of the gradient norm [f/x]; it must take numbers, arrays and tensors if
            the rate is to take them, be positive, and never fall.
        kappa: factor on the rate. What is proved holds up to 1.
        reason: where the rate comes from, in words.
        low: gradients with a smaller norm get the rate of this norm, which is smaller than their own.
        valid: smallest and largest gradient norm that the rate is for.

    Source: Tyurin, Toward a unified theory of gradient descent under generalized smoothness, ICML 2025
        (arXiv 2412.11773); the proof is on docs/rates.md.

    Examples:
        >>> rate = sd.LawRate(lambda norm: 3 + norm**0.5)
        >>> print(f"{rate(0.0):.4f} {rate(4.0):.4f}")  # smoothness is 3, and between 5 and 5.83
        0.3333 0.1842
    """

    law: Callable[[Any], Any]
    kappa: float = 1.0
    reason: str = "a law given by hand"
    low: float = 0.0
    valid: Interval = EVERYWHERE

    def __post_init__(self) -> None:
        """Refuses a law that is no function, and a kappa out of range."""
        arguments.called("law", self.law, "a function of the gradient norm")
        check_kappa(self.kappa)
        arguments.number("low", self.low, "at least 0 and finite", lambda v: 0 <= v < math.inf)

    def formula(self, grad_norm: Any) -> Any:
        """Returns kappa times the sum over the nodes."""
        if self.low > 0:
            held = isinstance(grad_norm, Real)
            grad_norm = max(grad_norm, self.low) if held else grad_norm.clip(min=self.low)
        total = 0.0
        for node, weight in zip(_NODES.tolist(), _WEIGHTS.tolist(), strict=True):
            total = total + weight * _inverse(self.law(grad_norm * (1 + node)))
        return self.kappa * total

    def threshold(self, eta: float) -> float:
        """Returns the largest gradient norm at which the rate is at least `eta`; 0 if there is none."""
        if not self.formula(np.float64(self.low)) >= eta:
            return 0.0
        low, high = -700.0, 700.0  # logarithms of nearly the smallest and the largest float
        if self.formula(np.float64(math.exp(high))) >= eta:
            return math.inf
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.formula(np.float64(math.exp(middle))) >= eta else (low, middle)
        return math.exp(low)


@dataclass(frozen=True)
class Choice:
    """A threshold before the noise can raise it: effective rate, threshold, reason, consequence, what to do instead.

    `better` is the effective rate to use instead, if this one is too large; else NaN.
    """

    eta: float
    threshold: float
    origin: str
    consequence: str = ""
    next: str = ""
    better: float = math.nan


def choose(rate: LawRate, eta: float, gain: float) -> Choice | None:
    """The threshold for an effective rate by a law, or both if `eta` is NaN; None if the law has no largest rate then.

    At the threshold c the rate of the law is eta. If law(norm) / norm never rises, a gradient beyond c may take a step
    of at least eta c, so with kappa 1 at most every clipped step lowers the loss, too. As the rate nears the largest
    one the threshold would shorten the steps to nothing. So above half of it the longest step stays as it is there.
    """
    largest = float(rate.formula(np.float64(0.0)))
    half = largest / 2
    if math.isnan(eta):
        if not 0 < half < math.inf:
            return None
        return Choice(half, rate.threshold(half), f"No learning rate was given, so the rule chose half of the largest "
                      f"rate that the law allows, {largest:.4g}.")  # fmt: skip
    if eta <= half:
        threshold = rate.threshold(eta)
        return Choice(eta, threshold, f"At the gradient norm {threshold:.4g} the law allows a rate of {eta:.4g}.")
    longest = half * rate.threshold(half)
    advice = f"Use an effective rate of at most {half:.4g}, a learning rate of {half / gain:.4g}."
    if eta >= largest:
        problem = f"No threshold makes this rate safe: the law allows at most {largest:.4g}. "
    else:
        problem = f"The effective rate {eta:.4g} is too large: the law would leave only uselessly short steps. "
    lower = f"lower the learning rate to {half / gain:.4g}: this one is too large for any threshold."
    return Choice(eta, longest / eta, problem + advice, f" The longest step is held at {longest:.4g}.", lower, half)


def _inverse(smoothness: Any) -> Any:
    """One over the smoothness; infinite where it is zero."""
    if isinstance(smoothness, Real) and not isinstance(smoothness, np.generic):
        return 1 / smoothness if smoothness else math.inf
    with np.errstate(divide="ignore"):
        return 1 / smoothness


def _masked(values: Any, outside: Any) -> Any:
    """The values, NaN where they are not valid."""
    if hasattr(values, "masked_fill"):  # a tensor of torch, which this package must not import
        return values.masked_fill(outside, math.nan)
    return np.where(outside, math.nan, values)
