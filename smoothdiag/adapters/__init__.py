"""Adapters: what the library knows about the optimizers of others. One file describes one family.

To add a family, write a file with a class that derives from `Unknown`, and name the class in ``FAMILIES``.
"""

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from smoothdiag.adapters.adam import Adam, NAdam
from smoothdiag.adapters.adaptive import Adagrad, RmsProp
from smoothdiag.adapters.joint import Joint, finish, members, moved_by, name_of, parameter_names
from smoothdiag.adapters.line_search import LineSearch
from smoothdiag.adapters.lookahead import Lookahead
from smoothdiag.adapters.muon import Muon
from smoothdiag.adapters.protocol import UNKNOWN, Adapter, Ball, Group, StabilityLimit, Way, weight_decay
from smoothdiag.adapters.rate_free import RateFree
from smoothdiag.adapters.sam import Sam
from smoothdiag.adapters.schedule_free import ScheduleFree
from smoothdiag.adapters.second_moments import SecondMoments
from smoothdiag.adapters.several import Several
from smoothdiag.adapters.sgd import AveragedSgd, Sgd
from smoothdiag.adapters.sign import SignDescent
from smoothdiag.adapters.taken import stepping
from smoothdiag.adapters.unknown import Unknown
from smoothdiag.adapters.zero import Zero

__all__ = [
    "UNKNOWN",
    "Adapter",
    "Ball",
    "Group",
    "Joint",
    "StabilityLimit",
    "Way",
    "adapter_of",
    "finish",
    "members",
    "moved_by",
    "name_of",
    "parameter_names",
    "second_moments",
    "stepping",
    "unit_balls",
    "weight_decay",
]

FAMILIES: tuple[type[Unknown], ...] = (
    *(LineSearch, Sgd, AveragedSgd, RateFree, ScheduleFree, Lookahead, Sam, Muon, SignDescent),
    *(Adam, NAdam, RmsProp, Adagrad, Unknown),
)
"""The first family that matches answers. Families that AutoClip refuses come first: they may derive from others."""


def adapter_of(optimizer: torch.optim.Optimizer) -> Adapter:
    """Returns the adapter of an optimizer, or the optimizer itself if its class answers the questions of `Adapter`.

    Raises:
        ValueError: If an attribute of the optimizer hides one of the methods that answer.
    """
    if isinstance(optimizer, Joint):
        return Several(optimizer, [adapter_of(member) for member in optimizer.optimizers])
    if Zero.matches(optimizer):
        return Zero(optimizer, adapter_of(optimizer.optim))  # type: ignore[attr-defined]
    if _answers_itself(optimizer):
        return optimizer
    return next(family(optimizer) for family in FAMILIES if family.matches(optimizer))


def unit_balls(adapter: Adapter, parameters: Sequence[Tensor]) -> Sequence[Ball | None]:
    """Returns, for each parameter, the ball that an optimizer takes its steps from; ``None`` where it takes other ones.

    Such an optimizer moves a parameter by its learning rate times a minimiser of <m, x> over a ball, with an average m
    of gradients: Muon, Scion and sign descent do. The ball is a norm and a radius, so that one radius is one learning
    rate. Weight decay, and what Newton-Schulz iterations are off by, do not count.

    An optimizer that answers the questions of `Adapter` itself may leave out this one, a method ``unit_balls``.

    Source: Pethick et al. 2025 (ICML), "Training Deep Learning Models with Norm-Constrained LMOs".
    """
    ask = getattr(type(adapter), "unit_balls", None)  # the class, as for the other questions
    found: Sequence[Ball | None] = ask(adapter, parameters) if ask else [None] * len(parameters)
    return found


def second_moments(optimizer: torch.optim.Optimizer) -> SecondMoments:
    """Returns what reads the second moments of an optimizer.

    Raises:
        ValueError: If it keeps none.
    """
    return SecondMoments(optimizer, [adapter_of(member) for member in members(optimizer)])


def _answers_itself(optimizer: torch.optim.Optimizer) -> TypeGuard[Adapter]:
    # The class is asked: a wrapper that passes unknown attributes on to what it wraps would answer in its place.
    if not all(hasattr(type(optimizer), name) for name in _QUESTIONS):
        return False
    for name in _QUESTIONS & vars(optimizer).keys():
        if callable(getattr(type(optimizer), name)) and not callable(found := vars(optimizer)[name]):
            raise ValueError(
                f"Parameter `optimizer` should keep its method `{name}`, which measuring and clipping call: give the "
                f"attribute of that name another one. Found `{name} = {found!r}` in {type(optimizer).__name__}."
            )
    return True


_QUESTIONS = frozenset(name for name in vars(Adapter) if not name.startswith("_"))
