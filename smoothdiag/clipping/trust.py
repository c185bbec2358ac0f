"""Checks that the rules share: which fits and arguments they may use, and how much momentum prolongs a step."""

from __future__ import annotations

import math

from smoothdiag import arguments
from smoothdiag.fits.base import ModelScore, SmoothnessFit, Verdict
from smoothdiag.fits.decision import follows_gradients, unchecked
from smoothdiag.fits.plan import make_plan


def unsafe(fit: SmoothnessFit, eta: float, kappa: float) -> str:
    """Why no threshold makes a rate of at least kappa/L0 safe."""
    return (
        f"No threshold makes this rate safe: the effective rate {eta:.4g} is {eta * fit.L0 / kappa:.3g} times "
        f"kappa/L0 = {over(kappa, fit.L0):.4g}, so it is too large even for a vanishing gradient."
    )


def distrust(fit: SmoothnessFit, verdicts: tuple[Verdict, ...] = (Verdict.L0L1, Verdict.CONSTANT)) -> str:
    """Why the fit has no constants to use, or none by these verdicts; empty if it has."""
    if not follows_gradients(fit):
        said = "its rows come from" if fit.follows_gradients is False else "its rows do not say how steps are made by"
        return (
            f"{said} {fit.optimizer}. L0 and L1 bound the rate and the steps only if a step is the rate times the "
            "gradient (if it is, set `follows_gradients=True` in the fit with dataclasses.replace; if not, use "
            "AutoClip, which keeps the updates themselves short)"
        )
    if fatal := [flag.name for flag in fit.flags if flag.fatal]:
        return f"its verdict is {fit.verdict.name} because of a fatal flag ({', '.join(fatal)})"
    if unchecked(fit):
        return "too few of its rows have a saturation, so the check for artefacts could not run"
    if fit.verdict not in verdicts:
        other = {
            Verdict.LOSS_GAP: ": the loss sets smoothness there, and `sd.LossGapWarmup` makes a learning rate of that",
            Verdict.NOT_IDENTIFIED: " (`print(fit.plan())` says what to measure next)",
        }
        return f"its verdict is {fit.verdict.name}{other.get(fit.verdict, '')}"
    if fit.hessian is not None and fit.hessian.agrees is False:
        return (
            f"the {fit.hessian.num_rows} Hessian norms beside its rows contradict the line: {fit.hessian.coverage:.0%} "
            f"of them lie at or below it, and {fit.quantile:.0%} should"
        )
    return ""


def only_range_is_short(fit: SmoothnessFit) -> bool:
    """Whether nothing but the range of the gradient norms stands against the fit."""
    blocking = [flag.name for flag in fit.flags if flag.blocking or flag.fatal]
    return fit.verdict is Verdict.NOT_IDENTIFIED and blocking == ["range"]


def one_direction(fit: SmoothnessFit) -> str:
    """What the constants leave open, as a further sentence; empty if Hessian norms agree with them."""
    if not fit.estimator.startswith(("local", "path")) or (fit.hessian is not None and fit.hessian.agrees):
        return ""
    return (
        " The rows bound smoothness along the probed direction only. The largest curvature ||H|| may be larger, and "
        "then these steps are too long. Rows of `sd.HessianNorm()` beside them, or `sd.scan`, would settle it."
    )


def untold(fit: SmoothnessFit) -> str:
    """What to do about a fit of rows that name an optimizer, but do not say how it steps."""
    return (
        f"The rows of this fit come from {fit.optimizer}, but do not say whether a step is the learning rate times an "
        "average of gradients: an earlier version of smoothdiag wrote them. So the threshold does not rest on the fit. "
        "It is a percentile of the recorded gradient norms, which only stops outliers. If the steps follow the "
        "gradient, as in plain SGD, pass `dataclasses.replace(fit, follows_gradients=True)`."
    )


def doubt_about(fit: SmoothnessFit, eta: float, kappa: float) -> str:
    """Why the fit cannot carry a threshold; empty if it can."""
    if doubt := distrust(fit, (Verdict.L0L1, Verdict.CONSTANT, Verdict.POWER)):
        return doubt
    if fit.verdict is Verdict.POWER:
        return _doubt_about_power(fit)
    if fit.verdict is Verdict.CONSTANT:
        flat = "smoothness does not grow with the gradient norm"
        if eta * fit.L0 >= kappa:
            return f"{flat}. {unsafe(fit, eta, kappa).rstrip('.')}"
        return f"{flat}, so a learning rate below kappa/L0 needs no threshold"
    if not fit.L1_interval[0] > 0:
        return f"the interval of L1 contains zero ([{fit.L1_interval[0]:.4g}, {fit.L1_interval[1]:.4g}])"
    return ""


def power_of(fit: SmoothnessFit) -> ModelScore:
    """The power model of a fit.

    Raises:
        ValueError: if the fit holds none.
    """
    for score in fit.comparison:
        if score.name == "power" and score.intercept >= 0 and score.coefficient > 0 and score.exponent > 0:
            return score
    raise ValueError("Parameter `fit` should hold a power model that rises. Found none in `fit.comparison`.")


def _doubt_about_power(fit: SmoothnessFit) -> str:
    exponent = power_of(fit).exponent
    if exponent <= 1:
        return ""
    return (
        f"its verdict is POWER with the exponent {exponent:.2f}. Smoothness grows faster than the gradient norm, so no "
        "step length is safe at every norm (`sd.step_rate` makes a learning rate that is)"
    )


def over(numerator: float, denominator: float) -> float:
    """The quotient; infinite if the denominator is zero."""
    return numerator / denominator if denominator > 0 else math.inf


def check(fit: object, kappa: float) -> None:
    """Raises a ValueError unless the arguments make a rule."""
    check_fit(fit)
    check_kappa(kappa)


def check_kappa(kappa: float) -> None:
    """Raises a ValueError unless it is in (0, 2]."""
    arguments.number("kappa", kappa, "in (0, 2]", lambda v: 0 < v <= 2)


def check_fit(fit: object) -> None:
    """Raises a ValueError unless it is a fit."""
    if not isinstance(fit, SmoothnessFit):
        raise arguments.wrong("fit", "a SmoothnessFit: pass `fit_smoothness(trace)`", fit)


def momentum_for(fit: SmoothnessFit, momentum: float | None, dampening: float | None) -> tuple[float, float, str]:
    """Momentum and dampening of a rule, and what to say about where they come from, as a further sentence.

    Raises:
        ValueError: if one was given that is not in [0, 1).
    """
    check_fit(fit)
    check_momentum(0.0 if momentum is None else momentum, 0.0 if dampening is None else dampening)
    known = 0.0 if math.isnan(fit.momentum) else fit.momentum
    if momentum is None:
        taken = known, (0.0 if math.isnan(fit.dampening) else fit.dampening) if dampening is None else dampening
        averaging = f" and the dampening {taken[1]:g}" if taken[1] else ""
        named = f"the momentum {known:g}{averaging}, which the trace names; `momentum=` overrides it"
        return *taken, f" It is for {named}." if known else ""
    said = f" It is for the given momentum {momentum:g}, and the trace names {known:g}."
    return momentum, dampening or 0.0, said if known not in (0.0, momentum) else ""


def check_momentum(momentum: float, dampening: float) -> None:
    """Raises a ValueError unless both are in [0, 1)."""
    for name, value in (("momentum", momentum), ("dampening", dampening)):
        arguments.number(name, value, "in [0, 1)", lambda v: 0 <= v < 1)


def note_on_scan(fit: SmoothnessFit, doubt: str) -> str:
    """What a rule from a scan has to add; nothing for a run.

    Raises:
        ValueError: if the scan has no constants to use: its points are no steps, so their norms make no threshold.
    """
    if not fit.num_scans:
        return ""
    if doubt:
        raise ValueError(
            f"Parameter `fit` should have constants that a threshold can rest on. Found that {doubt}. The points of a "
            "scan are no steps of a run, so a percentile of their gradient norms is no threshold either. "
            f"NEXT: {make_plan(fit).next} To clip in the meantime, use AutoClip, which needs no fit."
        )
    return (
        " A scan does not know the optimizer: this holds near the scanned checkpoint, where a step is the rate times "
        "the gradient."
    )
