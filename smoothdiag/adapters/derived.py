"""Families that are known by a name or an option, while their class may derive from an adaptive optimizer of torch."""

from collections.abc import Sequence

from torch import Tensor

from smoothdiag.adapters.adam import Adam
from smoothdiag.adapters.adaptive import Adagrad, Adaptive, RmsProp
from smoothdiag.adapters.protocol import UNKNOWN
from smoothdiag.adapters.unknown import Unknown

_PARENTS: tuple[type[Adaptive], ...] = (Adam, RmsProp, Adagrad)


class Derived(Unknown):
    """What such families have in common: if the class derives from Adam, say, it divides by the same diagonal."""

    def preconditioner(self, parameters: Sequence[Tensor]) -> list[Tensor] | None:
        """Returns the diagonal of the parent; ``None`` where there is none."""
        parent = self._parent()
        return parent.preconditioner(parameters) if parent else None

    def stability_limit(self, parameters: Sequence[Tensor]) -> tuple[float, bool]:
        """Returns the limit of the parent, where its step is taken as it is."""
        parent = self._parent()
        return parent.stability_limit(parameters) if parent else UNKNOWN

    def _parent(self) -> Adaptive | None:
        return next((parent(self.optimizer) for parent in _PARENTS if parent.matches(self.optimizer)), None)
