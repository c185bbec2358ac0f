"""Checks of what an AutoClip is given."""

from typing import Any, Literal, get_args

import torch

from smoothdiag.adapters import adapter_of
from smoothdiag.autoclip.acting import Action
from smoothdiag.autoclip.calibration import StepRule
from smoothdiag.autoclip.rows import ForClipping
from smoothdiag.measure.probe import Probe

Mode = Literal["clip", "set", "shadow"]


class Shown:
    """What an AutoClip says of itself in one line, without waiting for a device."""

    def __repr__(self) -> str:
        clipper: Any = self
        state = "" if clipper._attached else ", detached"
        return f"<AutoClip of {type(clipper._optimizer).__name__}, mode {clipper._mode!r}{state}; `reason` says more>"


def default_rule(optimizer: torch.optim.Optimizer, action: Action) -> StepRule:
    """Returns the rule for the momentum that an optimizer has at present, where its gradients are clipped."""
    if action.shortens_updates:
        return StepRule.for_momentum(0.0)
    return StepRule.for_momentum(max(map(adapter_of(optimizer).momentum, optimizer.param_groups)))


def check(optimizer: object, probe: object, mode: object, rule: object, estimator: object, *, set_lr: bool) -> None:
    """Raises a ValueError if an argument is not of its kind."""
    if mode not in get_args(Mode):
        raise ValueError(f"Parameter `mode` should be one of {get_args(Mode)}. Found `mode = {mode!r}`.")
    if not isinstance(probe, Probe):
        raise ValueError(f"Parameter `probe` should be a Probe. Found a {type(probe).__name__}.")
    if probe.optimizer is not optimizer:
        raise ValueError("Parameter `probe` should watch the same optimizer. Found one made for another.")
    if probe.is_closed:
        raise ValueError("Parameter `probe` should be open. Found one that has been closed.")
    if (adapter := adapter_of(probe.optimizer)).way == "nothing":
        raise ValueError(adapter.refusal())
    if any(isinstance(e, ForClipping) for _, estimators in probe.further for e in estimators):
        raise ValueError("Parameter `probe` should serve one AutoClip. Found one that does: detach that first.")
    if set_lr and mode == "shadow":
        raise ValueError('Parameter `set_lr` should be False in the mode "shadow", which changes nothing. Found True.')
    if rule is not None and not isinstance(rule, StepRule):
        raise ValueError(f"Parameter `rule` should be a StepRule. Found `rule = {rule!r}`.")
    if estimator is not None and (isinstance(estimator, type) or not callable(estimator)):
        raise ValueError(
            f"Parameter `estimator` should be an estimator, as LocalSmoothness(). Found `estimator = {estimator!r}`."
        )


def check_free_rate(optimizer: torch.optim.Optimizer, rule: StepRule, *, shortens_updates: bool) -> None:
    """Raises a ValueError if measurements do not tell a learning rate."""
    if shortens_updates or rule.multiple is None:
        raise ValueError(
            "A learning rate can be suggested where gradients are clipped and measured. Found "
            f"{type(optimizer).__name__} and `multiple = {rule.multiple}`."
        )


def check_schedule(optimizer: torch.optim.Optimizer) -> None:
    """Raises a ValueError if somebody else sets the learning rates of an optimizer."""
    if any("initial_lr" in group for group in optimizer.param_groups):
        raise ValueError(
            "Parameter `set_lr` should be False under a schedule, which would overwrite the rate: give `suggest_lr()` "
            "to the schedule. Found an optimizer with one."
        )
