"""The largest curvature at which an optimizer is stable on a quadratic, at its present learning rate."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Group = Mapping[str, Any]
States = Sequence[Mapping[str, Any]]


class StabilityLimit(NamedTuple):
    """A curvature, and the norm that it is to be taken in.

    Attributes:
        curvature: Largest eigenvalue [f/x^2] at which the optimizer does not diverge on a quadratic; NaN where there
            is no such number or it is not known.
        preconditioned: Whether the eigenvalues are those of P^-1/2 H P^-1/2, with the P of
            `smoothdiag.measure.preconditioner`, and not those of the Hessian H itself.
    """

    curvature: float
    preconditioned: bool


UNKNOWN = StabilityLimit(math.nan, preconditioned=False)


def stability_limit(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> StabilityLimit:
    """Returns the limit of stability that holds for all of ``parameters``.

    With learning rate lr and momentum b, on a quadratic and where nothing is clipped:

    ========================================  =====================================
    SGD without momentum, Adagrad             2 / lr
    SGD with dampening d, RMSprop (d = 0)     (2 + 2b) / ((1 - d) lr)
    SGD with Nesterov's momentum              (2 + 2b) / ((1 + 2b) lr)
    ClippedMomentum                           (2 / lr) / (1 - nu + nu (1 - b) / (1 + b))
    Adam, AdamW with beta1 = b                (2 / lr) (1 + b) / (1 - b)
    ========================================  =====================================

    Adaptive optimizers are taken with P held fixed and past their first steps; Adagrad at the decayed rate of its last
    step, ClippedMomentum with ``bias_correction`` past the correction. Weight decay w in the gradient adds to the
    curvature: the limit of SGD and ClippedMomentum is less by w, and for adaptive optimizers, which divide it by P,
    there is no one limit. Decoupled weight decay (AdamW, ClippedMomentum) makes 2 / lr into 2 / lr - w.

    NaN where groups have different limits, for ``maximize``, momentum of 1 or more, ``clip="normalize"``, and
    optimizers that are not known, such as GGNC, ClippedScion and GradientDescent. A subclass with a ``step`` of its own
    is not known. ClippedMomentum is known by the options of its groups, so that measuring need not import it: ``lr``,
    ``momentum``, ``nu``, ``threshold``, ``weight_decay`` and ``maximize``.

    Args:
        optimizer: The optimizer, after the step in question.
        parameters: Parameters that it moves; groups that hold none of them do not count.

    Source: Cohen et al. 2021, *Gradient descent on neural networks typically occurs at the edge of stability*, for
    SGD; Cohen et al. 2022, *Adaptive gradient methods at the edge of stability*, for Adam. All follow from the
    eigenvalue -1 of the recurrence; tests/adapters/test_stability.py has spectral radii and real steps.
    """
    rule, preconditioned = _rule(optimizer)
    if rule is None:
        return UNKNOWN
    counted, limits = set(parameters), set()
    for group in optimizer.param_groups:
        if held := [p for p in group["params"] if p in counted]:
            is_known = not group["maximize"] and float(group.get("momentum", 0)) < 1
            limits.add(rule(group, [optimizer.state.get(p, {}) for p in held]) if is_known else math.nan)
    return StabilityLimit(limits.pop() if len(limits) == 1 else math.nan, preconditioned)


def _sgd(group: Group, states: States) -> float:
    momentum, weight = float(group["momentum"]), 1.0
    if momentum != 0:  # without it dampening does nothing
        weight = 1 + 2 * momentum if group["nesterov"] else 1 - float(group["dampening"])
    return _two_over(weight * float(group["lr"])) * (1 + momentum) - float(group["weight_decay"])


def _clipped_momentum(group: Group, states: States) -> float:
    if group.get("clip") == "normalize":  # steps of one length never settle, whatever the curvature
        return math.nan
    momentum, nu, decay = float(group["momentum"]), float(group["nu"]), float(group["weight_decay"])
    gain, limit = 1 - nu + nu * (1 - momentum) / (1 + momentum), _two_over(float(group["lr"]))
    return (limit - decay) / gain if group.get("decoupled_weight_decay", True) else limit / gain - decay


def _adamw(group: Group, states: States) -> float:
    momentum = float(group["betas"][0])
    return (_two_over(float(group["lr"])) - float(group["weight_decay"])) * (1 + momentum) / (1 - momentum)


def _adam(group: Group, states: States) -> float:
    return _adamw(group, states) if group.get("decoupled_weight_decay") or not group["weight_decay"] else math.nan


def _rmsprop(group: Group, states: States) -> float:
    return _two_over(float(group["lr"])) * (1 + float(group["momentum"])) if not group["weight_decay"] else math.nan


def _adagrad(group: Group, states: States) -> float:
    if group["weight_decay"]:
        return math.nan
    rate, decay = float(group["lr"]), float(group["lr_decay"])
    if decay == 0:
        return _two_over(rate)
    limits = {_two_over(rate / (1 + max(float(state.get("step", 0)) - 1, 0) * decay)) for state in states}
    return limits.pop() if len(limits) == 1 else math.nan


def _two_over(lr: float) -> float:
    """Returns 2 / lr: no curvature is too large for a rate of 0, and none is known to be for a negative one."""
    return 2 / lr if lr > 0 else math.inf if lr == 0 else math.nan


def _rule(optimizer: torch.optim.Optimizer) -> tuple[Callable[[Group, States], float] | None, bool]:
    """Returns the rule for an optimizer, and whether it is about preconditioned curvature."""
    if all(group.keys() >= _CLIPPED_MOMENTUM for group in optimizer.param_groups):
        return _clipped_momentum, False
    # Optimizers wrap the step of their class, and note what they have wrapped.
    step = inspect.unwrap(type(optimizer).step)
    for kind, rule, preconditioned in _RULES:
        if isinstance(optimizer, kind) and step is inspect.unwrap(kind.step):
            return rule, preconditioned
    return None, False


_CLIPPED_MOMENTUM = {"lr", "momentum", "nu", "threshold", "weight_decay", "maximize"}
_RULES = (
    (torch.optim.SGD, _sgd, False),
    (torch.optim.AdamW, _adamw, True),
    (torch.optim.Adam, _adam, True),
    (torch.optim.RMSprop, _rmsprop, True),
    (torch.optim.Adagrad, _adagrad, True),
)
