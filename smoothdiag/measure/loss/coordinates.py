"""Coordinates: which parameters are measured, their names, and their learning rates."""

import math
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from smoothdiag import arguments, vectors
from smoothdiag.adapters import moved_by
from smoothdiag.measure.loss.state import parameters_of

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def coordinates(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Returns the trainable parameters that the optimizer moves, with the model's parameters first, in its order.

    Raises:
        ValueError: If the model has no trainable parameters, or the optimizer holds none of them.
    """
    reshard(model)
    trainable = [p for p in parameters_of(model) if p.requires_grad]
    if not trainable:
        raise ValueError("Parameter `model` should have trainable parameters. Found none that require a gradient.")
    held = [p for p in moved_by(optimizer) if p.requires_grad]
    known = set(map(id, held))
    shared = [p for p in trainable if id(p) in known]
    if not shared:
        raise ValueError(
            f"Parameter `optimizer` should hold parameters of `model`. Found none of its {len(trainable)} "
            f"trainable parameters among the optimizer's {len(held)}. The model may have been copied or wrapped after "
            "the optimizer was made: make the optimizer from `model.parameters()` of this model."
        )
    if any(p.is_meta for p in held):
        raise ValueError("Parameter `model` should have parameters with values. Found some on the meta device.")
    if any(p.is_complex() for p in held):
        raise ValueError(
            "Parameter `model` should have real parameters. Found complex ones; train torch.view_as_real of each."
        )
    # The order of the model, then parameters of the loss itself that the optimizer moves too.
    found: list[nn.Parameter] = vectors.unique(shared, held)
    return found


def moves_of(optimizer: torch.optim.Optimizer) -> list[tuple[int, bool]]:
    """Returns which parameters an optimizer holds, by identity, and which of them train."""
    return [(id(p), p.requires_grad) for group in optimizer.param_groups for p in group["params"]]


def parameter_groups(
    model: nn.Module, parameters: Sequence[nn.Parameter], group_by: Callable[[str], str] | None
) -> dict[str, list[int]]:
    """Returns the indices of the parameters of each group.

    Raises:
        ValueError: If ``group_by`` is not a function, or if it returns no string, or the string "all".
    """
    if group_by is None:
        return {}
    if not callable(group_by):
        raise ValueError(
            "Parameter `group_by` should be a function from parameter names to labels, such as by_module(). "
            f"Found `group_by = {group_by!r}`."
        )
    names = {parameter: _unwrapped(name, model) for name, parameter in model.named_parameters()}
    groups: dict[str, list[int]] = {}
    for index, parameter in enumerate(parameters):
        label = group_by(names.get(parameter, ""))
        if not isinstance(label, str) or label == "all":
            raise ValueError(
                "Parameter `group_by` should return a label other than 'all', a string, for each parameter name. "
                f"Found `{label!r}` for `{names.get(parameter, '')}`."
            )
        groups.setdefault(label, []).append(index)
    return groups


def learning_rates(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> list[float]:
    """Returns the present learning rate of each parameter; waits for the device if a rate is a tensor."""
    rates: dict[int, float] = {}
    for group in optimizer.param_groups:
        rates |= dict.fromkeys(map(id, group["params"]), float(group["lr"]))
    return [rates[id(p)] for p in parameters]


def common(values: Sequence[float]) -> float:
    """Returns the common value, or NaN if values differ."""
    return values[0] if len(set(values)) == 1 else math.nan


def by_module(depth: int = 1) -> Callable[[str], str]:
    """Returns a grouping for ``group_by``: parameters whose names begin with the same parts share a group.

    Args:
        depth: Number of parts of the dotted name that count; 1 groups by the model's direct children. An index counts
            with the list before it, so each of ``layers.0``, ``layers.1``, ... is a group of its own.

    Raises:
        ValueError: If ``depth`` is not a positive whole number.

    Examples:
        >>> name = "encoder.layers.0.attention.weight"
        >>> print(sd.by_module()(name), sd.by_module(depth=2)(name))
        encoder encoder.layers.0
    """
    arguments.whole("depth", depth, 1)

    def label(name: str) -> str:
        modules = name.split(".")[:-1]
        end = depth
        while end < len(modules) and modules[end].isdigit():
            end += 1
        return ".".join(modules[:end]) or name or "(outside the model)"

    return label


def is_distributed(model: nn.Module, parameters: Sequence[Tensor]) -> bool:
    """Returns whether ``backward`` averages gradients over ranks, so that ranks must measure together."""
    return any(map(vectors.is_sharded, parameters)) or any(
        isinstance(module, DistributedDataParallel) for module in model.modules()
    )


def reshard(model: nn.Module) -> None:
    """Puts the shards back in place of weights that a forward pass without a backward has gathered (FSDP2).

    Gathered weights are stale once the shards are written to. They are no coordinates either, because the optimizer
    does not hold them.
    """
    for module in fully_sharded(model):
        module.reshard()


def forward_dtypes(model: nn.Module) -> set[torch.dtype]:
    """Returns the dtypes that sharded modules cast their parameters to in forward and backward (FSDP2)."""
    # There is no public way to ask; without an answer the parameters' own dtype is assumed.
    states = [getattr(module, "_get_fsdp_state", lambda: None)() for module in fully_sharded(model)]
    dtypes = {getattr(getattr(state, "_mp_policy", None), "param_dtype", None) for state in states}
    return {dtype for dtype in dtypes if dtype is not None}


def fully_sharded(model: nn.Module) -> "list[FSDPModule]":
    """Returns the modules of a model that FSDP2 shards."""
    # Importing the class takes half as long as importing torch. Unless somebody has imported it, no module is one.
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    return [module for module in model.modules() if isinstance(module, kind)] if kind else []


def _unwrapped(name: str, model: nn.Module) -> str:
    """Returns a parameter's name without the wrappers of data parallelism, compilation and checkpointing."""
    kept, module = [], model
    for part in name.split("."):
        is_wrapper = isinstance(module, DistributedDataParallel)
        if not is_wrapper and part not in ("_orig_mod", "_checkpoint_wrapped_module"):
            kept.append(part)
        module = getattr(module, part)
    return ".".join(kept)
