"""Sign methods: every entry moves by the learning rate, whatever the size of the gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor

from smoothdiag.adapters.derived import Derived
from smoothdiag.adapters.protocol import Ball
from smoothdiag.adapters.unknown import is_of_torch
from smoothdiag.geometry import Sign


class SignDescent(Derived):
    """Describes Lion and its kin, whose steps are the learning rate times the sign of an average of gradients.

    Source: Bernstein et al. 2018, *signSGD*; Chen et al. 2023, *Symbolic discovery of optimization algorithms*, for
    Lion.
    """

    @staticmethod
    def matches(optimizer: torch.optim.Optimizer) -> bool:
        """Returns whether the class has the name of such a method: packages have them, torch has none."""
        return type(optimizer).__name__.lower() in ("lion", "signsgd", "signum") and not is_of_torch(optimizer)

    def unit_balls(self, parameters: Sequence[Tensor]) -> Sequence[Ball | None]:
        """Returns the ball of the largest absolute entry, of radius 1."""
        return [(Sign(), 1.0) if self.group_of(p) else None for p in parameters]
