"""Losses: the arguments from which a trainer computed its loss, and the factor that the trainer gave the loss."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smoothdiag.measure.loss.bookkeeping import Books


@dataclass(frozen=True)
class Call:
    """A call of ``compute_loss``: its arguments, the trainer's state at that time, and the factor of the loss.

    Attributes:
        inputs: The micro-batch.
        args: Further arguments.
        kwargs: Arguments by name.
        books: Counts and metrics that the trainer kept at that time; None if the step is not measured.
        factor: The factor that the trainer gave the loss.
        step: Number of the optimizer step that the micro-batch belongs to.
    """

    inputs: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    books: Books | None
    factor: "Factor"
    step: int


class Factor:
    """The factor that a trainer gives a loss before ``backward``.

    Whether a trainer divides the loss by the number of micro-batches depends on its version, its model and its class.
    The factor is read off the backward pass: it is the derivative, with respect to the loss, of the tensor that
    ``backward`` is called on.

    Args:
        scaler: The GradScaler in use, if there is one; its factor is divided out, as before the optimizer steps.
    """

    def __init__(self, scaler: Any = None) -> None:
        self._scaler = scaler
        self._value: Tensor | None = None

    def __deepcopy__(self, memo: object) -> "Factor":
        return self  # the factor is known only later, and belongs to all copies of the micro-batch

    def watch(self, loss: Tensor) -> None:
        """Waits for the backward pass of ``loss``."""
        if loss.requires_grad:
            loss.register_hook(self._take)  # type: ignore[no-untyped-call]

    @property
    def value(self) -> Tensor:
        """The factor, in the shape of the loss."""
        if self._value is None:
            raise RuntimeError(
                "The trainer did not call backward on the loss that its compute_loss returned, so the factor of "
                "this loss in the step is unknown."
            )
        return self._value

    def _take(self, gradient: Tensor) -> None:
        value = gradient.detach()
        self._value = value.clone() if self._scaler is None else value / self._scaler.scale(torch.ones_like(value))


def loss_of(found: Any) -> Tensor:
    """Returns the loss from the result of ``compute_loss``, which is a loss or a tuple of loss and outputs."""
    loss: Tensor = found[0] if isinstance(found, tuple) else found
    return loss
