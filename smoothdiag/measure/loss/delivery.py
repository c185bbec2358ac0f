"""Delivery: hands the gradients of a backward pass on as they become ready, so that they need not all be held."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from smoothdiag.packing import Packing

Take = Callable[[int, list[Tensor]], None]
"""What receives the gradients of one piece of x: the number of the piece, and one gradient for each of its tensors."""


class ArrivedTwice(Exception):
    """A gradient was handed on before it was complete, because backward runs backward passes inside itself."""


class Delivery:
    """Takes the gradients of large tensors within the backward pass, and the others, if asked, after it.

    Args:
        packing: How x lies in pieces.
        parameters: The coordinates x.
        take: Receives the gradients; it must not write to them, because two of them may share memory.
        early: Whether to take any gradients within the pass.

    Attributes:
        has_any: Whether any parameter had a gradient.
    """

    def __init__(self, packing: Packing, parameters: Sequence[nn.Parameter], take: Take, *, early: bool) -> None:
        self._packing, self._parameters, self._take = packing, parameters, take
        self._early = early
        self._taken: set[int] = set()
        self._is_late = False
        self._handles: list[RemovableHandle] = []
        self.has_any = False

    def __enter__(self) -> Delivery:
        pieces = enumerate(self._packing.pieces)
        for k, index in [(k, piece.indices[0]) for k, piece in pieces if not piece.is_joined and self._early]:
            parameter = self._parameters[index]
            if parameter.requires_grad and parameter.is_leaf:
                self._handles.append(
                    parameter.register_post_accumulate_grad_hook(lambda p, k=k: self._arrive(k, p))  # type: ignore[no-untyped-call]
                )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _arrive(self, k: int, parameter: nn.Parameter) -> None:
        if k in self._taken:
            # The first part has been worked on already, so this pass is lost. An error would spoil others' state.
            self._is_late, parameter.grad = True, None
            return
        self._taken.add(k)
        self.has_any = True
        gradient, parameter.grad = parameter.grad, None
        self._take(k, [_plain(gradient, parameter)])

    def finish(self) -> None:
        """Hands on what has not been taken yet.

        Raises:
            ArrivedTwice: If a gradient was taken before it was complete.
        """
        if self._is_late:
            raise ArrivedTwice
        for k, piece in enumerate(self._packing.pieces):
            if k not in self._taken:
                held = [self._parameters[i] for i in piece.indices]
                found = [p.grad for p in held]
                self.has_any = self.has_any or any(g is not None for g in found)
                for p in held:
                    p.grad = None
                self._take(k, [_plain(g, p) for g, p in zip(found, held, strict=True)])


def take_gradient(parameter: nn.Parameter) -> Tensor:
    """Returns the gradient and removes it from the parameter; zeros if there is none."""
    gradient, parameter.grad = parameter.grad, None
    found = _plain(gradient, parameter)
    # A view into a bucket (DDP) is overwritten by the next backward.
    return found.clone() if found is gradient and found._is_view() else found


def _plain(gradient: Tensor | None, parameter: nn.Parameter) -> Tensor:
    if gradient is None:
        return torch.zeros_like(parameter, requires_grad=False)
    if gradient.requires_grad:
        gradient = gradient.detach()
    return gradient.to_dense() if gradient.is_sparse else gradient
