"""Sharpness-aware minimisation: a wrapper that takes the gradient uphill from the point where the step begins."""

import torch

from smoothdiag.adapters.derived import Derived


class Sam(Derived):
    """Describes SAM: the optimizer that SAM wraps takes the steps, so probe and AutoClip follow that one.

    Source: Foret, Kleiner, Mobahi, Neyshabur 2021 (ICLR), *Sharpness-aware minimization*.
    """

    @staticmethod
    def matches(optimizer: torch.optim.Optimizer) -> bool:
        """Returns whether it has a ``first_step``, or is called SAM, and holds another optimizer for its steps."""
        held = getattr(optimizer, "base_optimizer", None)
        climbs = hasattr(optimizer, "first_step") or type(optimizer).__name__.lower().endswith("sam")
        return climbs and isinstance(held, torch.optim.Optimizer)

    def stepping(self) -> torch.optim.Optimizer:
        """Returns the optimizer that it wraps."""
        wrapped: torch.optim.Optimizer = self.optimizer.base_optimizer
        return wrapped
