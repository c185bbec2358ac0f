"""Updates: stretches of what an optimizer keeps, from which adapters work out its last update after it has moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from smoothdiag import vectors

LEAST_LEFT = 2**-10
"""Weight decay must leave this share of x in a step, or else too few digits of x are left to work the step out."""


@dataclass(frozen=True, eq=False)
class Stretch(Mapping[str, Tensor]):
    """Some numbers of parameters of one group that have seen the same number of steps, as flat tensors.

    It is a mapping of what the optimizer keeps for each of these numbers. The tensors may be views, so write to none.

    Args:
        owners: The parameters: of one dtype and device, and not sharded unless there is one alone.
        states: What the optimizer keeps for each of them.
        part: Which numbers of the parameter, if there is one alone; ``None`` for all.
    """

    owners: Sequence[Tensor]
    states: Sequence[Mapping[str, Any]]
    part: slice | None = None

    def __getitem__(self, entry: str) -> Tensor:
        return self.flat([state[entry] for state in self.states])

    def __iter__(self) -> Iterator[str]:
        return iter(self.states[0])

    def __len__(self) -> int:
        return len(self.states[0])

    def scalar(self, entry: str) -> Any:
        """Returns what the optimizer keeps alike for all of these numbers, as `number` does."""
        return number(self.states[0][entry])

    @property
    def parameter(self) -> Tensor:
        """Where the parameters are: after the step."""
        return self.flat(self.owners)

    @property
    def gradient(self) -> Tensor:
        """The gradient; a KeyError if a hook after the step has removed it."""
        found = [p.grad for p in self.owners if p.grad is not None]
        if len(found) < len(self.owners):
            raise KeyError("grad")
        return self.flat(found)

    def flat(self, tensors: Sequence[Tensor]) -> Tensor:
        """Returns these numbers of one tensor for each parameter, as a view where they lie in one piece."""
        if len(tensors) == 1:
            flat: Tensor = vectors.local(tensors[0]).reshape(-1)
            return flat if self.part is None else flat[self.part]
        return torch.cat(list(tensors)) if self._are_flat else vectors.joined(tensors)

    @cached_property
    def _are_flat(self) -> bool:
        return all(p.dim() == 1 for p in self.owners)

    def add_(self, change: Tensor, weight: float = 1.0) -> None:
        """Adds ``weight`` times a flat tensor to the parameters, in place."""
        held = [vectors.local(p) for p in self.owners]
        if len(held) > 1:
            parts = torch.split(change, [p.numel() for p in held])
            shaped = parts if self._are_flat else [d.view(p.shape) for d, p in zip(parts, held, strict=True)]
            torch._foreach_add_(held, shaped, alpha=weight)
        elif self.part is None:
            held[0].add_(change.view(held[0].shape), alpha=weight)
        else:
            held[0].view(-1)[self.part].add_(change, alpha=weight)


@dataclass(frozen=True, eq=False)
class Update:
    """The last update of a stretch: u = factor * direction.

    Attributes:
        direction: A new flat tensor.
        factor: A number, or a 0-dim tensor on a device that nobody should wait for.
    """

    direction: Tensor
    factor: float | Tensor


@dataclass(frozen=True)
class Formula:
    """How the last update of a group follows from what the optimizer keeps.

    Attributes:
        last: Returns the last update of a stretch.
        most: Returns a number that the squared length of that update does not exceed but for rounding, or NaN. It is
            close, and on a CPU it costs half as much. It waits for a device; ``None`` if there is no such shortcut.
    """

    last: Callable[[Stretch], Update]
    most: Callable[[Stretch], float] | None = None


def number(value: Any) -> Any:
    """Returns a float, or a tensor unchanged if a device holds it, which nobody should wait for."""
    if isinstance(value, Tensor):
        return float(value) if value.device.type == "cpu" else value.detach()
    return float(value)


def leaves_enough(group: Mapping[str, Any]) -> bool:
    """Returns whether decoupled weight decay leaves enough of x to work out x from where it is after the step."""
    left = 1 - number(group["lr"]) * number(group["weight_decay"])
    return not isinstance(left, Tensor) and abs(left) >= LEAST_LEFT


def plus(direction: Tensor, x: Tensor, weight: float | Tensor) -> None:
    """Adds weight * x to a direction, in place."""
    if isinstance(weight, Tensor):
        direction.add_(x * weight)
    else:
        direction.add_(x, alpha=weight)
