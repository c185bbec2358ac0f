"""Losses: the arguments from which a trainer computed its loss."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from smoothdiag.measure.loss.bookkeeping import Books
from smoothdiag.measure.loss.factors import Factor


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
    factor: Factor
    step: int


def loss_of(found: Any) -> Tensor:
    """Returns the loss from the result of ``compute_loss``, which is a loss or a tuple of loss and outputs."""
    loss: Tensor = found[0] if isinstance(found, tuple) else found
    return loss
