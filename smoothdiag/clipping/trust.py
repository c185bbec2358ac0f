"""Checks that the rules share: which fits and arguments they may use, and how much momentum prolongs a step."""

from __future__ import annotations

import math

from smoothdiag import arguments
from smoothdiag.fits.base import SmoothnessFit, Verdict


def unsafe(fit: SmoothnessFit, eta: float, kappa: float) -> str:
    """Why no threshold makes a rate of at least kappa/L0 safe."""
    return (
        f"No threshold makes this rate safe: the effective rate {eta:.4g} is {eta * fit.L0 / kappa:.3g} times "
        f"kappa/L0 = {over(kappa, fit.L0):.4g}, so it is too large even for a vanishing gradient."
    )


def distrust(fit: SmoothnessFit) -> str:
    """Why the fit has no constants to use; empty if it has."""
    if not may_follow_gradients(fit):
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
    if fit.verdict not in (Verdict.L0L1, Verdict.CONSTANT):
        return f"its verdict is {fit.verdict.name}"
    return ""


def may_follow_gradients(fit: SmoothnessFit) -> bool:
    """Whether steps are the rate times an average of gradients, or nobody says which optimizer took them."""
    return bool(fit.follows_gradients) or (fit.follows_gradients is None and not fit.optimizer)


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
    if doubt := distrust(fit):
        return doubt
    if fit.verdict is Verdict.CONSTANT:
        flat = "smoothness does not grow with the gradient norm"
        if eta * fit.L0 >= kappa:
            return f"{flat}. {unsafe(fit, eta, kappa).rstrip('.')}"
        return f"{flat}, so a learning rate below kappa/L0 needs no threshold"
    if not fit.L1_interval[0] > 0:
        return f"the interval of L1 contains zero ([{fit.L1_interval[0]:.4g}, {fit.L1_interval[1]:.4g}])"
    return ""


def unchecked(fit: SmoothnessFit) -> bool:
    """Whether the check for artefacts could not run."""
    return any(flag.name == "saturation unknown" for flag in fit.flags)


def over(numerator: float, denominator: float) -> float:
    """The quotient; infinite if the denominator is zero."""
    return numerator / denominator if denominator > 0 else math.inf


def check(fit: object, kappa: float) -> None:
    """Raises a ValueError unless the arguments make a rule."""
    check_fit(fit)
    arguments.number("kappa", kappa, "in (0, 2]", lambda v: 0 < v <= 2)


def check_fit(fit: object) -> None:
    """Raises a ValueError unless it is a fit."""
    if not isinstance(fit, SmoothnessFit):
        raise arguments.wrong("fit", "a SmoothnessFit: pass `fit_smoothness(trace)`", fit)


def check_momentum(momentum: float, dampening: float) -> None:
    """Raises a ValueError unless both are in [0, 1)."""
    for name, value in (("momentum", momentum), ("dampening", dampening)):
        arguments.number(name, value, "in [0, 1)", lambda v: 0 <= v < 1)
