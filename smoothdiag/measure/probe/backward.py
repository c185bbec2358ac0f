"""Backward: the gradients that the loop's backward passes leave in ``.grad``, before anybody changes them."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from smoothdiag import collectives, vectors
from smoothdiag.measure.loss.objective import Objective
from smoothdiag.measure.loss.state import parameters_of
from smoothdiag.memory import retried
from smoothdiag.packing import Packing
from smoothdiag.vectors import Vector

SCALED = 1e-5
"""Largest relative difference of the squared lengths of tensors that were all multiplied by one number."""


class Backward:
    """Notes the gradients that the loop's backward passes leave, and whether they are written to afterwards.

    The hooks run within the loop's own ``backward`` and never raise an error.

    Args:
        parameters: The coordinates x.
        begun: Called when a backward pass reaches the parameters; its argument says whether gradients were empty.
        averages: Whether gradients are averaged over ranks at the end of ``backward``.

    Attributes:
        sees: Whether there is anything to notice: gradients of sharded parameters come in another way.
        was_rewritten: Whether gradients were written to between two backward passes, as by clipping after each.
        fault: The error that prevented a copy, if there was one.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], begun: Callable[[bool], None], *, averages: bool = False
    ) -> None:
        self._parameters, self._begun, self._averages = list(parameters), begun, averages
        # Hooks see the gradients of plain leaves. Gradients of sharded parameters are written later, unseen.
        self.sees = not any(vectors.is_sharded(p) for p in parameters)
        self._handle: RemovableHandle | None = None
        self._packing: Packing | None = None
        self._copies: dict[Tensor, Tensor] = {}
        self._left: dict[Tensor, tuple[Tensor, int]] = {}
        self._marks: Tensor | None = None
        self._num_open = 0
        self.was_rewritten = False
        self.fault: Exception | None = None

    def arm(self, packing: Packing | None) -> None:
        """Starts to follow backward passes.

        Args:
            packing: How x lies in pieces, to mark the gradients by sums; ``None`` copies them.
        """
        self.disarm()
        self._packing = packing
        watched = [p for p in self._parameters if p.requires_grad and p.is_leaf]
        if self.sees and watched:
            self._handle = torch.autograd.graph.register_multi_grad_hook(watched, self._on_backward, mode="any")

    def pause(self) -> None:
        """Removes the hook and keeps the marks."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def disarm(self) -> None:
        """Removes the hook and forgets everything."""
        self.pause()
        self.fault, self._num_open = None, 0
        self._forget()

    def left(self, parameters: Sequence[Tensor]) -> list[Tensor] | None:
        """Returns the gradients that backward left, with zeros for missing ones; ``None`` if they were not copied.

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
        """Returns whether ``.grad`` holds exactly what was copied, also after clipping that changed nothing."""
        if not self._copies or any((p in self._copies) == (p.grad is None) for p in parameters):
            return False
        # Values are compared, because a GradScaler divides in place without counting up the version.
        pairs = [(copy.to_dense(), p.grad.to_dense()) for p, copy in self._copies.items() if p.grad is not None]
        device = pairs[0][0].device
        differ = torch.stack([(a != b).any().to(device) for pair in pairs for a, b in vectors.chunks(*pair)])
        return not collectives.read([differ.any().reshape(1)], {}).any()

    def scale(self, start: Vector) -> float:
        """Returns the positive number that marked gradients have been multiplied by since: 1 if they are untouched.

        NaN if they have changed in another way, or if they were not marked.

        Args:
            start: The parameters as they were when backward ended.
        """
        if self._packing is None or self._marks is None or self.was_rewritten or self.fault is not None:
            return math.nan
        if any((p in self._left) == (p.grad is None) for p in self._parameters):
            return math.nan
        now = self._marks_now(self._packing, start)
        if now.shape != self._marks.shape:
            return math.nan
        then, found = collectives.read([self._marks.reshape(-1), now.reshape(-1)], {}).reshape(2, *now.shape)
        if (then == found).all():
            return 1.0
        counted = then > 0
        ratios = found[counted] / then[counted]
        if not ratios.size or (found[~counted] != 0).any() or not np.ptp(ratios) <= SCALED * ratios.max():
            return math.nan
        return math.sqrt(float(ratios.mean()))

    def _marks_now(self, packing: Packing, x: Vector) -> Tensor:
        """Returns two sums for each tensor of the gradient, in which changes show; both grow with its square."""
        found = []
        for k, piece in enumerate(packing.pieces):
            held = packing.take(k, self._parameters)
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in held]
            both = piece.squares(_with_place, piece.of(gradients), packing.piece(k, x))
            found.append(torch.stack(both).to(held[0].device))
        return torch.cat([sums.to(found[0].device) for sums in found], dim=1)

    def _is_left(self, parameter: Tensor) -> bool:
        left = self._left.get(parameter)
        return left is not None and parameter.grad is left[0] and left[0]._version == left[1]

    def _is_empty(self) -> bool:
        """Returns whether there are no gradients, or none but zeros."""
        held = [p for p in self._parameters if p.grad is not None]
        if any(map(self._is_left, held)):
            return False
        largest = [p.grad.to_dense().abs().max() for p in held if p.grad is not None and p.grad.numel()]
        if not largest:
            return True
        return not collectives.read([x.reshape(1) for x in largest], {}).any()

    def _on_backward(self, gradient: Tensor) -> None:
        if Objective.num_isolated:
            return  # a probe is measuring
        try:
            # Skipped (GradScaler) or abandoned steps leave their batches behind. Empty gradients show that a new
            # accumulation begins.
            fresh = self._is_empty()
            if fresh:
                self._forget()
            elif self._num_open == 0 and not all(map(self._is_left, self._left)):
                self.was_rewritten = True
            self._num_open += 1
            # Gradients are complete at the end. Averaging is queued after the present callbacks, and this after it.
            queue = torch.autograd.Variable._execution_engine.queue_callback
            queue((lambda: queue(self._on_end)) if self._averages else self._on_end)
            self._begun(fresh)
        except Exception as error:
            self.fault = error

    def _on_end(self) -> None:
        self._num_open = max(self._num_open - 1, 0)
        try:
            if self._packing is None:
                for parameter in self._parameters:
                    self._copy(parameter)
            self._left = {p: (p.grad, p.grad._version) for p in self._parameters if p.grad is not None}
            if self._packing is not None and not self._num_open:
                packing = self._packing
                self._marks = retried(lambda: self._marks_now(packing, self._parameters))
        except Exception as error:
            self.fault = error

    def _copy(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is None:
            return
        copy = self._copies.get(parameter)
        if copy is None or copy.is_sparse or gradient.is_sparse or copy.shape != gradient.shape:
            self._copies[parameter] = retried(gradient.detach().clone)
        else:
            retried(partial(copy.copy_, gradient.detach()))

    def _forget(self) -> None:
        self._copies, self._left, self._marks, self.was_rewritten = {}, {}, None, False


def _with_place(gradient: Tensor, x: Tensor) -> list[Tensor]:
    # Lengths do not show turned signs, nor entries that have changed places.
    gradient = vectors.wide(gradient)
    positive = gradient.clamp(min=0)
    return [gradient, positive.addcmul_(positive, vectors.wide(x))]


def check_hooks(model: nn.Module) -> None:
    """Raises a ValueError if a parameter has hooks that run when its gradient is ready.

    Optimizers that are fused into backward have such hooks: every gradient that the probe takes would then move the
    parameters.
    """
    if not any(getattr(p, "_post_accumulate_grad_hooks", None) for p in parameters_of(model)):
        return
    for name, parameter in model.named_parameters():
        hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
        if any(not isinstance(getattr(hook, "__self__", None), Backward) for hook in hooks.values()):
            raise ValueError(
                f"Parameter `model` should have no hooks that act when a gradient is ready. Found one on `{name}`. "
                "Optimizers that step within backward register such hooks, which would also move the parameters during "
                "measurements. Use an ordinary optimizer.step() in runs that you measure."
            )
