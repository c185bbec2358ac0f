"""From fitted constants to a clipping threshold with a reason; every cited formula lives here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from smoothdiag.fits.base import SmoothnessFit, Verdict

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
        step_cap: longest step that results, effective rate times threshold; NaN where no rate is known.
        max_lr: largest learning rate, in the optimizer's own convention, that a small gradient allows; NaN where the
            fit cannot say.
        clip_rate: share of the recorded gradient norms above the threshold.
        reason: why, in words.
        lr: the optimizer's learning rate the rule is meant for: the given one, or the one the rule chose; NaN where
            neither exists.
        source: "fit", or "percentile" where the fit could not be used.

    Units: threshold [f/x], step_cap [x], rates [x^2/f].
    """

    threshold: float
    step_cap: float
    max_lr: float
    clip_rate: float
    reason: str
    lr: float
    source: Literal["fit", "percentile"]

    def __str__(self) -> str:
        return (
            f"clip gradients at norm {self.threshold:.4g} (from the {self.source}; clips {self.clip_rate:.1%} of the "
            f"recorded steps)\n  learning rate {_say(self.lr)}, at most {_say(self.max_lr)} for small gradients; "
            f"longest step {_say(self.step_cap)}\n  {self.reason}"
        )


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

    Args:
        fit: from `fit_smoothness`.
        lr: the optimizer's learning rate; None lets the rule choose kappa / (2 L0).
        momentum: heavy-ball momentum in [0, 1) of the optimizer.
        dampening: its dampening in [0, 1).
        kappa: safety: 1 is the theorem, the loss still falls up to 2.
        noise: standard deviation of the norm of minibatch gradients around the full one.

    Returns:
        ClipRule: with `source` "fit" or "percentile".

    Raises:
        ValueError: for parameters out of range.

    Units: lr [x^2/f], noise [f/x].

    Source: Pethick et al., 2025, Theorem 4.3: rate <= 1 / (L0 + threshold * L1), solved for the threshold; for the
        noise Zhang et al., 2020.
    """
    _validate(lr, momentum, dampening, kappa, noise)
    gain = (1 - dampening) / (1 - momentum)
    eta = math.nan if lr is None else lr * gain
    doubt = _doubt(fit)
    chosen = None if doubt else _from_fit(fit, eta, kappa)
    if chosen is None:
        doubt = doubt or "the fit puts L0 at zero with no upper end to its interval, so it implies no learning rate"
        threshold = fit.grad_norm_quantiles[FALLBACK_PERCENTILE]
        reason = (
            f"Not from the fit: {doubt}. The threshold is the {FALLBACK_PERCENTILE}th percentile of the recorded "
            "gradient norms, which stops outliers and guarantees nothing."
        )
    else:
        eta, threshold, reason = chosen
    if noise is not None and threshold < NOISE_MULTIPLE * noise:
        reason += (
            f" Raised from {threshold:.4g} to {NOISE_MULTIPLE:g} times the noise {noise:.4g}: a threshold inside the "
            "noise biases every step. Longer steps than the fit allows can then occur."
        )
        threshold = NOISE_MULTIPLE * noise
    clip_rate = _share_above(fit, threshold)
    if clip_rate > NEARLY_NORMALISED:
        reason += (
            f" It clips {clip_rate:.0%} of the recorded steps, which is close to normalised descent: the step length, "
            "not the rate, then sets the pace."
        )
    usable = fit.verdict in (Verdict.L0L1, Verdict.CONSTANT) and fit.L0 > 0
    return ClipRule(
        threshold=threshold,
        step_cap=eta * threshold,
        max_lr=kappa / fit.L0 / gain if usable else math.inf if chosen else math.nan,
        clip_rate=clip_rate,
        reason=reason,
        lr=eta / gain,
        source="fit" if chosen else "percentile",
    )


def _from_fit(fit: SmoothnessFit, eta: float, kappa: float) -> tuple[float, float, str] | None:
    """Effective rate, threshold and reason; None where no rate was given and the fit implies none."""
    if math.isnan(eta):
        L0, note = fit.L0, ""
        if L0 == 0:
            L0 = fit.L0_interval[1]
            note = " The fit puts L0 at zero, so the upper end of its interval stands in for it."
            if not 0 < L0 < math.inf:
                return None
        eta = kappa / (2 * L0)
        threshold = kappa / (2 * fit.L1) / eta
        reason = (
            f"No rate was given: half of kappa limits the rate, kappa/(2 L0), and half the step, kappa/(2 L1).{note}"
        )
        return eta, threshold, reason
    if fit.L0 > 0 and eta >= kappa / fit.L0:
        threshold = kappa / (2 * fit.L1) / eta
        reason = (
            f"No threshold makes this rate safe: the effective rate {eta:.4g} is not below kappa/L0 = "
            f"{kappa / fit.L0:.4g}, so it is too large even where the gradient vanishes. The step is capped at "
            "kappa/(2 L1); lower the rate."
        )
        return eta, threshold, reason
    reason = f"Solves rate * (L0 + L1 * threshold) = {kappa:g} for the effective rate {eta:.4g}."
    if fit.L0 == 0:
        reason += " The fit puts L0 at zero, so only L1 limits the step, and the rate itself is not tested."
    return eta, (kappa / eta - fit.L0) / fit.L1, reason


def _doubt(fit: SmoothnessFit) -> str:
    """Why the fit cannot carry a threshold; empty where it can."""
    if fatal := [flag.name for flag in fit.flags if flag.fatal]:
        return f"its verdict is {fit.verdict.name} because of a fatal flag ({', '.join(fatal)})"
    if fit.verdict is Verdict.CONSTANT:
        return "smoothness does not grow with the gradient norm, so a learning rate below 1/L0 needs no threshold"
    if fit.verdict is not Verdict.L0L1:
        return f"its verdict is {fit.verdict.name}"
    if not fit.L1_interval[0] > 0:
        return f"the interval of L1 contains zero ([{fit.L1_interval[0]:.4g}, {fit.L1_interval[1]:.4g}])"
    return ""


def _share_above(fit: SmoothnessFit, threshold: float) -> float:
    quantiles = np.array(fit.grad_norm_quantiles)
    if threshold >= quantiles[-1]:
        return 0.0
    if threshold < quantiles[0]:
        return 1.0
    return float(1 - np.interp(threshold, quantiles, np.linspace(0, 1, len(quantiles))))


def _validate(lr: float | None, momentum: float, dampening: float, kappa: float, noise: float | None) -> None:
    if lr is not None and not 0 < lr < math.inf:
        raise ValueError(f"Parameter `lr` should be positive and finite. Found `lr = {lr}`.")
    for name, value in (("momentum", momentum), ("dampening", dampening)):
        if not 0 <= value < 1:
            raise ValueError(f"Parameter `{name}` should be in [0, 1). Found `{name} = {value}`.")
    if not 0 < kappa < math.inf:
        raise ValueError(f"Parameter `kappa` should be positive and finite. Found `kappa = {kappa}`.")
    if noise is not None and not 0 <= noise < math.inf:
        raise ValueError(f"Parameter `noise` should be at least 0 and finite. Found `noise = {noise}`.")


def _say(value: float) -> str:
    return "unknown" if math.isnan(value) else f"{value:.4g}"


def clip_table(fit: SmoothnessFit) -> pd.DataFrame:
    """What the cited theorems would choose for the fitted constants, side by side.

    The rows hold the rate for small gradients, the longest step and the threshold, for plain descent without
    momentum. Constants of zero give infinite rates or steps, as the formulas do.

    1. Zhang 2019 also bounds the step by 1 and the threshold by 10 L0, which have no units that fit; left out.

    Args:
        fit: from `fit_smoothness`; its verdict is not asked.

    Returns:
        DataFrame: columns `max_lr`, `step_cap`, `threshold`, one row per source.

    Units: max_lr [x^2/f], step_cap [x], threshold [f/x].

    Source: Zhang et al., 2020 (arXiv 2019), Theorem 3; Pethick et al., 2025, Theorem 4.3 with threshold L0/L1;
        Vankov et al., 2024, clipped descent.
    """
    rate, cap = fit.max_lr, fit.step_cap
    ratio = fit.L0 * cap if fit.L0 > 0 else 0.0
    rows = {
        "Zhang 2019": (rate / 10, cap / 10, ratio),
        "Pethick 2025": (rate / 2, cap / 2, ratio),
        "Vankov 2024": (rate / 2, cap / 3, 2 / 3 * ratio),
    }
    return pd.DataFrame.from_dict(rows, orient="index", columns=["max_lr", "step_cap", "threshold"])
