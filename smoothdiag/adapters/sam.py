"""Sharpness-aware minimisation: a wrapper that takes its gradient some way uphill of where the step begins."""

import torch

from smoothdiag.adapters.unknown import Unknown


class Sam(Unknown):
    """What is known of SAM: the optimizer that it wraps steps, from where the parameters were.

    AutoClip refuses it when the closure of the first step is evaluated elsewhere than where the step began.

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
