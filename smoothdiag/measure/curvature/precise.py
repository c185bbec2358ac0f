"""Precise: the same loss in float64, to decide what float32 leaves in doubt."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from smoothdiag import vectors
from smoothdiag.measure.objective import Objective


class Precise(Objective):
    """An objective with parameters, buffers and data in float64 for as long as it is evaluated.

    Differences over ways so short that hardly a kink lies on them need the digits of float64. Not every model runs
    in it: casts and kernels of its own may stand in the way.

    Args:
        objective: The loss.
    """

    def __init__(self, objective: Objective) -> None:
        vars(self).update(vars(objective))
        self._isolated = False
        held = [*self._holders, *self.model.buffers()]
        self._floats = [t for t in held if t.is_floating_point() and not vectors.is_sharded(t)]

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """Saves everything an evaluation may touch and puts it back; cheap when already inside."""
        if self._isolated:
            yield
            return
        with super().isolated():
            narrow = [t.data for t in self._floats]
            for tensor in self._floats:
                tensor.grad = None
                tensor.data = tensor.data.double()
            try:
                yield
            finally:
                for tensor, data in zip(self._floats, narrow, strict=True):
                    tensor.grad = None
                    tensor.data = data

    def _copy(self, tensor: Tensor) -> Tensor:
        twin = super()._copy(tensor)
        return twin.detach().double().requires_grad_(tensor.requires_grad) if twin.is_floating_point() else twin
