"""The protocol: the questions that the library asks about an optimizer."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from smoothdiag.adapters.updates import Formula
from smoothdiag.geometry import LayerGeometry

Group = Mapping[str, Any]
"""A parameter group of an optimizer."""

State = Mapping[str, Any]
"""What an optimizer keeps for one parameter."""

Ball = tuple[LayerGeometry, float]
"""The norm of one parameter, and the length in this norm of a step with a learning rate of 1."""

Way = Literal["gradients", "updates", "cap", "nothing", "mixed"]
"""What AutoClip may shorten: gradients before a step, the update after it, or the cap by which the optimizer clips.
"mixed" stands for several optimizers of which some go by their gradients and others by their updates."""


class StabilityLimit(NamedTuple):
    """Limits on curvature, and the norm in which that curvature is measured.

    Attributes:
        curvature: Largest eigenvalue [f/x^2] at which the optimizer does not diverge on a quadratic; NaN if there
            is no such number, or nobody knows it.
        preconditioned: Whether the limits are for P^-1/2 H P^-1/2, with the optimizer's preconditioner P. Otherwise
            they are for the Hessian H itself.
        small_batch: Limit of the batch sharpness [f/x^2] where the batches differ so much that their noise decides
            about stability; NaN as above. `smoothdiag.adapters.limits` derives it.
    """

    curvature: float
    preconditioned: bool
    small_batch: float = math.nan


Limits = tuple[float, bool] | tuple[float, bool, float]
"""A `StabilityLimit`, or a plain tuple of its first two or of all three entries."""

UNKNOWN = StabilityLimit(math.nan, preconditioned=False)


@runtime_checkable
class Adapter(Protocol):
    """What the library knows about one optimizer.

    The optimizers of this library answer these questions themselves. For others `smoothdiag.adapters.adapter_of` finds
    the file that does.

    Attributes:
        way: What AutoClip may shorten.
        follows_gradients: Whether a step is the learning rate times an average of gradients, clipped or not.
    """

    @property
    def way(self) -> Way:
        """See above."""
        ...

    @property
    def follows_gradients(self) -> bool:
        """See above."""
        ...

    def stepping(self) -> torch.optim.Optimizer:
        """Returns the optimizer that takes the steps: this one, or an optimizer that this one wraps."""
        ...

    def momentum(self, group: Group) -> float:
        """Returns the weight of the past in the average of gradients, in [0, 1)."""
        ...

    def gain(self, group: Group) -> float:
        """Returns how many learning rates long a step is, per norm of a constant gradient."""
        ...

    def shortening(self, group: Group) -> float:
        """Returns the length of steps over uncorrelated gradients, as a share of the length over equal gradients."""
        ...

    def update(self, group: Group) -> Formula | None:
        """Returns how the last update follows from state, gradient and the options of a group; ``None`` if not.

        Ask right before a step, and use the answer right after it, before anything else changes parameters, gradients,
        state or options. It cannot see that a schedule has stepped in between, or that a GradScaler has skipped the
        step: then the update would be wrong. It is as exact as the dtypes of parameter and rate. Neither the question
        nor the answer waits for a device.
        """
        ...

    def preconditioner(self, parameters: Sequence[Tensor]) -> Sequence[Tensor] | None:
        """Returns the diagonal of P if the optimizer moves along P^-1 m; ``None`` if there is no such P.

        Each tensor of the sequence may be computed anew whenever it is read, from what the optimizer holds then. Read
        it after a step, before the next one. Neither asking nor reading waits for a device.
        """
        ...

    def stability_limit(self, parameters: Sequence[Tensor]) -> Limits:
        """Returns the `StabilityLimit` of all ``parameters`` together; waits for a device only if it holds a rate.

        The third entry, the limit for small batches, may be left out.
        """
        ...

    def evaluated(self, parameter: Tensor) -> Tensor:
        """Returns the value to evaluate the trained model at: for most optimizers the parameter itself."""
        ...

    def refusal(self) -> str:
        """Returns why AutoClip must not act on this optimizer; empty if it may, as far as the state shows so far."""
        ...

    def late_refusal(self, moved: float | Tensor) -> str | None:
        """Returns the refusal as known after a step of length ``moved`` [x]; ``None`` if that step does not tell."""
        ...


def weight_decay(group: Group) -> float:
    """Returns the weight decay of a group [f/x^2]; 0 if it has none. Reading a tensor may wait for the device."""
    return float(group.get("weight_decay") or 0.0)
