"""Given: what a clip was handed in place of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from torch import Tensor

from smoothdiag.doctor.gradients import Held, address

GRADIENTS: Final = "it was given gradients where it takes the parameters that hold them"
COPIES: Final = (
    "it was given tensors that share the memory of the parameters and hold no gradients, as .data, detach() and "
    "state_dict() return them"
)


def mistaken(tensors: Sequence[Any], held: Iterable[Held]) -> str:
    """Returns what these tensors without gradients are, if they belong to known parameters; empty if they do not."""
    wheres = {where for each in tensors if (where := address(each)) is not None}
    if not wheres or any(getattr(each, "requires_grad", False) for each in tensors):
        return ""
    known = [each for each in held if (parameter := each.parameter()) is not None and address(parameter) in wheres]
    if known:
        return COPIES
    return GRADIENTS if any(each.address in wheres for each in held) else ""


def repeated(parameters: Sequence[Tensor]) -> int:
    """Returns how many parameters with a gradient come more than once."""
    seen: dict[int, int] = {}
    for p in parameters:
        if getattr(p, "grad", None) is not None:
            seen[id(p)] = seen.get(id(p), 0) + 1
    return sum(times > 1 for times in seen.values())
