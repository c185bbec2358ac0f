"""Momentum in numbers: how long steps are if all gradients are equal, and if they are uncorrelated."""

import math


def gain(momentum: float, dampening: float) -> float:
    """Returns how many learning rates long a step is, per norm of a constant gradient, if momentum adds gradients up.

    Without momentum dampening does nothing, as in `torch.optim.SGD`.
    """
    return (1 - dampening) / (1 - momentum) if momentum else 1.0


def averaged(momentum: float) -> float:
    """Returns the norm of an average of uncorrelated gradients, as a share of their norm."""
    return math.sqrt((1 - momentum) / (1 + momentum))


def shortening(momentum: float, nu: float = 1.0) -> float:
    """Returns the length of steps over uncorrelated gradients, as a share of the length over equal gradients.

    Args:
        momentum: Weight of the past in the average of gradients.
        nu: Weight of that average in the step; the gradient itself has the rest.
    """
    return nu * averaged(momentum) + 1 - nu
