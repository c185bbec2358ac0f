"""Arithmetic of optimizer steps on lists of tensors: true global norms, updates without temporaries, no waiting.

Lists hold local parts of one device and dtype. Scalars are 0-dim tensors, so that no step waits for a device.
"""

from collections.abc import Sequence
from itertools import compress

import torch
from torch import Tensor

from smoothdiag import vectors

# On a CPU, long float32 sums lose digits: 2e-3 of the norm of 30 million, less than 2e-7 in rows this long.
_ROW = 2**14

_MANY = 64
"""Tensors of a long list."""


def lengths(tensors: Sequence[Tensor], *, foreach: bool = True) -> list[Tensor]:
    """Returns the Euclidean norm of each of some tensors of one dtype; 0-dim, in float32 or wider."""
    # Not float64 throughout: over float32 entries it costs five times as much on a CPU.
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    by_rows = [wide == torch.float32 and _is_long(t) for t in tensors]
    whole = [t for t, long in zip(tensors, by_rows, strict=True) if not long]
    if foreach and whole:
        found = iter(torch._foreach_norm(whole, 2, dtype=wide))
    else:
        found = iter([torch.linalg.vector_norm(t, 2, dtype=wide) for t in whole])
    return [_length_by_rows(t) if long else next(found) for t, long in zip(tensors, by_rows, strict=True)]


def square(tensors: Sequence[Tensor]) -> Tensor:
    """Returns the sum of squares of some tensors of one dtype and device; 0-dim, in the widest dtype there."""
    if len(tensors) >= _MANY and tensors[0].device.type == "cpu":
        is_short = [t.numel() <= _ROW for t in tensors]
        if sum(is_short) >= _MANY:  # a tenth of the cost of as many norms
            long = [t for t, short in zip(tensors, is_short, strict=True) if not short]
            tensors = [vectors.joined(list(compress(tensors, is_short))), *long]
    found = torch.stack(lengths(tensors))
    return found.to(vectors.widest(found.device)).square().sum()


def global_norm(parts: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]], *, foreach: bool = True) -> Tensor:
    """Returns the Euclidean norm over the local parts of vectors on all ranks; 0-dim, see `vectors.total`.

    Args:
        parts: Pairs of equally long lists: local parts of one device and dtype, and their parameters.
        foreach: Whether to use the operations on lists.
    """
    squares = []
    for tensors, owners in parts:
        found = torch.stack(lengths(tensors, foreach=foreach))
        squares.append((list(found.to(vectors.widest(found.device)).square().unbind()), owners))
    return vectors.total(squares).sqrt()


def scalar(value: float | Tensor, like: Tensor) -> Tensor:
    """Returns a number as a 0-dim tensor with the dtype and device of another, without waiting for the device."""
    if isinstance(value, Tensor) and value.device != like.device and value.device.type != "cpu":
        value = value.to(like.device)
    # A product passes a number, or a tensor on the CPU, along with the kernel; a copy would wait for the device.
    return torch.ones_like(like) * value


def average_(averages: Sequence[Tensor], values: Sequence[Tensor], weight: float, *, foreach: bool = True) -> None:
    """Moves averages by ``weight`` in [0, 1] towards new values, in place."""
    if foreach:
        torch._foreach_lerp_(list(averages), list(values), weight)
    else:
        for average, value in zip(averages, values, strict=True):
            average.lerp_(value, weight)


def add_scaled(a: Sequence[Tensor], b: Sequence[Tensor], alpha: float, *, foreach: bool = True) -> Sequence[Tensor]:
    """Returns a + alpha b."""
    if foreach:
        return torch._foreach_add(list(a), list(b), alpha=alpha)
    return [torch.add(x, y, alpha=alpha) for x, y in zip(a, b, strict=True)]


def multiply_(params: Sequence[Tensor], factor: float | Tensor, *, foreach: bool = True) -> None:
    """Multiplies parameters by a number or a 0-dim tensor, in place."""
    first = params[0]
    if isinstance(factor, Tensor):
        wide = torch.promote_types(first.dtype, torch.float32)
        factor = scalar(factor, torch.ones((), dtype=wide, device=first.device))
        if first.dtype.itemsize < 4:  # bfloat16 would round the factor itself to 1
            for p in params:
                p.copy_(p.float() * factor)
            return
        factor = factor.to(first.dtype)
    if foreach:
        torch._foreach_mul_(list(params), factor)
    else:
        for p in params:
            p.mul_(factor)


def subtract_scaled_(
    params: Sequence[Tensor],
    directions: Sequence[Tensor],
    scale: Tensor | Sequence[Tensor],
    *,
    foreach: bool = True,
) -> None:
    """Subtracts ``scale`` times directions from parameters of one device and dtype, in place.

    Args:
        params: Tensors to move.
        directions: Tensors of their shapes and dtype.
        scale: 0-dim tensor, or one such tensor for each parameter.
        foreach: Whether to use the operations on lists.
    """
    first = params[0]
    one = isinstance(scale, Tensor)
    if first.dtype.itemsize < 4:  # in the parameters' dtype the rate would lose its digits, or vanish in float16
        each = [scale] * len(params) if isinstance(scale, Tensor) else list(scale)
        for p, d, s in zip(params, directions, each, strict=True):
            p.copy_(p.float() - d.float() * s.to(first.device).float())
        return
    scales = [s.to(first.device).to(first.dtype) for s in ([scale] if isinstance(scale, Tensor) else scale)]
    if foreach and one and first.device.type != "cpu":  # addcmul would launch one kernel per tensor
        torch._foreach_sub_(list(params), torch._foreach_mul(list(directions), scales[0]))
        return
    if one:
        scales *= len(params)
    if foreach:  # without a temporary: 2.7 times as fast on a CPU
        torch._foreach_addcmul_(list(params), list(directions), scales, value=-1)
    else:
        for p, d, s in zip(params, directions, scales, strict=True):
            p.addcmul_(d, s, value=-1)


def _is_long(x: Tensor) -> bool:
    return x.numel() > _ROW and x.device.type == "cpu" and x.is_contiguous()


def _length_by_rows(x: Tensor) -> Tensor:
    flat = x.view(-1)
    end = x.numel() // _ROW * _ROW
    rows = torch.linalg.vector_norm(flat[:end].view(-1, _ROW), 2, dim=1, dtype=torch.float32)
    rest = torch.linalg.vector_norm(flat[end:], 2, dtype=torch.float32)
    joint: Tensor = torch.linalg.vector_norm(torch.cat([rows, rest[None]]), 2, dtype=torch.float64)
    return joint.float()
