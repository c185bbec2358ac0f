"""Stochastic gradient descent with momentum and its relatives."""

from collections.abc import Sequence

import torch
from torch import Tensor

from smoothdiag.adapters import limits
from smoothdiag.adapters.protocol import UNKNOWN, Group, Limits, StabilityLimit, State, Way
from smoothdiag.adapters.unknown import Unknown, has_step_of, keeps_iterate
from smoothdiag.momentum import gain, shortening


class Sgd(Unknown):
    """Describes `torch.optim.SGD`, whose momentum adds gradients up, so AutoClip may clip the gradients."""

    way: Way = "gradients"

    @staticmethod
    def matches(optimizer: torch.optim.Optimizer) -> bool:
        """Returns whether the optimizer is SGD, or of a subclass of it."""
        return isinstance(optimizer, torch.optim.SGD)

    @property
    def follows_gradients(self) -> bool:  # type: ignore[override]
        """Whether the optimizer takes the steps of torch's SGD."""
        return has_step_of(self.optimizer, torch.optim.SGD)

    def momentum(self, group: Group) -> float:
        """Returns the momentum."""
        return float(group.get("momentum", 0.0))

    def gain(self, group: Group) -> float:
        """Returns (1 - dampening) / (1 - momentum), or 1 without momentum."""
        return gain(self.momentum(group), float(group.get("dampening", 0.0)))

    def shortening(self, group: Group) -> float:
        """Returns sqrt((1 - momentum) / (1 + momentum))."""
        return shortening(self.momentum(group))

    def stability_limit(self, parameters: Sequence[Tensor]) -> Limits:
        """Returns (2 + 2b) / ((1 - d) lr) - w, or (2 + 2b) / ((1 + 2b) lr) - w with Nesterov's momentum.

        For small batches it is (2 - 2b) / ((1 - d) lr) - w, and (2 - 2b) / lr - w with Nesterov's momentum.
        """
        if not self.follows_gradients:
            return UNKNOWN
        curvature, small_batch = limits.common(self.optimizer, parameters, _limits)
        return StabilityLimit(curvature, preconditioned=False, small_batch=small_batch)

    def refusal(self) -> str:
        """Returns no refusal, because AutoClip shortens the gradients and not the update."""
        return ""

    def late_refusal(self, moved: float | Tensor) -> str | None:
        """Returns no refusal."""
        return ""


class AveragedSgd(Unknown):
    """Describes `torch.optim.ASGD`: the model is evaluated at an average of the parameters, which the state keeps."""

    @staticmethod
    def matches(optimizer: torch.optim.Optimizer) -> bool:
        """Returns whether the optimizer is ASGD, or of a subclass of it."""
        return isinstance(optimizer, torch.optim.ASGD)

    def evaluated(self, parameter: Tensor) -> Tensor:
        """Returns the average."""
        average: Tensor = self.state_of(parameter).get("ax", parameter)
        return average

    def refusal(self) -> str:
        """Returns the refusal: ASGD keeps a copy of the parameters."""
        return keeps_iterate(type(self.optimizer).__name__)


def _limits(group: Group, states: Sequence[State]) -> limits.Pair:
    momentum, lr, decay = float(group["momentum"]), float(group["lr"]), float(group["weight_decay"])
    # Without momentum dampening does nothing. Nesterov's momentum refuses it.
    given = 1 - float(group["dampening"]) if momentum != 0 else 1.0
    weight = 1 + 2 * momentum if momentum != 0 and group["nesterov"] else given
    full, small = limits.two_over(weight * lr) * (1 + momentum), limits.two_over(given * lr) * (1 - momentum)
    return full - decay, small - decay
