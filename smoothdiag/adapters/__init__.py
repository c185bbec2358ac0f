"""Adapters: what the library knows about the optimizers of others. One file describes one family.

To add a family, write a file with a class that derives from `Unknown`, and name the class in ``FAMILIES``.
"""

import torch

from smoothdiag.adapters.adam import Adam
from smoothdiag.adapters.adaptive import Adagrad, RmsProp
from smoothdiag.adapters.line_search import LineSearch
from smoothdiag.adapters.lookahead import Lookahead
from smoothdiag.adapters.muon import Muon
from smoothdiag.adapters.protocol import UNKNOWN, Adapter, Group, StabilityLimit, Way
from smoothdiag.adapters.rate_free import RateFree
from smoothdiag.adapters.sam import Sam
from smoothdiag.adapters.schedule_free import ScheduleFree
from smoothdiag.adapters.sgd import AveragedSgd, Sgd
from smoothdiag.adapters.unknown import Unknown

__all__ = ["UNKNOWN", "Adapter", "Group", "StabilityLimit", "Way", "adapter_of"]

FAMILIES: tuple[type[Unknown], ...] = (
    *(LineSearch, Sgd, AveragedSgd, RateFree, ScheduleFree, Lookahead, Sam, Muon),
    *(Adam, RmsProp, Adagrad, Unknown),
)
"""The first family that matches answers. Families that AutoClip refuses come first: they may derive from others."""


def adapter_of(optimizer: torch.optim.Optimizer) -> Adapter:
    """Returns the adapter of an optimizer, or the optimizer itself if it answers the questions of `Adapter`."""
    if isinstance(optimizer, Adapter):
        return optimizer
    return next(family(optimizer) for family in FAMILIES if family.matches(optimizer))
