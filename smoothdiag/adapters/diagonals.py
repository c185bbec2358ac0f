"""Diagonals: the preconditioner of an optimizer, computed from its state when it is read, and never held as a copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from smoothdiag.vectors import widest


class Diagonals(Sequence[Tensor]):
    """The diagonal of P, a vector whose tensors are computed from the optimizer's state whenever they are read.

    Read it before the optimizer steps again: the state that it shows is always the present one. Two readings of one
    tensor are two computations, so keep what you need twice.

    Args:
        parameters: The parameters, in the order of the vector.
        of: Returns the diagonal for one parameter, as a new tensor.
    """

    def __init__(self, parameters: Sequence[Tensor], of: Callable[[Tensor], Tensor]) -> None:
        self._parameters, self._of = parameters, of

    def __len__(self) -> int:
        return len(self._parameters)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> Diagonals: ...

    def __getitem__(self, index: int | slice) -> Tensor | Diagonals:
        if isinstance(index, slice):
            return Diagonals(self._parameters[index], self._of)
        return self._of(self._parameters[index])


def correction(weight: float | Tensor, step: Any) -> Tensor:
    """Returns 1 - weight^step: how far an average that began at 0 has come.

    Args:
        weight: Weight of the past in the average.
        step: Number of steps.

    Returns:
        A 0-dim float64 tensor on the device that holds the number, so that nobody waits for it. On a CPU it has the
        bits of the Python floats that torch's optimizers compute with.
    """
    count = step.to(widest(step.device)) if isinstance(step, Tensor) else torch.tensor(step, dtype=torch.float64)
    power: Tensor = weight**count
    return 1 - power
