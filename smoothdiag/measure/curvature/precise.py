"""Precise: the same loss in float64, for decisions that float32 leaves in doubt."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import Tensor

from smoothdiag import vectors
from smoothdiag.measure.loss.faults import put_back
from smoothdiag.measure.loss.isolation import narrow
from smoothdiag.measure.loss.objective import Objective


class Precise(Objective):
    """An objective with parameters, buffers and data in float64 for as long as it is evaluated.

    Displacements so short that they hardly cross a kink need the digits of float64. Not every model runs in float64:
    its own casts and kernels may prevent it.

    Args:
        objective: The loss.
    """

    def __init__(self, objective: Objective) -> None:
        vars(self).update(vars(objective))
        self._isolated = None

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """Saves everything an evaluation may touch and puts it back; cheap when already inside."""
        if self._isolated is not None:
            yield
            return
        with super().isolated(), ExitStack() as undo:
            assert self._isolated is not None
            for tensor in vectors.unique(self._isolated.holders, self.model.buffers()):
                if tensor.is_floating_point() and not vectors.is_sharded(tensor):
                    undo.callback(put_back, partial(narrow, tensor, tensor.data), "parameters in their own dtype")
                    tensor.grad = None
                    tensor.data = tensor.data.double()
            yield

    def _copy(self, tensor: Tensor) -> Tensor:
        twin = super()._copy(tensor)
        return twin.detach().double().requires_grad_(tensor.requires_grad) if twin.is_floating_point() else twin
