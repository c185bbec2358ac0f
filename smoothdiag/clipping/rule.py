"""From fitted constants to a clipping threshold with a reason; every cited formula lives here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from smoothdiag import arguments
from smoothdiag.clipping.trust import check, check_momentum, distrust, doubt_about, may_follow_gradients, over, unsafe
from smoothdiag.fits.base import Array, Interval, SmoothnessFit
from smoothdiag.fits.intervals import percentile_interval
from smoothdiag.momentum import averaged
from smoothdiag.momentum import gain as gain_of

# A percentile has no theory behind it. This one leaves typical steps alone and still stops the outliers.
FALLBACK_PERCENTILE = 90
# Zhang et al., 2020, stochastic case: the threshold on minibatch gradients is 5 sigma.
NOISE_MULTIPLE = 5.0
NEARLY_NORMALISED = 0.9


@dataclass(frozen=True)
class ClipRule:
    """A threshold on the gradient norm, what it guarantees and why it was chosen.

    Attributes:
        threshold: clip gradients whose norm is larger.
        step_cap: longest step that results, effective rate times threshold; NaN where no rate is known, and under Adam
            and its like.
        max_lr: largest learning rate, in the optimizer's own convention, that a small gradient allows; NaN where the
            fit cannot say, also because the interval of L0 reaches zero.
        clip_rate: share of the recorded gradient norms above the threshold; NaN where the optimizer clips an average
            of gradients, whose norms were not recorded.
        reason: why, in words.
        lr: the optimizer's learning rate the rule is meant for: the given one, or the one the rule chose; NaN where
            neither exists.
        source: "fit", or "percentile" where the fit could not be used.
        threshold_interval: the same for resampled rows at this rate, at the level of the fit; NaN for a percentile.

    Units: threshold [f/x], step_cap [x], rates [x^2/f].
    """

    threshold: float
    step_cap: float
    max_lr: float
    clip_rate: float
    reason: str
    lr: float
    source: Literal["fit", "percentile"]
    threshold_interval: Interval = (math.nan, math.nan)

    def __str__(self) -> str:
        share = "an unknown share" if math.isnan(self.clip_rate) else f"{self.clip_rate:.1%}"
        if self.source == "fit":
            head = f"clip gradients at norm {self.threshold:.4g} (from the fit; clips {share} of the recorded steps)"
        else:
            head = (
                "no threshold from this fit; in its place, from a percentile of the gradient norms, "
                f"{self.threshold:.4g} (clips {share} of the recorded steps)"
            )
        return (
            f"{head}\n  learning rate {_say(self.lr)}, at most {_say(self.max_lr)} for small gradients; "
            f"longest step {_say(self.step_cap)}\n  {self.reason}"
        )


@dataclass(frozen=True)
class _Choice:
    """A threshold before the noise has its say: effective rate, threshold, where both come from, what follows."""

    eta: float
    threshold: float
    origin: str
    consequence: str = ""


def clip_rule(
    fit: SmoothnessFit,
    *,
    lr: float | None = None,
    momentum: float = 0.0,
    dampening: float = 0.0,
    kappa: float = 1.0,
    noise: float | None = None,
) -> ClipRule:
    """Threshold on the gradient norm that keeps (effective rate) * (L0 + L1 * norm) at or below `kappa`.

    Where the fit does not establish L1 > 0, nothing is derived from it: the threshold is then a percentile of the
    recorded gradient norms, and the reason says so.

    1. Above a rate of kappa/(2 L0) the theorem's threshold would shorten the steps to nothing at kappa/L0, beyond
       which no threshold is safe. From there on the longest step stays at kappa/(2 L1) instead, so the threshold
       falls with the rate and never jumps; the reason then names the rate to use.

    Args:
        fit: from `fit_smoothness`.
        lr: the optimizer's learning rate; None lets the rule choose kappa / (2 L0).
        momentum: heavy-ball momentum in [0, 1) of the optimizer.
        dampening: its dampening in [0, 1); above zero the optimizer averages gradients, and what it clips is taken to
            be the average. Without momentum it has no effect, as in torch.
        kappa: safety in (0, 2]: 1 is the theorem, the loss still falls up to 2.
        noise: standard deviation of the norm of minibatch gradients around the full one.

    Returns:
        ClipRule: with `source` "fit" or "percentile".

    Raises:
        ValueError: for parameters out of range, and where `fit` is not a fit.

    Units: lr [x^2/f], noise [f/x].

    Source: Pethick et al., 2025, Theorem 4.3: rate <= 1 / (L0 + threshold * L1), solved for the threshold; for the
        noise Zhang et al., 2020.
    """
    check(fit, kappa)
    check_momentum(momentum, dampening)
    if lr is not None:
        arguments.number("lr", lr, "positive and finite", lambda v: 0 < v < math.inf)
    if noise is not None:
        arguments.number("noise", noise, "at least 0 and finite", lambda v: 0 <= v < math.inf)
    averages = momentum > 0 and dampening > 0
    gain = gain_of(momentum, dampening)
    eta = math.nan if lr is None else lr * gain
    doubt = doubt_about(fit, eta, kappa)
    chosen = None if doubt else _from_fit(fit, eta, kappa, gain)
    if chosen is None:
        doubt = doubt or "the fit puts L0 at zero with no upper end to its interval, so it implies no learning rate"
    choice = chosen or _percentile(fit, eta, doubt, momentum if averages else 0.0)
    threshold, reason = choice.threshold, f"{choice.origin}{choice.consequence}"
    if noise is not None and threshold < NOISE_MULTIPLE * noise:
        threshold = NOISE_MULTIPLE * noise
        reason = (
            f"The threshold is {NOISE_MULTIPLE:g} times the noise {noise:.4g}, because one inside the noise biases "
            f"every step; without the noise it would be {choice.threshold:.4g}. {choice.origin}"
            f"{_after_raise(fit, choice.eta, threshold, kappa) if chosen else ''}"
        )
    clip_rate = math.nan if averages else _share_above(fit, threshold)
    if averages:
        reason += (
            " The optimizer averages gradients and clips the average, whose norm is below those recorded: how often "
            "it will clip is unknown."
        )
    if clip_rate > NEARLY_NORMALISED:
        reason += (
            f" It clips {clip_rate:.0%} of the recorded steps, which is close to normalised descent: the step length, "
            "not the rate, then sets the pace."
        )
    return ClipRule(
        threshold=threshold,
        step_cap=choice.eta * threshold if may_follow_gradients(fit) else math.nan,
        max_lr=kappa / fit.L0 / gain if not distrust(fit) and fit.L0_interval[0] > 0 else math.nan,
        clip_rate=clip_rate,
        reason=reason,
        lr=choice.eta / gain,
        source="fit" if chosen else "percentile",
        threshold_interval=_interval(fit, choice, kappa, threshold) if chosen else (math.nan, math.nan),
    )


def safe_threshold(L0: npt.ArrayLike, L1: npt.ArrayLike, eta: float, kappa: float = 1.0) -> Array:
    """Threshold that the rule derives from constants, or from many pairs of them, at the effective rate `eta`."""
    with np.errstate(divide="ignore"):  # Without a slope no gradient is too long.
        return np.asarray(np.maximum(kappa / eta - np.asarray(L0), kappa / (2 * eta)) / np.asarray(L1))


def _interval(fit: SmoothnessFit, choice: _Choice, kappa: float, threshold: float) -> Interval:
    if not fit.replicates:
        return math.nan, math.nan
    pairs = np.array(fit.replicates)  # Their inverse thresholds are finite, also where L1 is zero.
    inverse = 1 / safe_threshold(pairs[:, 0], pairs[:, 1], choice.eta, kappa)
    low, high = percentile_interval(inverse, over(1.0, choice.threshold), fit.interval_freedom)
    least = threshold if threshold > choice.threshold else 0.0  # What the noise raises, it raises at both ends.
    return max(over(1.0, high), least), max(over(1.0, low), least)


def _from_fit(fit: SmoothnessFit, eta: float, kappa: float, gain: float) -> _Choice | None:
    """The rule's choice; None where no rate was given and the fit implies none."""
    half_step = kappa / (2 * fit.L1)
    if math.isnan(eta):
        L0, note = fit.L0, ""
        if fit.L0_interval[0] <= 0:
            L0 = fit.L0_interval[1]
            note = " The interval of L0 reaches zero, so its upper end stands in for L0."
            if not 0 < L0 < math.inf:
                return None
        eta = kappa / (2 * L0)
        origin = "No rate was given: half of kappa limits the rate, kappa/(2 L0), and half the step, kappa/(2 L1)."
        return _Choice(eta, half_step / eta, origin + note)
    note = ""
    if fit.L0_interval[0] <= 0:
        note = (
            f" The fit puts L0 at {'zero' if fit.L0 == 0 else f'{fit.L0:.4g}'} and its interval reaches zero: the "
            "largest rate is undetermined, and this one is not tested."
        )
    recommended = over(kappa, 2 * fit.L0)
    advice = f"use an effective rate of kappa/(2 L0) = {recommended:.4g}, a learning rate of {recommended / gain:.4g}"
    if eta * fit.L0 >= kappa:
        origin = f"{unsafe(fit, eta, kappa)} {advice[0].upper()}{advice[1:]}.{note}"
        return _Choice(eta, half_step / eta, origin, f" The longest step is held at kappa/(2 L1) = {half_step:.4g}.")
    if 2 * eta * fit.L0 > kappa:
        origin = (
            f"The effective rate {eta:.4g} is too large for a bound of {kappa:g} on rate * (L0 + L1 * threshold) with "
            f"steps of useful length: {advice}.{note}"
        )
        consequence = (
            f" The longest step is held at kappa/(2 L1) = {half_step:.4g}, where the product is "
            f"{eta * fit.L0 + kappa / 2:.3g}."
        )
        return _Choice(eta, half_step / eta, origin, consequence)
    threshold = (kappa / eta - fit.L0) / fit.L1
    origin = f"Solving rate * (L0 + L1 * threshold) = {kappa:g} for the effective rate {eta:.4g} gives {threshold:.4g}."
    return _Choice(eta, threshold, origin + note)


def _percentile(fit: SmoothnessFit, eta: float, doubt: str, averaging: float) -> _Choice:
    threshold = fit.grad_norm_quantiles[FALLBACK_PERCENTILE]
    origin = (
        f"Do not clip from this fit, because {doubt}. The {FALLBACK_PERCENTILE}th percentile of the recorded gradient "
        f"norms is {threshold:.4g}; a percentile stops outliers and guarantees nothing."
    )
    if averaging > 0:
        # The standard deviation of an exponential average of uncorrelated terms of standard deviation one.
        shrink = averaged(averaging)
        threshold *= shrink
        origin += (
            f" It is multiplied by {shrink:.2g}, since an average of uncorrelated gradients with momentum "
            f"{averaging:g} is that much shorter."
        )
    return _Choice(eta, threshold, origin)


def _after_raise(fit: SmoothnessFit, eta: float, threshold: float, kappa: float) -> str:
    product = eta * (fit.L0 + fit.L1 * threshold)
    held = "above" if product > kappa else "within"
    return (
        f" With the raised threshold the longest step is {eta * threshold:.4g}, where rate * (L0 + L1 * norm) reaches "
        f"{product:.3g}, {held} the bound of {kappa:g}."
    )


def _share_above(fit: SmoothnessFit, threshold: float) -> float:
    quantiles = np.array(fit.grad_norm_quantiles)
    if threshold >= quantiles[-1]:
        return 0.0
    if threshold < quantiles[0]:
        return 1.0
    return float(1 - np.interp(threshold, quantiles, np.linspace(0, 1, len(quantiles))))


def _say(value: float) -> str:
    return "unknown" if math.isnan(value) else f"{value:.4g}"
