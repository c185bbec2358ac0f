"""From a fit to a clipping threshold with a reason."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from smoothdiag import arguments
from smoothdiag.clipping.law import Choice, LawRate, PowerLaw, choose
from smoothdiag.clipping.result import ClipRule
from smoothdiag.clipping.trust import (
    check,
    distrust,
    doubt_about,
    momentum_for,
    note_on_scan,
    one_direction,
    over,
    power_of,
    unsafe,
    untold,
)
from smoothdiag.fits.base import Array, Interval, SmoothnessFit, Verdict
from smoothdiag.fits.decision import follows_gradients
from smoothdiag.fits.intervals import percentile_interval
from smoothdiag.fits.plan import make_plan
from smoothdiag.momentum import averaged
from smoothdiag.momentum import gain as gain_of
from smoothdiag.rows import SmoothdiagWarning

# A percentile has no theory behind it. This one leaves typical steps alone and still stops the outliers.
FALLBACK_PERCENTILE = 90
# Zhang et al., 2020, stochastic case: the threshold on minibatch gradients is 5 sigma.
NOISE_MULTIPLE = 5.0
NEARLY_NORMALISED = 0.9


def clip_rule(
    fit: SmoothnessFit,
    *,
    lr: float | None = None,
    momentum: float | None = None,
    dampening: float | None = None,
    kappa: float = 1.0,
    noise: float | None = None,
) -> ClipRule:
    """Threshold on the gradient norm that keeps (effective rate) * (L0 + L1 * norm) at or below `kappa`.

    If the fit does not establish L1 > 0, the threshold is a percentile of the recorded gradient norms, and the reason
    says so. A warning says so as well if the trace names an optimizer but not whether its steps follow the gradient, as
    traces of earlier versions do.

    1. As the rate rises from kappa/(2 L0) to kappa/L0, the theorem's threshold would shorten the steps to nothing, and
       beyond kappa/L0 no threshold is safe. So above kappa/(2 L0) the rule keeps the longest step at kappa/(2 L1)
       instead. The threshold then falls as the rate rises and never jumps, and the reason names the rate to use. That
       is a choice, and no theorem covers it.
    2. If the verdict is POWER with an exponent of 1 at most, the threshold is the gradient norm at which the rate of
       `LawRate` is the effective rate. A larger exponent leaves no step length that is safe at every norm.
    3. Rows along a direction, such as those of "local" and "path", bound the largest curvature from below. Unless
       Hessian norms beside them agree with the line, the reason says so; if they contradict it, the rule does not rest
       on the fit.
    4. A scan names no optimizer, so the rule takes it that yours steps by the rate times an average of gradients, which
       Adam does not. The gradient norms of a scan are those of its points and not of steps: a percentile of them, and
       `clip_rate`, say nothing about a run.

    Args:
        fit: from `fit_smoothness`.
        lr: the optimizer's learning rate; None lets the rule choose kappa / (2 L0).
        momentum: the optimizer's heavy-ball momentum in [0, 1); None takes the one that the trace names, or 0. The
            reason says which.
        dampening: the optimizer's dampening in [0, 1); None takes the one of the trace if `momentum` is None too, and
            else 0. Above zero the optimizer averages gradients, and the rule assumes that it clips the average. Without
            momentum dampening has no effect, as in torch.
        kappa: bound on effective rate times smoothness, in (0, 2]. The theorem has 1. The loss still falls up to 1.25
            by the bound on docs/rates.md, and up to 2 as measured on the landscapes of `sd.problems`, not proved.
        noise: standard deviation of the norm of minibatch gradients around the full gradient.

    Returns:
        ClipRule: with `source` "fit" or "percentile".

    Raises:
        ValueError: if a parameter is out of range, `fit` is not a fit, or it is a scan's without constants to use.

    Units: lr [x^2/f], noise [f/x].

    Source: Pethick et al., 2025, Theorem 4.3: rate <= 1 / (L0 + threshold * L1), solved for the threshold; for a power
        Tyurin, 2025; for the noise Zhang et al., 2020.

    Examples:
        >>> import pandas as pd
        >>> norms = 10 ** torch.arange(200.0).sin().double().numpy()
        >>> table = pd.DataFrame({"grad_norm": norms, "smoothness": 1 + 2 * norms, "saturation": 0.1})
        >>> print(sd.clip_rule(sd.fit_smoothness(table, num_boot=50), lr=0.1))
        clip gradients at norm 4.5; it clips 27.4% of the recorded steps.
        NEXT: set max_norm=4.5 at lr=0.1 (clip_grad_norm_, max_grad_norm, gradient_clip_val).
        At the effective rate 0.1 the product rate * (L0 + L1 * norm) reaches 1 at the gradient norm 4.5.
        learning rate 0.1, at most 1 for small gradients; longest step 0.45
    """
    check(fit, kappa)
    momentum, dampening, named = momentum_for(fit, momentum, dampening)
    if lr is not None:
        arguments.number("lr", lr, "positive and finite", lambda v: 0 < v < math.inf)
    if noise is not None:
        arguments.number("noise", noise, "at least 0 and finite", lambda v: 0 <= v < math.inf)
    averages = momentum > 0 and dampening > 0
    gain = gain_of(momentum, dampening)
    eta = math.nan if lr is None else lr * gain
    doubt = doubt_about(fit, eta, kappa)
    # Earlier versions knew some optimizers by name, and may have made a threshold of this fit.
    if doubt and fit.follows_gradients is None and not doubt_about(replace(fit, follows_gradients=True), eta, kappa):
        warnings.warn(untold(fit), SmoothdiagWarning, stacklevel=2)
    chosen = None if doubt else _from_fit(fit, eta, kappa, gain)
    if chosen is None:
        doubt = doubt or "by the fit smoothness may vanish with the gradient norm, so it implies no learning rate"
    choice = chosen or _percentile(fit, eta, doubt, momentum if averages else 0.0)
    threshold, reason = choice.threshold, f"{choice.origin}{choice.consequence}"
    if noise is not None and threshold < NOISE_MULTIPLE * noise:
        threshold = NOISE_MULTIPLE * noise
        reason = (
            f"The threshold is {NOISE_MULTIPLE:g} times the noise {noise:.4g}, because a threshold within the noise "
            f"biases every step. Without the noise it would be {choice.threshold:.4g}. {choice.origin}"
            f"{_after_raise(fit, choice.eta, threshold, kappa) if chosen else ''}"
        )
    clip_rate = math.nan if averages or fit.num_scans else _share_above(fit, threshold)
    reason += note_on_scan(fit, doubt)
    if averages:
        reason += (
            " The optimizer clips an average of gradients. An average is shorter than the recorded gradients, so it is "
            "unknown how often the optimizer will clip."
        )
    if clip_rate > NEARLY_NORMALISED:
        reason += (
            f" The threshold clips {clip_rate:.0%} of the recorded steps, which is close to normalised descent: nearly "
            "all steps have the same length, and this length sets the pace instead of the learning rate."
        )
    todo = choice.next or _paste(threshold, choice.eta / gain, momentum, averages=averages)
    reason += named if chosen else ""
    max_lr = _largest_rate(fit, kappa) / gain
    if chosen or not math.isnan(max_lr):
        reason += one_direction(fit)
    return ClipRule(
        threshold=threshold,
        step_cap=choice.eta * threshold if follows_gradients(fit) else math.nan,
        max_lr=max_lr,
        clip_rate=clip_rate,
        reason=reason,
        lr=choice.eta / gain,
        source="fit" if chosen else "percentile",
        threshold_interval=_interval(fit, choice, kappa, threshold) if chosen else (math.nan, math.nan),
        next=todo,
        momentum=momentum,
        dampening=dampening,
        better_lr=choice.better / gain if choice.better > 0 else math.nan,
    )


def safe_threshold(L0: npt.ArrayLike, L1: npt.ArrayLike, eta: float, kappa: float = 1.0) -> Array:
    """Threshold that the rule derives from constants, or from arrays of constants, at the effective rate `eta`."""
    with np.errstate(divide="ignore"):  # If L1 is zero, no gradient is too long.
        return np.asarray(np.maximum(kappa / eta - np.asarray(L0), kappa / (2 * eta)) / np.asarray(L1))


def _interval(fit: SmoothnessFit, choice: Choice, kappa: float, threshold: float) -> Interval:
    if not fit.replicates or fit.verdict is Verdict.POWER:
        return math.nan, math.nan
    pairs = np.array(fit.replicates)  # Inverse thresholds are taken because they are finite even if L1 is zero.
    inverse = 1 / safe_threshold(pairs[:, 0], pairs[:, 1], choice.eta, kappa)
    low, high = percentile_interval(inverse, over(1.0, choice.threshold), fit.interval_freedom)
    least = threshold if threshold > choice.threshold else 0.0  # The noise raises both ends of the interval.
    return max(over(1.0, high), least), max(over(1.0, low), least)


def _from_fit(fit: SmoothnessFit, eta: float, kappa: float, gain: float) -> Choice | None:
    """The choice of the rule; None if no rate was given and no rate follows from the fit."""
    if fit.verdict is Verdict.POWER:
        return choose(LawRate(_power(fit), kappa), eta, gain)
    half_step = kappa / (2 * fit.L1)
    if math.isnan(eta):
        L0, note = fit.L0, ""
        if fit.L0_interval[0] <= 0:
            L0 = fit.L0_interval[1]
            note = " The interval of L0 reaches zero, so its upper end stands in for L0."
            if not 0 < L0 < math.inf:
                return None
        eta = kappa / (2 * L0)
        origin = (
            "No learning rate was given, so the rule chose one: half of kappa goes to the rate, kappa/(2 L0), and half "
            "to the longest step, kappa/(2 L1)."
        )
        return Choice(eta, half_step / eta, origin + note)
    note = ""
    if fit.L0_interval[0] <= 0:
        note = (
            f" The fit puts L0 at {'zero' if fit.L0 == 0 else f'{fit.L0:.4g}'} and the interval of L0 reaches zero: "
            "the largest safe rate is undetermined, and this rate was not tested."
        )
    recommended = over(kappa, 2 * fit.L0)
    low = f"lower the learning rate to {recommended / gain:.4g}: this one is too large for any threshold."
    advice = f"use an effective rate of kappa/(2 L0) = {recommended:.4g}, a learning rate of {recommended / gain:.4g}"
    if eta * fit.L0 >= kappa:
        origin = f"{unsafe(fit, eta, kappa)} {advice[0].upper()}{advice[1:]}.{note}"
        return Choice(
            eta,
            half_step / eta,
            origin,
            f" The longest step is held at kappa/(2 L1) = {half_step:.4g}.",
            low,
            recommended,
        )
    if 2 * eta * fit.L0 > kappa:
        origin = (
            f"The effective rate {eta:.4g} is too large: to keep rate * (L0 + L1 * threshold) at {kappa:g}, steps "
            f"would have to become uselessly short. Instead {advice}.{note}"
        )
        consequence = (
            f" The longest step is held at kappa/(2 L1) = {half_step:.4g}, where the product is "
            f"{eta * fit.L0 + kappa / 2:.3g}."
        )
        return Choice(eta, half_step / eta, origin, consequence, low, recommended)
    threshold = (kappa / eta - fit.L0) / fit.L1
    origin = (
        f"At the effective rate {eta:.4g} the product rate * (L0 + L1 * norm) reaches {kappa:g} at the gradient norm "
        f"{threshold:.4g}."
    )
    return Choice(eta, threshold, origin + note)


def _paste(threshold: float, lr: float, momentum: float, *, averages: bool) -> str:
    """Where a threshold goes."""
    at = f"lr={lr:.4g}" + (f" and momentum={momentum:g}" if momentum else "")
    if averages:
        return f"set threshold={threshold:.4g} at {at} in an optimizer that clips its average (ClippedMomentum)."
    return f"set max_norm={threshold:.4g} at {at} (clip_grad_norm_, max_grad_norm, gradient_clip_val)."


def _percentile(fit: SmoothnessFit, eta: float, doubt: str, averaging: float) -> Choice:
    threshold = fit.grad_norm_quantiles[FALLBACK_PERCENTILE]
    origin = (
        f"Do not clip from this fit, because {doubt}. The {FALLBACK_PERCENTILE}th percentile of the recorded gradient "
        f"norms is {threshold:.4g}; clipping there stops outliers, but guarantees nothing."
    )
    if averaging > 0:
        # The standard deviation of an exponential average of uncorrelated terms of standard deviation one.
        shrink = averaged(averaging)
        threshold *= shrink
        origin += (
            f" The threshold is this percentile times {shrink:.2g}, because an average of uncorrelated gradients with "
            f"momentum {averaging:g} is shorter by this factor."
        )
    advice = make_plan(fit).next
    return Choice(eta, threshold, origin, next=advice)


def _power(fit: SmoothnessFit) -> PowerLaw:
    score = power_of(fit)
    return PowerLaw(score.intercept, score.coefficient, score.exponent)


def _largest_rate(fit: SmoothnessFit, kappa: float) -> float:
    """Effective rate that the fit allows at a vanishing gradient; NaN if it cannot tell."""
    if not distrust(fit) and fit.L0_interval[0] > 0:
        return kappa / fit.L0
    if not distrust(fit, (Verdict.POWER,)) and power_of(fit).intercept > 0:
        return kappa / power_of(fit).intercept
    return math.nan


def _after_raise(fit: SmoothnessFit, eta: float, threshold: float, kappa: float) -> str:
    if fit.verdict is Verdict.POWER:
        return f" With the raised threshold the longest step is {eta * threshold:.4g}, and the law allows no such step."
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
