"""Algebra of parameter lists: the only place that loops over parameters.

A vector is a non-empty sequence of tensors, one per parameter. Scalars come back as 0-dim float64 tensors on
the device of the first tensor, so that nothing here waits for a device; call ``float`` where a number is due.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Vector = Sequence[Tensor]


def norms(a: Vector) -> Tensor:
    """Returns ||a_i|| for every tensor of the vector, shape (len(a),), accumulated in float64."""
    # foreach_norm with a float64 accumulator is 3x faster than (x * x).sum(dtype=float64) on a CPU.
    return _stack(torch._foreach_norm(list(a), 2, dtype=torch.float64))


def norm(a: Vector) -> Tensor:
    """Returns the Euclidean norm ||a||, a 0-dim float64 tensor."""
    return norms(a).square().sum().sqrt()


def dot(a: Vector, b: Vector) -> Tensor:
    """Returns <a, b>, a 0-dim float64 tensor."""
    return _stack([(_wide(x) * _wide(y)).sum(dtype=torch.float64) for x, y in zip(a, b, strict=True)]).sum()


def sub(a: Vector, b: Vector) -> list[Tensor]:
    """Returns a - b in float32 or wider, so that bfloat16 differences are exact before they are rounded."""
    return [_wide(x) - _wide(y) for x, y in zip(a, b, strict=True)]


def add_scaled(a: Vector, b: Vector, alpha: float | Tensor) -> list[Tensor]:
    """Returns a + alpha b in the dtypes of ``a``."""
    return [(_wide(x) + alpha * _wide(y)).to(x.dtype) for x, y in zip(a, b, strict=True)]


def clone(a: Vector) -> list[Tensor]:
    """Returns copies that share no memory with ``a`` and belong to no graph."""
    return [x.detach().clone() for x in a]


def assign_(a: Vector, b: Vector) -> None:
    """Copies ``b`` into ``a`` in place, unseen by autograd: graphs that hold ``a`` stay valid."""
    for x, y in zip(a, b, strict=True):
        x.data.copy_(y)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _stack(scalars: Sequence[Tensor]) -> Tensor:
    return torch.stack([s.to(scalars[0].device) for s in scalars])
