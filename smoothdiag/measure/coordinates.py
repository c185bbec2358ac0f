"""Coordinates: which parameters are measured, what they are called, and how fast each of them is moved."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def coordinates(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Returns the trainable parameters that the optimizer moves: those of the model first, in its order.

    Raises:
        ValueError: If the model has no trainable parameters, or the optimizer holds none of them.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("Parameter `model` should have trainable parameters. Found none that require a gradient.")
    held = dict.fromkeys(p for group in optimizer.param_groups for p in group["params"] if p.requires_grad)
    shared = [p for p in trainable if p in held]
    if not shared:
        raise ValueError(
            f"Parameter `optimizer` should hold parameters of `model`. Found none of its {len(trainable)} "
            f"trainable parameters among the optimizer's {len(held)}; was the model copied or wrapped after "
            "the optimizer was made?"
        )
    # The order of the model, then parameters of the loss itself that the optimizer moves too.
    return list(dict.fromkeys([*shared, *held]))


def parameter_groups(
    model: nn.Module, parameters: Sequence[nn.Parameter], group_by: Callable[[str], str] | None
) -> dict[str, list[int]]:
    """Returns the indices of the parameters of each group.

    Raises:
        ValueError: If ``group_by`` returns anything but a label other than "all".
    """
    if group_by is None:
        return {}
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups: dict[str, list[int]] = {}
    for index, parameter in enumerate(parameters):
        label = group_by(names.get(parameter, ""))
        if not isinstance(label, str) or label == "all":
            raise ValueError(
                "Parameter `group_by` should return a label other than 'all' for a parameter name. "
                f"Found `{label!r}` for `{names.get(parameter, '')}`."
            )
        groups.setdefault(label, []).append(index)
    return groups


def learning_rates(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> list[float]:
    """Returns the learning rate that each parameter has at present; waits for the device if it is a tensor."""
    rates = {p: float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    return [rates[p] for p in parameters]


def common(values: Sequence[float]) -> float:
    """Returns the value that all share, NaN where they differ."""
    return values[0] if len(set(values)) == 1 else math.nan
