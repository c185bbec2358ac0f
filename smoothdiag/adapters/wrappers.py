"""Optimizers that wrap other optimizers, and factors that wrappers leave in gradients."""

import torch


def innermost(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Returns the optimizer at the end of a chain of wrappers that call what they wrap ``optimizer``."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


def wrapped_in(optimizer: torch.optim.Optimizer) -> dict[str, torch.optim.Optimizer]:
    """Returns the optimizers that another one holds, by the name of the attribute."""
    return {name: value for name, value in vars(optimizer).items() if isinstance(value, torch.optim.Optimizer)}


def pending_scale(optimizer: torch.optim.Optimizer) -> torch.Tensor | None:
    """Returns the factor of a GradScaler that a fused optimizer takes out of the gradients in its step, if any."""
    factor: torch.Tensor | None = getattr(optimizer, "grad_scale", None)
    return factor
