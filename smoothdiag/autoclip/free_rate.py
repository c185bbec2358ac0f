"""The free rate: how large the learning rate has to be for the longest step to be what limits a run."""

from __future__ import annotations

import math
from statistics import median

import torch
from torch import Tensor

from smoothdiag.adapters import adapter_of
from smoothdiag.autoclip.calibration import FEWEST, Calibration
from smoothdiag.autoclip.rates import shared


def suggested(calibration: Calibration, optimizer: torch.optim.Optimizer, multiple: float) -> float:
    """Returns multiple * median(1/L) / gain [x^2/f]; NaN with too few measurements, or where momenta differ.

    Raises:
        ValueError: If ``multiple`` is not positive and finite.
    """
    if not 0 < multiple < math.inf:
        raise ValueError(f"Parameter `multiple` should be positive and finite. Found `multiple = {multiple!r}`.")
    if len(calibration.early) < FEWEST:
        return math.nan
    gains = float(shared([adapter_of(optimizer).gain(group) for group in optimizer.param_groups]))
    return multiple * median(m.rate for m in calibration.early) / gains


def raise_rates(optimizer: torch.optim.Optimizer, lr: float) -> bool:
    """Multiplies all rates so that the largest one is ``lr``; returns whether that raised them, else does nothing."""
    highest = max(float(group["lr"]) for group in optimizer.param_groups)
    if not lr > highest > 0:
        return False
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].mul_(lr / highest)
        else:
            group["lr"] *= lr / highest
    return True
