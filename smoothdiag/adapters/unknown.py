"""Optimizers that no adapter describes; the adapters of all other families derive from the class in this file."""

import inspect
from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import Tensor

from smoothdiag.adapters.iterates import equal_to_parameters, near_parameters
from smoothdiag.adapters.protocol import UNKNOWN, Ball, Group, Limits, State, Way
from smoothdiag.adapters.updates import Formula
from smoothdiag.adapters.wrappers import innermost

WAY_OUT = (
    'Clip gradients by hand, or pass `mode="shadow"` to measure without acting. If this optimizer wraps another one, '
    "give the probe and AutoClip that one."
)


class Unknown:
    """Describes an optimizer about which nothing but its state is known.

    AutoClip may shorten its updates, unless it keeps a copy of the parameters and moves that along with them. AutoClip
    looks for such a copy in its state.

    Args:
        optimizer: The optimizer.
    """

    way: Way = "updates"
    follows_gradients = False
    second = ""
    """The entry of a parameter's state that is a running average of squared gradients; empty if there is none."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer: Any = optimizer

    @staticmethod
    def matches(optimizer: torch.optim.Optimizer) -> bool:
        """Returns whether this adapter describes an optimizer."""
        return True

    def stepping(self) -> torch.optim.Optimizer:
        """Returns the optimizer that really takes the steps."""
        return innermost(self.optimizer)

    def momentum(self, group: Group) -> float:
        """Returns 0: AutoClip measures updates, not an average of gradients."""
        return 0.0

    def gain(self, group: Group) -> float:
        """Returns 1."""
        return 1.0

    def shortening(self, group: Group) -> float:
        """Returns 1."""
        return 1.0

    def update(self, group: Group) -> Formula | None:
        """Returns ``None``: only a copy of the parameter can tell."""
        return None

    def preconditioner(self, parameters: Sequence[Tensor]) -> Sequence[Tensor] | None:
        """Returns ``None``."""
        return None

    def unit_balls(self, parameters: Sequence[Tensor]) -> Sequence[Ball | None]:
        """Returns ``None`` for every parameter."""
        return [None] * len(parameters)

    def stability_limit(self, parameters: Sequence[Tensor]) -> Limits:
        """Returns `UNKNOWN`."""
        return UNKNOWN

    def evaluated(self, parameter: Tensor) -> Tensor:
        """Returns the parameter, as far as is known."""
        return parameter

    def refusal(self) -> str:
        """Returns why shortened updates would spoil the optimizer, as far as its state shows so far."""
        if is_of_torch(self.optimizer):
            return ""
        found = equal_to_parameters(self.optimizer)
        name = type(self.optimizer).__name__
        return keeps_iterate(f"`{found}` in the state of {name}, which equals the parameters") if found else ""

    def late_refusal(self, moved: float | Tensor) -> str | None:
        """Returns why shortened updates would spoil the optimizer, as its state shows after a step."""
        if is_of_torch(self.optimizer):
            return ""
        found = near_parameters(self.optimizer, moved)
        name = type(self.optimizer).__name__
        return keeps_iterate(f"`{found}` in the state of {name}, which lies near the parameters") if found else found

    def group_of(self, parameter: Tensor) -> dict[str, Any]:
        """Returns the group that holds a parameter; empty where the optimizer does not move it."""
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        return next((group for group in groups if any(p is parameter for p in group["params"])), {})

    def state_of(self, parameter: Tensor) -> State:
        """Returns what the optimizer keeps for a parameter; empty before its first step."""
        kept: State = self.optimizer.state.get(parameter, {})
        return kept


def first_options(optimizer: torch.optim.Optimizer) -> Set[str]:
    """Returns the names of what the first group holds; none where there are no groups yet."""
    groups: list[dict[str, Any]] = optimizer.param_groups
    return groups[0].keys() if groups else set()


def is_of_torch(optimizer: torch.optim.Optimizer) -> bool:
    """Returns whether the class comes with torch, whose optimizers keep no copy of the parameters except ASGD."""
    return f"{type(optimizer).__module__}.".startswith("torch.optim.")


def has_step_of(optimizer: torch.optim.Optimizer, kind: type[torch.optim.Optimizer]) -> bool:
    """Returns whether an optimizer takes the steps of a class of torch, even if a schedule has wrapped its ``step``."""
    # Optimizers wrap the `step` of their class, and keep what they have wrapped.
    return isinstance(optimizer, kind) and inspect.unwrap(type(optimizer).step) is inspect.unwrap(kind.step)


def keeps_iterate(found: str) -> str:
    """Returns the refusal of an optimizer that keeps a copy of the parameters."""
    return (
        "Parameter `optimizer` should keep no copy of the parameters that it moves along with them. AutoClip would "
        "shorten the update of the parameters but not of the copy, and spoil the weights that are computed from both. "
        f"Found {found}. {WAY_OUT}"
    )
