"""Register: the optimizers of a loop, their parameters, and the tensors that are gradients of those."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from smoothdiag.doctor.by_hand import ByHand
from smoothdiag.doctor.gradients import Held, Owner, address, addresses, is_part, is_sharded


class Register:
    """Knows who holds a parameter, and whose gradient a tensor is.

    Attributes:
        by_hand: Stands for the optimizer of a loop that has none; ``None`` if the loop has one.
        has_shards: Whether a parameter is a DTensor.
    """

    def __init__(self) -> None:
        self.by_hand: ByHand | None = None
        self.has_shards = False
        self._owners: dict[int, Owner] = {}
        self._held: dict[int, Held] = {}
        self._index: dict[tuple[int, int], Held] = {}
        self._moved: dict[Held, None] = {}

    @property
    def owners(self) -> list[Owner]:
        """All optimizers, and what stands for one."""
        return [*self._owners.values(), *([self.by_hand] if self.by_hand is not None else [])]

    @property
    def all(self) -> list[Held]:
        """All parameters of the optimizers."""
        return list(self._held.values())

    @property
    def has_optimizers(self) -> bool:
        """Whether an optimizer that was seen still exists."""
        return any(owner.parameters for owner in self._owners.values())

    def own(self, optimizer: torch.optim.Optimizer) -> Owner:
        """Returns the owner that stands for an optimizer; its parameters belong to that owner from now on."""
        owner = self.owner(optimizer)
        if owner is None:
            self.by_hand = None
            self._owners = {key: each for key, each in self._owners.items() if each.parameters}
            self._held = {key: each for key, each in self._held.items() if each.parameter() is not None}
            owner = self._owners[id(optimizer)] = Owner(optimizer)
        for p in owner.parameters:
            known = self._held.get(id(p))
            if known is None or known.parameter() is not p:
                known = self._held[id(p)] = Held(p, owner)
                self.has_shards = self.has_shards or is_sharded(p)
            known.owner = owner
        return owner

    def owner(self, optimizer: torch.optim.Optimizer) -> Owner | None:
        """Returns the owner that stands for an optimizer, if there is one."""
        owner = self._owners.get(id(optimizer))
        return owner if owner is not None and owner.is_of(optimizer) else None

    def held(self, parameters: Iterable[Tensor]) -> list[Held]:
        """Returns the parameters that a known optimizer holds."""
        found = ((p, self._held.get(id(p))) for p in parameters)
        return [each for p, each in found if each is not None and each.parameter() is p]

    def own_by_hand(self, parameters: Iterable[Tensor], owner: Owner) -> None:
        """Takes over the parameters of a loop without an optimizer."""
        for p in parameters:
            known = self._held.get(id(p))
            if known is None or known.parameter() is not p:
                self._held[id(p)] = Held(p, owner)

    def moved(self, held: Iterable[Held]) -> None:
        """Records that the gradients of these parameters may lie elsewhere now."""
        self._moved |= dict.fromkeys(held)

    def find(self, tensors: Iterable[Any], *, in_backward: bool) -> list[tuple[Held, bool]]:
        """Returns the parameters whose gradients these tensors are, and whether each tensor is one rank's shard."""
        if not self._held:
            return []
        if self._moved:
            self._index |= addresses(self._moved)
            self._moved = {}
        found = []
        for tensor in tensors:
            where = address(tensor)
            if where is None:
                continue
            held = self._index.get(where)
            if (held is None or held.address != where) and in_backward:  # gradients come one by one
                held = next((each for each in self._held.values() if each.address == where), None)
            if held is not None and held.address == where:
                found.append((held, is_part(held.gradient) and not is_sharded(tensor)))
        return found
