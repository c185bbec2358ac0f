"""Sharpness-aware minimisation: a wrapper that takes the gradient at a point uphill of where the step begins."""

import torch

from smoothdiag.adapters.derived import Derived


class Sam(Derived):
    """What is known of SAM: the optimizer that it wraps takes the steps.

    AutoClip refuses SAM in the first step, when it sees that the closure is evaluated where the step did not begin.

    Source: Foret, Kleiner, Mobahi, Neyshabur 2021 (ICLR), *Sharpness-aware minimization*.
    """

    @staticmethod
    def matches(optimizer: torch.optim.Optimizer) -> bool:
        """Returns whether it steps by another optimizer, and is called so."""
        held = getattr(optimizer, "base_optimizer", None)
        return type(optimizer).__name__.lower().endswith("sam") and isinstance(held, torch.optim.Optimizer)

    def stepping(self) -> torch.optim.Optimizer:
        """Returns the optimizer that it wraps."""
        wrapped: torch.optim.Optimizer = self.optimizer.base_optimizer
        return wrapped
