"""Described: what an optimizer of this library says about itself to the probe and to AutoClip."""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from smoothdiag.geometry import LayerGeometry
from smoothdiag.momentum import shortening

Group = Mapping[str, Any]


class Described(Optimizer):
    """An optimizer that answers the questions of `smoothdiag.adapters.Adapter`; subclasses override what differs.

    Attributes:
        way: What AutoClip may shorten: ``"updates"``, or ``"cap"`` if the optimizer clips by itself.
    """

    way: Literal["updates", "cap"] = "updates"

    @property
    def follows_gradients(self) -> bool:
        """Whether a step is the learning rate times an average of gradients, clipped or not."""
        # A subclass elsewhere with a step of its own may step otherwise.
        written = [inspect.unwrap(method) for method in (type(self).step, type(self)._update)]
        return all(method.__module__.startswith("smoothdiag.") for method in written)

    def _update(self, buckets: Any) -> None:
        raise NotImplementedError

    def stepping(self) -> Optimizer:
        """Returns itself."""
        return self

    def momentum(self, group: Group) -> float:
        """Returns the weight of the past in the average of gradients, in [0, 1)."""
        return float(group.get("momentum", 0.0))

    def gain(self, group: Group) -> float:
        """Returns 1: averages of equal gradients are those gradients."""
        return 1.0

    def shortening(self, group: Group) -> float:
        """Returns the length of steps over uncorrelated gradients, as a share of the length over equal gradients."""
        return shortening(self.momentum(group))

    def update(self, group: Mapping[str, Any]) -> None:
        """Returns ``None``: the last update does not follow from the state."""

    def preconditioner(self, parameters: Sequence[Tensor]) -> Sequence[Tensor] | None:
        """Returns ``None``: nothing is divided by a diagonal."""
        return None

    def unit_balls(self, parameters: Sequence[Tensor]) -> Sequence[tuple[LayerGeometry, float] | None]:
        """Returns ``None`` for every parameter: steps are no minimisers over a ball."""
        return [None] * len(parameters)

    def stability_limit(self, parameters: Sequence[Tensor]) -> tuple[float, bool, float]:
        """Returns the largest stable curvature [f/x^2], whether it is preconditioned, and the one for small batches.

        NaN if they are not known.
        """
        return math.nan, False, math.nan

    def evaluated(self, parameter: Tensor) -> Tensor:
        """Returns the parameter."""
        return parameter

    def refusal(self) -> str:
        """Returns why AutoClip must not act on this optimizer; empty if it may."""
        return ""

    def late_refusal(self, moved: float | Tensor) -> str | None:
        """Returns the refusal as it is known after a step."""
        return ""
