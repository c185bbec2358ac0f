"""Taken: which optimizers take the steps, behind wrappers, containers and lists."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from smoothdiag import arguments
from smoothdiag.adapters.joint import Joint, moved_by
from smoothdiag.adapters.lookahead import Lookahead
from smoothdiag.adapters.sam import Sam
from smoothdiag.adapters.schedule_free import ScheduleFree
from smoothdiag.adapters.zero import is_zero

DEPTH = 4
"""Most wrappers, containers and lists within each other."""

_REQUIREMENT = (
    "Parameter `optimizer` should be a torch.optim.Optimizer, a list of them, or a wrapper that holds one as its "
    "`optimizer`."
)

_ENGINES = {
    "deepspeed": "the engine of DeepSpeed takes the steps and keeps gradients of its own, so no hook sees them; to "
    "measure, train under DistributedDataParallel or fully_shard",
    "colossalai": "ColossalAI keeps parameters and gradients of its own; to measure, train under "
    "DistributedDataParallel or fully_shard",
    "megatron": "Megatron keeps parameters and gradients of its own; to measure, train under fully_shard",
}
"""Packages whose optimizers cannot be followed, why, and what works instead."""


def stepping(optimizer: Any) -> torch.optim.Optimizer:
    """Returns the optimizer whose hooks are called when steps are taken, or a `Joint` of several.

    Wrappers without hooks (Accelerate's, Lightning's, schedules) give what they wrap; containers and lists, what they
    hold; SAM, the optimizer that steps for it.

    Raises:
        ValueError: If there is no such optimizer, or none that can be followed.
    """
    if isinstance(optimizer, Joint):
        return optimizer
    found = list(_stepping(optimizer, optimizer, DEPTH))
    for number, each in enumerate(found):
        if any(each is other for other in found[:number]):
            kind = type(each).__name__
            raise ValueError(f"Parameter `optimizer` should hold each optimizer once. Found the same {kind} twice.")
    return found[0] if len(found) == 1 else Joint(found)


def _stepping(optimizer: Any, given: Any, depth: int) -> Iterator[torch.optim.Optimizer]:
    package = type(optimizer).__module__.partition(".")[0]
    engine = "deepspeed" if "deepspeed" in type(optimizer).__name__.lower() else package
    if engine in _ENGINES:
        raise ValueError(f"{_REQUIREMENT} Found {type(optimizer).__name__}: {_ENGINES[engine]}.")
    if is_zero(optimizer) and getattr(optimizer, "_overlap_with_ddp", False):
        raise ValueError(
            f"{_REQUIREMENT} Found {type(optimizer).__name__} with `overlap_with_ddp=True`: it steps within backward, "
            "so no hook sees its steps. Leave that option out, and call `step()` after backward."
        )
    if isinstance(optimizer, list | tuple):
        inner: Sequence[Any] = optimizer
    elif not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        inner = _wrapped(optimizer)
    elif Sam.matches(optimizer):
        inner = [Sam(optimizer).stepping()]
    elif not (inner := _contained(optimizer)):
        yield optimizer
        return
    if not inner or not depth:
        raise ValueError(f"{_REQUIREMENT} Found {arguments.found('optimizer', given)}.")
    for each in inner:
        yield from _stepping(each, given, depth - 1)


def _wrapped(wrapper: Any) -> Sequence[Any]:
    """Returns what a wrapper without hooks calls its optimizer, or else the several optimizers that it holds.

    A single one under another name may be moved further by a wrapper that nobody can follow.
    """
    if any(family.is_named(wrapper) for family in (Lookahead, ScheduleFree)):
        return []
    inner, held = getattr(wrapper, "optimizer", None), _held(wrapper)
    return [inner] if inner is not None and inner is not wrapper else held if len(held) > 1 else []


def _contained(container: torch.optim.Optimizer) -> Sequence[torch.optim.Optimizer]:
    """Returns the optimizers that step for a container; none if it is no container.

    A container holds no parameters but theirs. It has two or more, or keeps them in a list. A single one under a name
    of its own belongs to a wrapper, such as Lookahead, whose step does more than to call that of the other.
    """
    held = _held(container)
    listed = any(not isinstance(value, torch.optim.Optimizer) and _among(value) for value in vars(container).values())
    inside = {id(p) for optimizer in held for p in moved_by(optimizer)}
    own = {id(p) for p in moved_by(container)}
    return held if (len(held) > 1 or listed) and own <= inside else []


def _held(holder: Any) -> list[torch.optim.Optimizer]:
    found = [optimizer for value in getattr(holder, "__dict__", {}).values() for optimizer in _among(value)]
    return list({id(optimizer): optimizer for optimizer in found}.values())


def _among(value: Any) -> list[torch.optim.Optimizer]:
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else [value]
    return [each for each in values if isinstance(each, torch.optim.Optimizer)]
