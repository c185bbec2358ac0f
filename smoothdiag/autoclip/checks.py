"""Checks of what an AutoClip is given: arguments, and states that other versions have saved."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, Literal, get_args

import torch

from smoothdiag.adapters import adapter_of, members, name_of, stepping
from smoothdiag.adapters.turns import followers
from smoothdiag.autoclip.acting import Action
from smoothdiag.autoclip.calibration import RAISE_BY, Calibration, Measurement, StepRule
from smoothdiag.autoclip.history import Event
from smoothdiag.autoclip.rows import ForClipping
from smoothdiag.measure.probe import Probe
from smoothdiag.rows import SmoothdiagWarning

Mode = Literal["clip", "set", "shadow"]


VERSION = 3
"""Version of the states that this version writes; a state without a version has version 0. Version 2 knows the noise of
gradients; version 3 knows the rates of updates, lets S rise where updates are shortened, and soon confirms a rise."""

_SINCE = {"stopped": "", "num_faults": 0, "groups": (), "warm_ups": (), "judged_at": -1}
"""Entries that earlier versions did not write, with the values that runs of that time had."""

_ENTRIES = (
    *("action", "alone", "steps", "last_row", "relative", "peaks", "counted", "calibration", "events", "num_noted"),
    *("num_acted", "clipped", "skipped", "last_skipped"),
)


def check(
    optimizer: object, probe: object, mode: object, rule: object, estimator: object, *, set_lr: bool, has_held_out: bool
) -> None:
    """Raises a ValueError if an argument is of the wrong kind, or does not fit the others."""
    if mode not in get_args(Mode):
        raise ValueError(f"Parameter `mode` should be one of {get_args(Mode)}. Found `mode = {mode!r}`.")
    check_probe(optimizer, probe, "AutoClip")
    assert isinstance(probe, Probe)
    if (adapter := adapter_of(probe.optimizer)).way == "nothing":
        raise ValueError(adapter.refusal())
    if any(isinstance(e, ForClipping) for _, estimators in probe.further for e in estimators):
        raise ValueError(
            "Parameter `probe` should serve one AutoClip. Found a probe with another AutoClip: call its "
            "`detach()` first."
        )
    if set_lr and mode == "shadow":
        raise ValueError('Parameter `set_lr` should be False in the mode "shadow", which changes nothing. Found True.')
    if has_held_out and mode != "shadow":
        raise ValueError(
            'Parameter `held_out` should be left out unless the mode is "shadow": only there the end of a long step is '
            f"known. Found `mode = {mode!r}`."
        )
    if rule is not None and not isinstance(rule, StepRule):
        raise ValueError(f"Parameter `rule` should be a StepRule. Found `rule = {rule!r}`.")
    if estimator is not None and (isinstance(estimator, type) or not callable(estimator)):
        raise ValueError(
            "Parameter `estimator` should be an estimator, such as LocalSmoothness(). Found `estimator = "
            f"{estimator!r}`."
        )


def check_probe(optimizer: object, probe: object, who: str) -> None:
    """Raises a ValueError unless it is an open probe of the same optimizer."""
    if not isinstance(probe, Probe):
        raise ValueError(f"Parameter `probe` should be a Probe. Found a {type(probe).__name__}.")
    given, watched = members(stepping(optimizer)), members(probe.optimizer)
    if set(map(id, given)) != set(map(id, watched)):
        raise ValueError(
            f"Parameter `probe` should watch the optimizer that {who} gets: give both the same object. Found a probe "
            f"of one {name_of(probe.optimizer)}, and {who} was given another "
            f"{' + '.join(type(o).__name__ for o in given)}."
        )
    if probe.is_closed:
        raise ValueError("Parameter `probe` should be open. Found a closed probe, which measures nothing.")


def warn_of_another(optimizer: torch.optim.Optimizer, kind: type) -> bool:
    """Warns if an AutoClip follows an optimizer already, and returns whether; ``kind`` is the class that follows it."""
    is_there = any(isinstance(owner, kind) for owner in followers(optimizer))
    if is_there:
        warnings.warn(
            "Another AutoClip follows this optimizer already, as after a notebook cell has run twice, and both keep "
            "its steps short. Run the cell that makes model and optimizer again too, or call `detach()` of the other "
            "one.",
            SmoothdiagWarning,
        )
    return is_there


def check_free_rate(rule: StepRule) -> None:
    """Raises a ValueError if no learning rate follows from a rule, because it measures nothing."""
    if rule.multiple is None:
        raise ValueError(
            "AutoClip can suggest a learning rate only if its rule measures. Found `multiple = None` in its StepRule: "
            "give it a multiple."
        )


def check_schedule(optimizer: torch.optim.Optimizer) -> None:
    """Raises a ValueError if a schedule sets the learning rates of an optimizer."""
    if any("initial_lr" in group for group in optimizer.param_groups):
        raise ValueError(
            "Parameter `set_lr` should be False under a schedule, which would overwrite the rate. Found an optimizer "
            "with a schedule: give the schedule the rate from `suggest_lr()` instead."
        )


def check_state(state: Mapping[str, Any], action: Action, rule: StepRule | None) -> dict[str, Any]:
    """Returns a state in the form that this version writes.

    Raises:
        ValueError: If it is not a state of AutoClip, if a newer version wrote it, or if it belongs to another kind of
            optimizer or to another rule than the given one.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"Parameter `state` should be the result of `state_dict()`. Found a {type(state).__name__}.")
    version = state.get("version", 0)
    if not isinstance(version, int) or not 0 <= version <= VERSION:
        raise ValueError(
            f"Parameter `state` should be of version {VERSION} or earlier: load it with the smoothdiag that saved it, "
            f"or a newer one. Found version {version!r}."
        )
    state = {**_SINCE, **state}
    _require(state, _ENTRIES, "")
    calibration = state["calibration"]
    if version < 2 and isinstance(calibration, Mapping):
        calibration = _of_version_1(calibration)
    if version < 3 and isinstance(calibration, Mapping):
        calibration = state["calibration"] = _of_version_2(calibration, shortens_updates=action.shortens_updates)
    _require(calibration, [f.name for f in fields(Calibration)], "calibration")
    _require(calibration["rule"], [f.name for f in fields(StepRule)], "calibration.rule")
    for event in state["events"]:
        _require(event, [f.name for f in fields(Event)], "events")
    if any(len(found) != len(fields(Measurement)) for found in calibration["measurements"]):
        raise ValueError(
            f"Parameter `state` should hold measurements of {len(fields(Measurement))} numbers each. Found other "
            "measurements: another version of smoothdiag saved this state."
        )
    if state["action"] != type(action).__name__:
        raise ValueError(
            "Parameter `state` should come from an AutoClip of the same kind of optimizer and in the same mode. Found "
            f"the state of an AutoClip that acts by {state['action']}; this one acts by {type(action).__name__}."
        )
    made_with = StepRule(**calibration["rule"])
    if version < 2 and rule is not None:
        rule = replace(rule, noise=0.0)
    if rule is not None and rule != made_with:
        raise ValueError(f"Parameter `state` should have been made with the given rule, {rule}. Found {made_with}.")
    return state


def _of_version_1(calibration: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the state of a calibration that knew nothing of noise, and never rose, in the form of this version."""
    found = {**calibration, "raised_at": -1, "rises": False}
    if isinstance(rule := found.get("rule"), Mapping):
        found["rule"] = {**rule, "noise": 0.0}
    found["measurements"] = [(*each, math.nan, False) for each in found.get("measurements", ())]
    return found


def _of_version_2(calibration: Mapping[str, Any], *, shortens_updates: bool) -> dict[str, Any]:
    """Returns the state of a calibration that rose only where gradients are clipped, in the form of this version."""
    found = dict(calibration)
    raise_by = RAISE_BY if found.pop("rises", False) else math.inf
    if shortens_updates:  # the rates of updates were not known, and 1/L stood in their place
        found["measurements"] = [(*each[:2], math.nan, *each[3:]) for each in found.get("measurements", ())]
    return {**found, "raise_by": raise_by, "confirms": False}


def _require(found: Any, names: Any, where: str) -> None:
    """Raises a ValueError that names entries which are missing, or which this version does not know."""
    names = list(names)
    missing = [name for name in names if name not in found] if isinstance(found, Mapping) else names
    extra = [name for name in found if name not in names] if where and isinstance(found, Mapping) else []
    if missing or extra:
        said = f"no {', '.join(f'`{name}`' for name in missing)}" if missing else f"`{extra[0]}` besides"
        part = f" in its `{where}`" if where else ""
        raise ValueError(
            "Parameter `state` should be the result of `state_dict()` of an AutoClip of this version or an earlier "
            f"one. Found {said}{part}: another version of smoothdiag saved this state, or it belongs to something else."
        )
