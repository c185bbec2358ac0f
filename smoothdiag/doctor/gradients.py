"""Gradients as the doctor knows them: which were stepped with, clipped or read, and have not been written to since."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from types import FrameType
from typing import Any, Final

import torch
from torch import Tensor

from smoothdiag.doctor.sites import Site

_PLAIN: Final = (Tensor, torch.nn.Parameter)


class Mark:
    """A gradient as it was at some moment; holds no memory.

    Attributes:
        site: The line that the mark is about.
        known: Whether somebody has read the norm that the gradient had before it was clipped.
    """

    __slots__ = ("_gradient", "_version", "known", "site")

    def __init__(self, gradient: Tensor | None, site: Site, *, known: bool = False) -> None:
        self.site, self.known = site, known
        self._gradient: weakref.ref[Tensor] | None = None
        self._version = -1
        self.renew(gradient)

    def renew(self, gradient: Tensor | None) -> None:
        """Takes the gradient as it is now."""
        self._gradient = None if gradient is None else weakref.ref(gradient)
        self._version = -1 if gradient is None else local(gradient)._version

    def holds(self, gradient: Tensor | None) -> bool:
        """Returns whether ``gradient`` is the one marked, and nothing wrote to it since."""
        if gradient is None or self._gradient is None or self._gradient() is not gradient:
            return False
        return local(gradient)._version == self._version


class Owner:
    """An optimizer as the doctor knows it.

    Attributes:
        steps: Steps it has taken.
        frame: The call of its step that is under way.
        has_closure: Whether its last step was given a closure.
        in_backward: Whether its last step was taken inside a backward pass.
        step_site: Where that was called.
        scaled: Whether its gradients carry the factor of a GradScaler.
        prints: Its gradients after the last scaled backward pass.
        early: Lines that read a norm since its last step, when there was no new gradient yet.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.steps = 0
        self.frame: FrameType | None = None
        self.has_closure = self.in_backward = self.scaled = False
        self.step_site: Site | None = None
        self.prints: list[tuple[int, int]] = []
        self.early: list[Site] = []

    def is_calculating(self, frame: FrameType | None) -> bool:
        """Returns whether ``frame`` is arithmetic of the step: of no closure and no hook."""
        optimizer = self._optimizer()
        if self.frame is None or self.has_closure or optimizer is None:
            return False
        hooks = (*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values())
        codes = {getattr(hook, "__code__", None) for hook in hooks}
        while frame is not None and frame.f_back is not self.frame:
            frame = frame.f_back
        return frame is not None and frame.f_code not in codes

    def is_of(self, optimizer: torch.optim.Optimizer) -> bool:
        """Returns whether it stands for this optimizer."""
        return self._optimizer() is optimizer

    @property
    def parameters(self) -> list[Tensor]:
        """Its parameters; none once it is gone."""
        optimizer = self._optimizer()
        return [] if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]

    def fingerprints(self) -> list[tuple[int, int]]:
        """Returns what changes when a gradient does, for comparing within one backward pass."""
        return [(id(p.grad), -1 if p.grad is None else local(p.grad)._version) for p in self.parameters]

    def enter(self, frame: FrameType) -> bool:
        """Returns whether a step is the outermost; a subclass that calls super().step() fires hooks twice."""
        below: FrameType | None = frame.f_back
        while self.frame is not None and below is not None:
            if below is self.frame:
                return False
            below = below.f_back
        self.frame = frame
        return True


class Held:
    """A parameter of an owner, with marks of what happened to its gradient.

    Attributes:
        parameter: The parameter, by weak reference.
        owner: The optimizer that steps it.
        stepped: The gradient of the last step.
        clipped: The gradient after a clip.
        read: The gradient whose norm was read.
    """

    __slots__ = ("clipped", "owner", "parameter", "read", "stepped")

    def __init__(self, parameter: Tensor, owner: Owner) -> None:
        self.parameter, self.owner = weakref.ref(parameter), owner
        self.stepped: Mark | None = None
        self.clipped: Mark | None = None
        self.read: Mark | None = None

    @property
    def gradient(self) -> Tensor | None:
        """The gradient at this moment."""
        parameter = self.parameter()
        return None if parameter is None else parameter.grad

    def live(self, name: str) -> Mark | None:
        """Returns the mark of that name if nothing wrote to the gradient since."""
        mark: Mark | None = getattr(self, name)
        return mark if mark is not None and mark.holds(self.gradient) else None

    def marks(self) -> list[Mark]:
        """Returns the marks that still hold."""
        return [mark for name in ("stepped", "clipped", "read") if (mark := self.live(name)) is not None]

    @property
    def is_used_up(self) -> bool:
        """Whether a step was taken, and there has been no new gradient since."""
        return self.stepped is not None and (self.gradient is None or self.live("stepped") is not None)

    @property
    def is_known(self) -> bool:
        """Whether the norm of this gradient, as it was before any clip, has been read."""
        clipped = self.live("clipped")
        return self.live("read") is not None if clipped is None else clipped.known


def is_sharded(tensor: Any) -> bool:
    """Returns whether a tensor is a DTensor, without importing what is not there."""
    if type(tensor) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Returns the part of a tensor on this rank."""
    part: Tensor = tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


def address(tensor: Any) -> tuple[int, int] | None:
    """Returns what tells the memory of one gradient from that of others, or ``None`` where there is none."""
    part = local(tensor) if isinstance(tensor, Tensor) else None
    if type(part) not in _PLAIN or part is None or part.layout != torch.strided:
        return None
    try:
        return (part.data_ptr(), part.numel()) if part.numel() else None
    except RuntimeError:  # inside torch.func, tensors have no memory
        return None


def addresses(held: Iterable[Held]) -> dict[tuple[int, int], Held]:
    """Returns the parameters by where their gradients lie."""
    found = {address(each.gradient): each for each in held if each.gradient is not None}
    return {where: each for where, each in found.items() if where is not None}
