"""Gradients as the doctor knows them: which of them were used, clipped or read and have not changed since."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from types import CodeType, FrameType
from typing import Any, Final

import torch
from torch import Tensor

from smoothdiag.doctor.sites import NOWHERE, Site

_PLAIN: Final = (Tensor, torch.nn.Parameter)
_SCALED: Final = "smoothdiag.scaled"
_NEAR: Final = 64
"""Largest number of nodes to search, from the tensor that backward() is called on back to a scaled loss."""


class Mark:
    """A gradient as it was at one moment; the mark keeps no tensor alive.

    Attributes:
        site: The line that the mark is about.
        known: Whether somebody has read the norm of the gradient from before the clip.
        moment: How many backward passes and steps had come before.
    """

    __slots__ = ("_gradient", "_version", "known", "moment", "site")

    def __init__(self, gradient: Tensor | None, site: Site, *, known: bool = False, moment: int = 0) -> None:
        self.site, self.known, self.moment = site, known, moment
        self._gradient: weakref.ref[Tensor] | None = None
        self._version = -1
        self.renew(gradient)

    def renew(self, gradient: Tensor | None) -> None:
        """Marks the gradient as it is now."""
        self._gradient = None if gradient is None else weakref.ref(gradient)
        self._version = version(gradient)

    @property
    def gradient(self) -> Tensor | None:
        """The marked gradient; ``None`` once it is gone."""
        return None if self._gradient is None else self._gradient()

    def is_of(self, gradient: Tensor | None) -> bool:
        """Returns whether ``gradient`` is the marked one, even if it was written to since."""
        return gradient is not None and self._gradient is not None and self._gradient() is gradient

    def holds(self, gradient: Tensor | None) -> bool:
        """Returns whether ``gradient`` is the marked one and nothing wrote to it since."""
        return self.is_of(gradient) and version(gradient) == self._version != -1


class Owner:
    """An optimizer as the doctor knows it.

    Attributes:
        steps: Steps it has taken.
        frame: Identity of the call of ``step`` that is under way; 0 between steps.
        closure: Code of the closure that its last step was given.
        entered: Number of backward passes before its last step began.
        left: Number of backward passes before its last step ended.
        makes_gradients: Whether a backward pass ran during the last step.
        in_backward: Whether its last step was taken inside a backward pass.
        step_site: The line that called that step.
        scaled: Whether its gradients carry the factor of a GradScaler.
        prints: Fingerprints of its gradients after the last scaled backward pass.
        early: Lines that have read a norm since its last step, before there was a new gradient.
        carries: Whether its gradients contain a gradient that a step has already used.
        repeats: Whether its step is about to use gradients that all have been used.
        since: How many backward passes and steps there were when its last step ended.
        was_clipped: Whether its last step used a gradient that a clip had seen.
        framework: The framework whose wrapper makes its steps; empty if none does.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None) -> None:
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)
        self.steps = self.since = 0
        self.frame = 0
        self.closure: CodeType | None = None
        self.entered = self.left = -1
        self.makes_gradients = self.in_backward = self.scaled = self.carries = False
        self.repeats = self.was_clipped = False
        self.framework = ""
        self.step_site: Site | None = None
        self.prints: list[tuple[int, int]] = []
        self.early: list[Site] = []
        self._first: Held | None = None
        self._sum: Mark | None = None

    def is_of(self, optimizer: torch.optim.Optimizer) -> bool:
        """Returns whether this owner stands for ``optimizer``."""
        return self._optimizer is not None and self._optimizer() is optimizer

    @property
    def parameters(self) -> list[Tensor]:
        """Its parameters; an empty list once the optimizer is gone."""
        optimizer = None if self._optimizer is None else self._optimizer()
        return [] if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]

    def fingerprints(self) -> list[tuple[int, int]]:
        """Returns identities and versions of the gradients, which show a change during one backward pass."""
        return [(id(p.grad), version(p.grad)) for p in self.parameters]

    def before_backward(self) -> None:
        """Records whether the backward pass will add to gradients that a step has already used."""
        first, gradient = self._first, None if self._first is None else self._first.gradient
        is_as_it_was = self._sum is not None and self._sum.holds(gradient)
        # grad.data.zero_() moves no version counter, so the entries decide.
        is_used = first is not None and gradient is not None and first.is_used_up and has_entries([gradient])
        self.carries = is_used or (self.carries and is_as_it_was)

    def after_backward(self, first: Held | None) -> None:
        """Marks the accumulated gradient, by the first parameter that has one."""
        self._first, self._sum = first, None if first is None else Mark(first.gradient, NOWHERE)

    @property
    def has_sum(self) -> bool:
        """Whether its gradients are as the latest backward pass left them, or as clips and steps did since."""
        return self._first is not None and self._sum is not None and self._sum.is_of(self._first.gradient)

    @property
    def adds_up(self) -> Held | None:
        """Its first parameter with a gradient, if a backward pass has added to one that a step had already used."""
        first = self._first
        return first if first is not None and self.carries and self.has_sum and not first.is_used_up else None

    def enter(self, frame: FrameType) -> bool:
        """Returns whether a step is the outermost: a subclass that calls super().step() fires the hooks twice."""
        below: FrameType | None = frame.f_back
        while self.frame and below is not None:
            if id(below) == self.frame:
                return False
            below = below.f_back
        self.frame = id(frame)
        return True


class Held:
    """A parameter of an optimizer, with marks of what happened to its gradient.

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

    @property
    def address(self) -> tuple[int, int] | None:
        """Address of the gradient in memory at this moment."""
        gradient = self.gradient
        return None if gradient is None else address(gradient)

    def live(self, name: str) -> Mark | None:
        """Returns the mark of that name if nothing has written to the gradient since."""
        mark: Mark | None = getattr(self, name)
        return mark if mark is not None and mark.holds(self.gradient) else None

    def marks(self, *names: str) -> list[Mark]:
        """Returns the marks of these names that still hold."""
        return [mark for name in names if (mark := self.live(name)) is not None]

    @property
    def is_used_up(self) -> bool:
        """Whether a step has used the gradient and no new gradient has come since."""
        return self.stepped is not None and (self.gradient is None or self.live("stepped") is not None)

    @property
    def is_limited(self) -> bool:
        """Whether a clip has seen the gradient since the last step, even if something wrote to it afterwards."""
        mark = self.clipped
        return mark is not None and mark.moment >= self.owner.since and mark.is_of(self.gradient)

    @property
    def is_known(self) -> bool:
        """Whether somebody has read the norm of this gradient from before any clip."""
        clipped = self.live("clipped")
        return self.live("read") is not None if clipped is None else clipped.known


def is_sharded(tensor: Any) -> bool:
    """Returns whether a tensor is a DTensor, without importing the module of DTensors."""
    if type(tensor) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Returns the part of a tensor on this rank."""
    part: Tensor = tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


def is_part(tensor: Any) -> bool:
    """Returns whether a tensor is a DTensor of which other ranks hold a part or a summand."""
    if not is_sharded(tensor):
        return False
    mesh = tensor.device_mesh
    return any(not each.is_replicate() and mesh.size(dim) > 1 for dim, each in enumerate(tensor.placements))


def version(gradient: Tensor | None) -> int:
    """Returns the counter that goes up with every write to a gradient; -1 if there is no such counter."""
    part = None if gradient is None else local(gradient)
    return -1 if part is None or part.is_inference() else part._version


def has_entries(gradients: Iterable[Tensor | None]) -> bool:
    """Returns whether any gradient has a nonzero entry; a gradient that cannot be inspected counts as if it had one."""
    there = [each for each in gradients if each is not None]
    if not can_be_read(there):
        return True
    devices = {each.device for each in there}
    return any(bool(torch.stack([g.any() for g in there if g.device == device]).any()) for device in devices)


def can_be_read(tensors: Iterable[Tensor]) -> bool:
    """Returns whether entries may be looked at now: dense tensors of this process, outside of captured graphs."""
    there = list(tensors)
    if not all(type(each) in _PLAIN and each.layout == torch.strided and not each.is_meta for each in there):
        return False
    return not (any(each.is_cuda for each in there) and torch.cuda.is_current_stream_capturing())


def is_kept(gradient: Tensor | None, mark: Mark) -> bool:
    """Returns whether a gradient is still the marked one and was not set to zero."""
    return gradient is not None and mark.is_of(gradient) and (mark.holds(gradient) or bool(local(gradient).any()))


def mark_scaled(losses: Any) -> Any:
    """Marks the graphs of one or more losses as carrying the factor of a GradScaler, and returns the losses."""
    if isinstance(losses, Tensor):
        if losses.grad_fn is not None:
            losses.grad_fn.metadata[_SCALED] = True  # type: ignore[index]
        return losses
    if isinstance(losses, list | tuple):
        for each in losses:
            mark_scaled(each)
        return losses
    return map(mark_scaled, losses)  # lazy, like the map that the scaler returns for other iterables


def is_scaled(losses: Any) -> bool:
    """Returns whether the argument of ``backward`` was computed from a loss that a GradScaler has scaled."""
    several = [losses] if isinstance(losses, Tensor) else losses
    nodes = [getattr(each, "grad_fn", None) or getattr(each, "node", None) for each in several]
    seen: set[Any] = set()
    while nodes and len(seen) < _NEAR:
        node = nodes.pop(0)
        if node is None or node in seen:
            continue
        if _SCALED in node.metadata:
            return True
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
    return False


def address(tensor: Any) -> tuple[int, int] | None:
    """Returns address and size of the memory of a gradient, or ``None`` if it has no memory of its own."""
    part = local(tensor) if isinstance(tensor, Tensor) else None
    if type(part) not in _PLAIN or part is None or part.layout != torch.strided:
        return None
    try:
        return (part.data_ptr(), part.numel()) if part.numel() else None
    except RuntimeError:  # inside torch.func, tensors have no memory
        return None


def addresses(held: Iterable[Held]) -> dict[tuple[int, int], Held]:
    """Returns the parameters by the address of their gradients."""
    found = {each.address: each for each in held}
    return {where: each for where, each in found.items() if where is not None}
