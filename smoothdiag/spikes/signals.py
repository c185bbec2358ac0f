"""Signals: what a guard watches at each step: gradient norm and loss before it, length of the update after it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from smoothdiag import arguments, vectors
from smoothdiag.adapters import adapter_of
from smoothdiag.autoclip.buckets import Bucket, copies_of, gradient_norm, length_of, subtract
from smoothdiag.autoclip.following import Following
from smoothdiag.vectors import widest

GRAD_NORM, LOSS, UPDATE_NORM = "grad_norm", "loss", "update_norm"
ELEMENTS, LARGEST_ELEMENT = "elements", "largest_element"

MISSING = -math.inf
"""In place of a signal that was not given."""


def named(module: str) -> str:
    """Returns how a module is called in the name of a signal, which stands in lists with blanks between them."""
    return "_".join(module.split())


class Shown:
    """What the loop has shown of a step before the optimizer takes it.

    Attributes:
        grad_norm: The gradient norm that the loop has measured itself, if it did.
    """

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self.grad_norm: Tensor | None = None

    def add(self, loss: Tensor | float | None, grad_norm: Tensor | float | None) -> None:
        """Adds the loss of a micro-batch, and the gradient norm of the step.

        Raises:
            ValueError: If one of them is no single number.
        """
        if loss is not None:
            self._losses.append(_number("loss", loss))
        if grad_norm is not None:
            self.grad_norm = _number("grad_norm", grad_norm)

    @property
    def has_loss(self) -> bool:
        """Whether a loss was shown."""
        return bool(self._losses)

    def loss(self, device: torch.device) -> Tensor | None:
        """Returns the mean loss of the micro-batches on a device; ``None`` if there is none."""
        if not self._losses:
            return None
        found = [loss.to(device, non_blocking=True) for loss in self._losses]
        return found[0] if len(found) == 1 else torch.stack(found).mean()

    def clear(self) -> None:
        """Forgets everything, because the step is over."""
        self._losses, self.grad_norm = [], None


def _number(name: str, value: Tensor | float) -> Tensor:
    if hasattr(value, "full_tensor"):  # FSDP2 clips with a norm in parts
        value = value.full_tensor()
    try:
        found = torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise arguments.wrong(name, "a number", value) from error
    if found.numel() != 1 or found.is_complex():
        raise ValueError(
            f"Parameter `{name}` should be one number, such as a mean over the batch. Found shape {tuple(found.shape)}."
        )
    return found.reshape(()).to(widest(found.device))


def before_step(
    optimizer: torch.optim.Optimizer,
    shown: Shown,
    group: dist.ProcessGroup | None,
    further: Callable[[Tensor, Tensor | None], Tensor] | None = None,
) -> Tensor | None:
    """Returns gradient norm and loss of a step that begins, and further signals, alike on all ranks.

    Args:
        optimizer: The optimizer.
        shown: What the loop has shown.
        group: Ranks that train one model; ``None`` if there is one process.
        further: Returns further signals for the norm that was seen, and the norm that the loop has shown.

    Returns:
        `MISSING` in place of a loss that was not given; ``None`` if there are no gradients.
    """
    grads = [p.grad for held in optimizer.param_groups for p in held["params"] if p.grad is not None]
    if not grads:
        return None
    # A norm that the loop shows saves reading all gradients once more. Of sharded ones the ranks read theirs together.
    is_sharded = group is not None and any(map(vectors.shard_groups, grads))
    is_read = shown.grad_norm is None or further is not None or is_sharded
    seen = gradient_norm(optimizer) if is_read else None
    device = grads[0].device if seen is None else seen.device
    norm = seen if shown.grad_norm is None else shown.grad_norm
    assert norm is not None
    norm = norm.to(device, widest(device), non_blocking=True)
    found = _over_ranks([norm, shown.loss(device)], norm, group)
    if further is None or seen is None:
        return found
    return torch.cat([found, _mean(further(seen.to(norm), norm if shown.grad_norm is not None else None), group)])


def _mean(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None:
        dist.all_reduce(values, group=group)
        values /= dist.get_world_size(group)
    return values


def _over_ranks(values: Sequence[Tensor | None], like: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Returns the mean of each value over the ranks that have it: ranks then decide alike, to the last bit."""
    absent = MISSING if group is None else 0.0
    found = torch.stack([torch.full_like(like, absent) if value is None else value.to(like.dtype) for value in values])
    if group is None:
        return found
    given = torch.cat([torch.full((1,), float(value is not None), **_kind(like)) for value in values])
    both = torch.cat([found, given])
    dist.all_reduce(both, group=group)
    found, given = both.chunk(2)
    return torch.where(given > 0, found / given, torch.full_like(found, MISSING))


def _kind(like: Tensor) -> dict[str, Any]:
    return {"dtype": like.dtype, "device": like.device}


class UpdateNorm:
    """Measures the length of each update: from what the optimizer keeps, where that tells, or else from a copy.

    On a CPU it may be a close bound on the length. A comparison says whether the optimizer's state tells the update. On
    a device it would wait, so there a copy is made at every step.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._following, self._follows = Following(optimizer, adapter_of(optimizer)), False
        self._start: list[Bucket] = []

    def begin(self, step: int) -> None:
        """Prepares to measure the update of a step that comes now."""
        self._follows = self._following.begin(step)
        self._start = [] if self._follows else copies_of(self._optimizer)

    def end(self, step: int) -> Tensor:
        """Returns the length of the update; call it right after the step."""
        back, self._start = self._start, []
        try:
            if self._follows:
                # On a CPU, a close bound on the length of Adam's updates costs half as much as the length.
                most = self._following.at_most(math.inf)
                return torch.tensor(most) if math.isfinite(most) else self._following.length()
            subtract(back)
            if all(tensors[0].device.type == "cpu" for tensors, _ in back):
                self._following.check(back, step, may_wait=True)
            return length_of(back)
        finally:
            self._following.drop()

    def drop(self) -> None:
        """Forgets a step that has failed."""
        self._start = []
        self._following.drop()
