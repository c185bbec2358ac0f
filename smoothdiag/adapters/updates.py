"""Updates: what the adapters share that work out the last update of a parameter after it has moved."""

import torch
from torch import Tensor

from smoothdiag.adapters.protocol import Group


def dense_gradient(parameter: Tensor) -> Tensor | None:
    """Returns the gradient of a parameter; ``None`` where there is none, or it is sparse."""
    gradient = parameter.grad
    return None if gradient is None or gradient.layout != torch.strided else gradient.detach()


def undone(step: Tensor, decay: float | Tensor, parameter: Tensor, group: Group) -> Tensor | None:
    """Returns u = step - decay x, where the parameter holds x + u by now.

    Args:
        step: What does not depend on x.
        decay: Share of x that decay takes away: a number, or one number for each entry.
        parameter: The parameter.
        group: Its group: if the rate is a tensor, torch works in the digits of its dtype.

    Returns:
        The update; ``None`` where decay has left too little of x to work x out: fewer than half of its digits.
    """
    left, rate = 1 - decay, group["lr"]
    dtypes = [parameter.dtype, *([rate.dtype] if isinstance(rate, Tensor) else [])]
    if bool((torch.as_tensor(left).abs() < max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5).any()):
        return None
    return (step - decay * parameter.detach()) / left
