"""Given: the call that clips, and what it was handed in place of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

from smoothdiag.doctor.gradients import Held, address
from smoothdiag.doctor.sites import Site

GRADIENTS: Final = "it was given gradients where it takes the parameters that hold them"
COPIES: Final = (
    "it was given tensors that share the memory of the parameters and hold no gradients, as .data, detach() and "
    "state_dict() return them"
)


@dataclass(frozen=True)
class Call:
    """A call that clips.

    Attributes:
        site: Its line.
        returns_norm: Whether it returns the norm from before the clip and the caller uses that norm.
        is_after_step: Whether a hook makes it that an optimizer calls after its step.
        is_used_up: Whether it was given a used-up generator of parameters.
        limit: The threshold; ``None`` if it has none.
        by_value: Whether the threshold is one for single entries.
        norm_type: The kind of norm.
        total_norm: The norm that was passed to it; ``None`` if none was.
    """

    site: Site
    returns_norm: bool = False
    is_after_step: bool = False
    is_used_up: bool = False
    limit: float | None = None
    by_value: bool = False
    norm_type: float = 2.0
    total_norm: Any = None


def mistaken(tensors: Sequence[Any], held: Iterable[Held]) -> str:
    """Returns what these tensors without gradients are, if they belong to known parameters; empty if they do not."""
    wheres = {where for each in tensors if (where := address(each)) is not None}
    if not wheres:
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
