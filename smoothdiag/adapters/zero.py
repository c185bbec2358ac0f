"""ZeRO: an optimizer whose state the ranks share out among them, each for some of the parameters."""

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from smoothdiag.adapters.protocol import Adapter, Ball, Group, Way
from smoothdiag.adapters.unknown import Unknown


class Zero(Unknown):
    """Describes `torch.distributed.optim.ZeroRedundancyOptimizer`.

    Every rank has all gradients, steps with its part of the parameters, and fetches the rest within the same step. So
    AutoClip acts as it does on the optimizer inside, without what needs the state of all parameters: P, the limit of
    stability, and the last update.

    Source: Rajbhandari, Rasley, Ruwase, He 2020 (SC), *ZeRO: memory optimizations*, stage 1.

    Args:
        optimizer: The optimizer.
        inner: What is known of the optimizer that this rank steps with.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, inner: Adapter) -> None:
        super().__init__(optimizer)
        self.inner = inner

    @staticmethod
    def matches(optimizer: torch.optim.Optimizer) -> bool:
        """Returns whether it is a `ZeroRedundancyOptimizer` that holds the optimizer of this rank."""
        return is_zero(optimizer) and isinstance(getattr(optimizer, "optim", None), torch.optim.Optimizer)

    @property
    def way(self) -> Way:  # type: ignore[override]
        """What AutoClip may shorten; the update where the optimizer inside clips, which knows its part alone."""
        return "updates" if self.inner.way == "cap" else self.inner.way

    @property
    def follows_gradients(self) -> bool:  # type: ignore[override]
        """Whether the optimizer inside does."""
        return self.inner.follows_gradients

    def momentum(self, group: Group) -> float:
        """Returns the momentum of the optimizer inside."""
        return self.inner.momentum(group)

    def gain(self, group: Group) -> float:
        """Returns the gain of the optimizer inside."""
        return self.inner.gain(group)

    def shortening(self, group: Group) -> float:
        """Returns the shortening of the optimizer inside."""
        return self.inner.shortening(group)

    def unit_balls(self, parameters: Sequence[Tensor]) -> Sequence[Ball | None]:
        """Returns the balls of the optimizer inside, for the parameters of all ranks."""
        if not isinstance(self.inner, Unknown):
            return super().unit_balls(parameters)
        # They follow from groups, and the groups here hold the parameters of all ranks.
        return type(self.inner)(self.optimizer).unit_balls(parameters)

    def refusal(self) -> str:
        """Returns the refusal of the optimizer inside."""
        return self.inner.refusal()

    def late_refusal(self, moved: float | Tensor) -> str | None:
        """Returns the refusal of the optimizer inside."""
        return self.inner.late_refusal(moved)


def is_zero(optimizer: object) -> TypeGuard[torch.optim.Optimizer]:
    """Returns whether the class is torch's `ZeroRedundancyOptimizer`, or derives from it."""
    # Importing the class would take long in runs that do without it.
    return any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__)
