"""Losses: what a trainer computed its loss from, and the factor it gave it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smoothdiag.measure.loss.bookkeeping import Books


@dataclass(frozen=True)
class Call:
    """What ``compute_loss`` was called with, what its trainer kept then, and what became of its result.

    Attributes:
        inputs: The micro-batch.
        args: Further arguments.
        kwargs: Arguments by name.
        books: Those of the trainer; None where nothing is going to be measured.
        factor: That of the loss.
    """

    inputs: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    books: Books | None
    factor: "Factor"


class Factor:
    """The factor that a trainer gives a loss before ``backward``.

    Whether it divides by the number of micro-batches depends on its version, its model and its class. The derivative of
    what it calls ``backward`` on with respect to the loss is the factor, whatever it does.

    Args:
        scaler: The GradScaler in use, if there is one: its factor is taken out again before the optimizer steps.
    """

    def __init__(self, scaler: Any = None) -> None:
        self._scaler = scaler
        self._value: Tensor | None = None

    def watch(self, loss: Tensor) -> None:
        """Waits for the backward pass of ``loss``."""
        if loss.requires_grad:
            loss.register_hook(self._take)  # type: ignore[no-untyped-call]

    @property
    def value(self) -> Tensor:
        """The factor; of the shape of the loss."""
        if self._value is None:
            raise RuntimeError("The trainer called no backward on the loss that its compute_loss returned.")
        return self._value

    def _take(self, gradient: Tensor) -> None:
        value = gradient.detach()
        self._value = value.clone() if self._scaler is None else value / self._scaler.scale(torch.ones_like(value))


def loss_of(found: Any) -> Tensor:
    """Returns the loss of what ``compute_loss`` returns: a loss, or a loss and outputs."""
    loss: Tensor = found[0] if isinstance(found, tuple) else found
    return loss
