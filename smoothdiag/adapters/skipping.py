"""Skipping: lets an optimizer leave out a step, with parameters, moments and step counts as they were."""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from smoothdiag.adapters.joint import members, moved_by


def found_by_scaler(optimizer: torch.optim.Optimizer) -> Tensor | None:
    """Returns what a GradScaler has found, where the optimizer is going to look at it: above 0, the step is skipped."""
    found: Tensor | None = getattr(optimizer, "found_inf", None)
    return found


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Returns whether an optimizer can leave out a step without a wait: fused ones of torch look at ``found_inf``.

    Not in the first step of a parameter, where fused SGD would keep a momentum that nobody has written to.
    """
    return all(
        getattr(member, "_step_supports_amp_scaling", False)
        and all(p in member.state for p in moved_by(member) if p.grad is not None)
        for member in members(optimizer)
    )


class DeviceSkip:
    """Tells fused optimizers by a tensor whether to take a step.

    Args:
        optimizer: The optimizer, or a `Joint` of several.
        skip: A 0-dim bool.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
        self._before = [(member, found_by_scaler(member)) for member in members(optimizer)]
        for member, found in self._before:
            flag = skip.to(torch.float32)
            if found is not None:
                flag = torch.maximum(flag.to(found.device), found.to(torch.float32))
            member.found_inf = flag  # type: ignore[attr-defined]

    def end(self) -> None:
        """Leaves the optimizers as they were; call it after the step."""
        for member, found in self._before:
            if found is not None:
                member.found_inf = found  # type: ignore[attr-defined]
            elif hasattr(member, "found_inf"):
                del member.found_inf


class HiddenGradients:
    """Lets optimizers take a step without gradients, which changes neither parameters nor what they keep for them.

    Some count their steps in the options of their groups, or in a state of their own, which are put back at the end.

    Args:
        optimizer: The optimizer, or a `Joint` of several.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._gradients: Sequence[tuple[Tensor, Tensor | None]] = [(p, p.grad) for p in moved_by(optimizer)]
        self._options: list[tuple[MutableMapping[Any, Any], dict[Any, _Value]]] = [
            (group, _copied(group)) for group in optimizer.param_groups
        ]
        self._options += [(member.state, _copied(member.state)) for member in members(optimizer)]
        for p, _ in self._gradients:
            p.grad = None

    def end(self) -> None:
        """Puts gradients and options back; call it after the step."""
        for p, gradient in self._gradients:
            p.grad = gradient
        for options, values in self._options:
            options.update({name: value.put_back() for name, value in values.items()})


class _Value:
    """A value that may be written to in place, and a copy to put back."""

    def __init__(self, value: Any) -> None:
        self._value, self._copy = value, copy.deepcopy(value)

    def put_back(self) -> Any:
        if not isinstance(self._value, Tensor):
            return self._copy
        with torch.no_grad():
            return self._value.copy_(self._copy)


def _copied(options: Mapping[Any, Any]) -> dict[Any, _Value]:
    """Returns what is kept beside the parameters and for none of them."""
    return {name: _Value(value) for name, value in options.items() if not isinstance(name, Tensor) and name != "params"}
