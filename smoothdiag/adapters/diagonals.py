"""Diagonals: the preconditioner of an optimizer, computed from its state when it is read, and never held as a copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

from torch import Tensor

from smoothdiag.adapters.updates import number
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


def correction(weight: Any, step: Any) -> Any:
    """Returns 1 - weight^step: how far an average that began at 0 has come.

    Args:
        weight: Weight of the past in the average.
        step: Number of steps.

    Returns:
        A float, as torch's optimizers use it; or a tensor, if a device holds one of the numbers and would have to be
        waited for.
    """
    count = number(step)
    return 1 - number(weight) ** (count.to(widest(count.device)) if isinstance(count, Tensor) else count)
