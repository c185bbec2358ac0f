"""The matrix that an adaptive optimizer divides by, read from its state."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

State = Mapping[str, Any]


def preconditioner(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> list[Tensor] | None:
    """Returns the diagonal of P, where the optimizer moves along P^-1 m; ``None`` where it has none that is known.

    Known are Adam and AdamW (bias-corrected), RMSprop, Adagrad, and their subclasses. Parameters
    the optimizer has not moved yet have P = 0; their gradients and displacements are zero too.

    Source: Cohen et al. 2022, *Adaptive gradient methods at the edge of stability*, for P of Adam and RMSprop.
    """
    diagonal = next((rule for kind, rule in _RULES.items() if isinstance(optimizer, kind)), None)
    if diagonal is None:
        return None
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    found = []
    for parameter in parameters:
        state = optimizer.state.get(parameter)
        zero = torch.zeros_like(parameter, requires_grad=False)
        try:
            found.append(diagonal(state, groups[parameter]) if state else zero)
        except KeyError:  # a subclass that keeps its state under other names
            return None
    return found


def _adam(state: State, group: Mapping[str, Any]) -> Tensor:
    # AMSGrad divides by the largest second moment so far.
    second: Tensor = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
    correction = 1 - group["betas"][1] ** float(state["step"])
    root: Tensor = (second / correction).sqrt() + group["eps"]
    return root


def _rmsprop(state: State, group: Mapping[str, Any]) -> Tensor:
    second: Tensor = state["square_avg"]
    if group["centered"]:
        second = second - state["grad_avg"].square()
    root: Tensor = second.clamp(min=0).sqrt() + group["eps"]
    return root


def _adagrad(state: State, group: Mapping[str, Any]) -> Tensor:
    total: Tensor = state["sum"]
    root: Tensor = total.sqrt() + group["eps"]
    return root


_RULES: Mapping[type[torch.optim.Optimizer], Callable[[State, Mapping[str, Any]], Tensor]] = {
    torch.optim.Adam: _adam,
    torch.optim.RMSprop: _rmsprop,
    torch.optim.Adagrad: _adagrad,
}
