"""By hand: loops that write to their parameters themselves, without an optimizer of PyTorch."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import Tensor

from smoothdiag.doctor.gradients import Mark, Owner
from smoothdiag.doctor.sites import NOWHERE

_NODES: Final = 20_000
"""Largest number of nodes of a graph to search for parameters."""
_COPIED: Final = 3
"""How many parameters are copied, the smallest ones, to see whether something has written to them."""


class ByHand(Owner):
    """Stands for the optimizer that a loop without an optimizer writes out.

    No call tells of such an update. It shows because parameters differ from what they were at the latest backward pass
    or clip. Writes through ``.data`` move no version counter, so a few of the smallest parameters are copied.
    """

    def __init__(self) -> None:
        super().__init__(None)
        self._mine: dict[int, weakref.ref[Tensor]] = {}
        self._copies: list[tuple[weakref.ref[Tensor], Tensor, Mark]] = []

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that were seen in backward passes or clips."""
        return [p for ref in self._mine.values() if (p := ref()) is not None]

    def add(self, tensors: Iterable[Tensor]) -> bool:
        """Takes over parameters; returns whether they replace those before, which a functional update leaves behind."""
        found = [p for p in tensors if p.is_leaf and p.requires_grad]
        earlier = {key: p for key, ref in self._mine.items() if (p := ref()) is not None}
        old = [id(p) for p in found if earlier.get(id(p)) is p]
        is_new = bool(found) and not old and bool(self._mine)
        if is_new:
            self._mine, self._copies = {}, []
        self._mine |= {id(p): weakref.ref(p) for p in found}
        return is_new

    def copy(self) -> None:
        """Remembers what some parameters with a gradient hold now."""
        there = [p for p in self.parameters if p.grad is not None and p.numel() and p.layout == torch.strided]
        there = sorted((p for p in there if type(p) in (Tensor, torch.nn.Parameter)), key=Tensor.numel)[:_COPIED]
        self._copies = [(weakref.ref(p), p.detach().clone(), Mark(p.grad, NOWHERE)) for p in there]

    def renew(self) -> None:
        """Marks the gradients after a clip."""
        for ref, _, mark in self._copies:
            if (p := ref()) is not None:
                mark.renew(p.grad)

    def has_moved(self) -> bool:
        """Returns whether something has written to the parameters since they were copied."""
        pairs = ((ref(), copy) for ref, copy, _ in self._copies)
        return any(p is not None and not _same(p.detach(), copy) for p, copy in pairs)

    def has_old_gradients(self) -> bool:
        """Returns whether the gradients are still those of the moment of copying."""
        return any((p := ref()) is not None and mark.holds(p.grad) for ref, _, mark in self._copies)


def leaves(losses: Any) -> list[Tensor]:
    """Returns the parameters at the ends of the graphs that ``backward`` is about to walk."""
    several = [losses] if isinstance(losses, Tensor) else list(losses)
    nodes = [node for each in several if (node := getattr(each, "grad_fn", None)) is not None]
    seen, found = set(nodes), []
    while nodes and len(seen) < _NODES:
        node = nodes.pop()
        if (variable := getattr(node, "variable", None)) is not None:
            found.append(variable)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    return found


def _same(now: Tensor, before: Tensor) -> bool:
    if now.shape != before.shape or now.device != before.device or now.dtype != before.dtype:
        return False
    return bool(((now == before) | ((now != now) & (before != before))).all())
