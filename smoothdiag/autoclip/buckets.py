"""Buckets: gradients and parameters by device and dtype, measured and changed without waiting for the device.

If memory runs out, an operation is tried once more. Operations that change tensors in place continue with the tensor at
which they failed, so that no tensor is changed twice.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from smoothdiag import vectors
from smoothdiag.adapters import Group, members, moved_by
from smoothdiag.adapters.scalers import still_scaled
from smoothdiag.adapters.wrappers import pending_scale
from smoothdiag.autoclip.history import Counts
from smoothdiag.memory import retried
from smoothdiag.optim.arithmetic import lengths, multiply_, square
from smoothdiag.vectors import total, widest

_KIND = (attrgetter("dtype"), attrgetter("device"))

Bucket = tuple[list[Tensor], list[Tensor]]
"""Local tensors of one device and dtype, and the tensors they are part of."""


def are_plain(tensors: Sequence[Tensor]) -> bool:
    """Returns whether all are tensors and parameters of torch itself, and so not sharded."""
    return set(map(type, tensors)) <= {Tensor, torch.nn.Parameter}


def check_gradients(optimizer: torch.optim.Optimizer, who: str = "AutoClip") -> None:
    """Raises a RuntimeError if ``who`` cannot tell how long a gradient is."""
    grads = [grad for group in optimizer.param_groups for p in group["params"] if (grad := p.grad) is not None]
    if set(map(attrgetter("layout"), grads)) - {torch.strided}:
        raise RuntimeError(f"{who} needs dense gradients. Found a sparse one.")
    for grad in [] if are_plain(grads) else grads:
        if vectors.is_sharded(grad) and any(placement.is_partial() for placement in grad.placements):
            raise RuntimeError(f"{who} needs gradients that are summed over ranks. Found a partial one.")


def check_unscaled(optimizer: torch.optim.Optimizer) -> None:
    """Raises a RuntimeError if a GradScaler would unscale the gradients of some optimizers of a list later than others.

    One that steps fused takes out the factor by itself.
    """
    first, *others = members(optimizer)
    waiting = still_scaled(sys._getframe(), [first, *others]) if others else []
    if waiting := [o for o in waiting if not getattr(o, "_step_supports_amp_scaling", False)]:
        raise RuntimeError(
            "Gradients of all optimizers in a list should be unscaled before the first of them steps, because AutoClip "
            f"keeps one length for all. Found those of {type(waiting[0]).__name__} still scaled: call "
            "`scaler.unscale_(optimizer)` for each optimizer before the first `scaler.step`."
        )


def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor | None:
    """Returns the norm of all gradients, without the factor of a GradScaler; ``None`` if there are no gradients."""
    found = retried(lambda: [bucket for group in optimizer.param_groups for bucket in gradients(group)])
    if not found:
        return None
    norm = length_of(found)
    return retried(partial(unscaled, optimizer, norm))


def gradients(group: Group) -> list[Bucket]:
    """Returns the gradients of a group."""
    grads = [grad for p in group["params"] if (grad := p.grad) is not None]
    return buckets(grads, grads)


def buckets(tensors: Sequence[Tensor], owners: Sequence[Tensor]) -> list[Bucket]:
    """Returns local parts by device and dtype."""
    if are_plain(tensors) and all(len(set(map(of, tensors))) == 1 for of in _KIND):
        in_graph = any(map(attrgetter("requires_grad"), tensors))
        return [([t.detach() for t in tensors] if in_graph else list(tensors), list(owners))]
    found: dict[Any, Bucket] = {}
    for tensor, owner in zip(tensors, owners, strict=True):
        local = vectors.local(tensor)
        members = found.setdefault((local.device, local.dtype), ([], []))
        members[0].append(local)
        members[1].append(owner)
    return list(found.values())


def copies_of(optimizer: torch.optim.Optimizer) -> list[Bucket]:
    """Returns copies of the parameters that an optimizer moves, in float32 or wider."""

    def copied() -> list[Bucket]:
        held = [p for p in moved_by(optimizer) if p.requires_grad]
        return [([wide(x.clone()) for x in local], owners) for local, owners in buckets(held, held)]

    return retried(copied)


def subtract(copies: Sequence[Bucket]) -> None:
    """Makes copies hold the way back to them: a second copy of a large model may not fit into memory."""
    for start, owners in copies:
        here = retried(lambda owners=owners: [vectors.local(p) for p in owners])  # type: ignore[misc]
        if all(x.dtype == y.dtype for x, y in zip(start, here, strict=True)):
            retried(partial(torch._foreach_sub_, start, here))
        else:
            each(Tensor.sub_, start, here)


def wide(x: Tensor) -> Tensor:
    """Returns a tensor in float32 or wider."""
    return x.float() if x.dtype.itemsize < 4 else x


def unscaled(optimizer: torch.optim.Optimizer, length: Tensor) -> Tensor:
    """Returns a length without the factor of a GradScaler, which fused optimizers divide by in their step."""
    factor = pending_scale(optimizer)
    return length if factor is None else length / factor.to(length.device)


def length_of(parts: Sequence[Bucket]) -> Tensor:
    """Returns the Euclidean norm over the local parts of vectors on all ranks."""
    if all(are_plain(owners) for _, owners in parts):
        first = parts[0][0][0].device
        return retried(lambda: torch.stack([square(tensors).to(first) for tensors, _ in parts]).sum().sqrt())

    def squares() -> list[Bucket]:
        found = [(torch.stack(lengths(tensors)), owners) for tensors, owners in parts]
        return [(list(x.to(widest(x.device)).square().unbind()), owners) for x, owners in found]

    own = retried(squares)
    if any(vectors.is_sharded(owner) for _, owners in parts for owner in owners):
        return total(own).sqrt()  # once: the other ranks do not repeat their part of the sum
    return retried(lambda: total(own).sqrt())


def leave_out_non_finite(optimizer: torch.optim.Optimizer, counts: Counts, step: int, *, acts: bool) -> None:
    """Counts gradients that are not all finite, and makes them zero if ``acts``."""
    if (norm := gradient_norm(optimizer)) is None:
        return
    finite = retried(lambda: torch.isfinite(norm))
    retried(lambda: counts.add_gradient(finite, step))
    if acts:
        multiply_gradients(optimizer, None, finite)


def multiply_gradients(optimizer: torch.optim.Optimizer, scale: Tensor | None, finite: Tensor) -> None:
    """Multiplies all gradients by ``scale``, or makes all of them zero if any is not finite."""
    on_cpu = finite.device.type == "cpu"  # where reading a value waits for no device
    is_one = scale is None or (on_cpu and retried(lambda: bool(scale == 1)))
    is_whole = on_cpu and retried(lambda: bool(finite))
    if is_one and is_whole:
        return
    found = retried(lambda: [bucket for group in optimizer.param_groups for bucket in gradients(group)])
    for grads, _ in found:
        if scale is not None and not is_one:
            multiply(grads, scale)
        if not is_whole:
            lost = retried(lambda grads=grads: ~finite.to(grads[0].device))  # type: ignore[misc]
            each(lambda grad, lost=lost: grad.masked_fill_(lost, 0.0), grads)


def multiply(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiplies tensors in place, each of them once, even if memory runs out in between."""
    if tensors[0].dtype.itemsize < 4:  # narrow tensors are widened to be multiplied, so one at a time
        each(lambda x: multiply_([x], factor), tensors)
    else:
        retried(partial(multiply_, tensors, factor))


def each(change: Callable[..., object], *lists: Sequence[Tensor]) -> None:
    """Changes tensors in place; if memory runs out, it goes on with the tensor at which it stopped."""
    for tensors in zip(*lists, strict=True):
        retried(partial(change, *tensors))
