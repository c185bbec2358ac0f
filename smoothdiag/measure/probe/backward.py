"""Backward: the gradients that the loop's backward passes leave in ``.grad``, before anybody changes them."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from smoothdiag import vectors
from smoothdiag.measure.loss.objective import Objective
from smoothdiag.memory import retried


class Backward:
    """Copies the gradients that the loop's backward passes leave, and notices whether they are written to afterwards.

    The hooks run within the loop's own ``backward`` and never raise an error.

    Args:
        parameters: The coordinates x.
        begun: Called when a backward pass reaches the parameters; its argument says whether gradients were empty.
        averages: Whether gradients are averaged over ranks at the end of ``backward``, where hooks do not see it.

    Attributes:
        was_rewritten: Whether gradients were written to between two backward passes, as by clipping after each.
        fault: The error that prevented a copy, if there was one.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], begun: Callable[[bool], None], *, averages: bool = False
    ) -> None:
        self._parameters, self._begun, self._averages = list(parameters), begun, averages
        # Hooks see the gradients of plain leaves. Gradients of sharded parameters are written later, unseen.
        self._sees = not any(vectors.is_sharded(p) for p in parameters)
        self._handles: list[RemovableHandle] = []
        self._copies: dict[Tensor, Tensor] = {}
        self._left: dict[Tensor, tuple[Tensor, int]] = {}
        self.was_rewritten = False
        self.fault: Exception | None = None

    def arm(self) -> None:
        """Starts to follow backward passes."""
        self.disarm()
        watched = [p for p in self._parameters if p.requires_grad and p.is_leaf]
        if not self._sees or not watched:
            return
        self._handles = [torch.autograd.graph.register_multi_grad_hook(watched, self._on_backward, mode="any")]
        if not self._averages:
            for parameter in watched:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._on_gradient))  # type: ignore[no-untyped-call]

    def disarm(self) -> None:
        """Removes the hooks and forgets everything."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.fault = [], None
        self._forget()

    def left(self, parameters: Sequence[Tensor]) -> list[Tensor] | None:
        """Returns the gradients that backward left, with zeros for missing ones; ``None`` if they are not known.

        They are not known if somebody wrote to the gradients between two backward passes.
        """
        known = all(p in self._copies or p.grad is None for p in parameters)
        if not self._copies or not known or self.was_rewritten or self.fault is not None:
            return None
        return [
            self._copies[p].to_dense() if p in self._copies else torch.zeros_like(p, requires_grad=False)
            for p in parameters
        ]

    def is_untouched(self, parameters: Sequence[Tensor]) -> bool:
        """Returns whether ``.grad`` holds exactly what backward left, also after clipping that changed nothing."""
        if not self._left or any((p in self._left) == (p.grad is None) for p in parameters):
            return False
        # Values are compared, because a GradScaler divides in place without counting up the version.
        pairs = [(self._copies[p].to_dense(), p.grad.to_dense()) for p in self._left if p.grad is not None]
        device = pairs[0][0].device
        return not bool(torch.stack([(a != b).any().to(device) for a, b in pairs]).any())

    def _is_left(self, parameter: Tensor) -> bool:
        left = self._left.get(parameter)
        return left is not None and parameter.grad is left[0] and left[0]._version == left[1]

    def _on_backward(self, gradient: Tensor) -> None:
        if Objective.num_isolated:
            return  # a probe is measuring
        try:
            # Skipped (GradScaler) or abandoned steps leave their batches behind. Empty gradients show that a new
            # accumulation begins.
            fresh = all(p.grad is None or not (self._is_left(p) or p.grad.any()) for p in self._parameters)
            if fresh:
                self._forget()
            elif not all(map(self._is_left, self._left)):
                self.was_rewritten = True
            if self._averages:
                # Averaging is queued after the present callbacks, and the copy is queued after averaging.
                queue = torch.autograd.Variable._execution_engine.queue_callback
                queue(lambda: queue(self._copy_all))
            self._begun(fresh)
        except Exception as error:
            self.fault = error

    def _on_gradient(self, parameter: Tensor) -> None:
        if not Objective.num_isolated:
            self._copy(parameter)

    def _copy_all(self) -> None:
        for parameter in self._parameters:
            self._copy(parameter)

    def _copy(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is None:
            return
        try:
            copy = self._copies.get(parameter)
            if copy is None or copy.is_sparse or gradient.is_sparse or copy.shape != gradient.shape:
                self._copies[parameter] = retried(gradient.detach().clone)
            else:
                retried(partial(copy.copy_, gradient.detach()))
            self._left[parameter] = gradient, gradient._version
        except Exception as error:
            self.fault = error

    def _forget(self) -> None:
        self._copies, self._left, self.was_rewritten = {}, {}, False
