"""Closures that AutoClip can follow: evaluated once, before the optimizer has moved."""

from collections.abc import Callable
from typing import Any

import torch

from smoothdiag.measure.closures import Arguments, after_closure


def after_gradient(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any], act: Callable[[], None]
) -> Arguments | None:
    """Returns the arguments of a step whose closure is followed by ``act``; None if it has no closure.

    Raises:
        ValueError: If the optimizer is known to evaluate its closure more than once. Of others it shows at the second
            evaluation, which raises a RuntimeError.
    """
    changed = after_closure(args, kwargs, act, again=_refuse)
    if changed is not None and isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "Parameter `optimizer` should evaluate its closure once in a step: AutoClip acts on one gradient. "
            "Found LBFGS."
        )
    return changed


def check_begun(optimizer: torch.optim.Optimizer, *, has_begun: bool) -> None:
    """Raises a RuntimeError if a step has ended without a gradient that AutoClip could have acted on."""
    if not has_begun:
        raise RuntimeError(
            f"The closure of a step should be evaluated: AutoClip acts after it. Found that {type(optimizer).__name__} "
            "did not. Call backward before the step instead, and step without a closure."
        )


def _refuse() -> None:
    raise RuntimeError(
        "The closure of a step should be evaluated once: AutoClip acts on one gradient. Found a second evaluation."
    )
