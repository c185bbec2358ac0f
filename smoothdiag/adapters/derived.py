"""Families that are known by a name or an option, while their class may derive from an adaptive optimizer of torch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from smoothdiag.adapters.adam import Adam
from smoothdiag.adapters.adaptive import Adagrad, Adaptive, RmsProp
from smoothdiag.adapters.protocol import UNKNOWN, Limits
from smoothdiag.adapters.unknown import Unknown, first_options, is_of_torch, keeps_iterate

_PARENTS: tuple[type[Adaptive], ...] = (Adam, RmsProp, Adagrad)


class Derived(Unknown):
    """What such families have in common: if the class derives from Adam, say, it divides by the same diagonal."""

    def preconditioner(self, parameters: Sequence[Tensor]) -> Sequence[Tensor] | None:
        """Returns the diagonal of the parent; ``None`` where there is none."""
        parent = self._parent()
        return parent.preconditioner(parameters) if parent else None

    def stability_limit(self, parameters: Sequence[Tensor]) -> Limits:
        """Returns the limit of the parent, where its step is taken as it is."""
        parent = self._parent()
        return parent.stability_limit(parameters) if parent else UNKNOWN

    def _parent(self) -> Adaptive | None:
        return next((parent(self.optimizer) for parent in _PARENTS if parent.matches(self.optimizer)), None)


class KeepsIterate(Derived):
    """Describes families that keep a copy of the parameters, which shortened updates would spoil.

    Attributes:
        name: Part of the name of such a class, in small letters without underscores.
        options: Options of groups that such a class has.
    """

    name: str
    options: frozenset[str]

    @classmethod
    def matches(cls, optimizer: torch.optim.Optimizer) -> bool:
        """Returns whether the name of the class or an option says so."""
        return not is_of_torch(optimizer) and (cls.is_named(optimizer) or bool(cls.options & first_options(optimizer)))

    @classmethod
    def is_named(cls, optimizer: object) -> bool:
        """Returns whether the name of the class says so."""
        return cls.name in type(optimizer).__name__.lower().replace("_", "")

    def refusal(self) -> str:
        """Returns the refusal: the optimizer keeps a copy of the parameters."""
        name, options = type(self.optimizer).__name__, self.options & first_options(self.optimizer)
        return keeps_iterate(f"{name}, whose groups have `{min(options)}`" if options else name)
