"""Sharpness-aware minimisation: a wrapper that takes the gradient uphill from the point where the step begins."""

import torch

from smoothdiag.adapters.derived import Derived


class Sam(Derived):
    """Describes SAM: the optimizer that SAM wraps takes the steps.

    AutoClip refuses SAM in the first step, when SAM evaluates the closure at another point than the beginning of the
    step.

    Source: Foret, Kleiner, Mobahi, Neyshabur 2021 (ICLR), *Sharpness-aware minimization*.
    """

    @staticmethod
    def matches(optimizer: torch.optim.Optimizer) -> bool:
        """Returns whether the name of the class ends in SAM and the optimizer holds another optimizer for its steps."""
        held = getattr(optimizer, "base_optimizer", None)
        return type(optimizer).__name__.lower().endswith("sam") and isinstance(held, torch.optim.Optimizer)

    def stepping(self) -> torch.optim.Optimizer:
        """Returns the optimizer that it wraps."""
        wrapped: torch.optim.Optimizer = self.optimizer.base_optimizer
        return wrapped
