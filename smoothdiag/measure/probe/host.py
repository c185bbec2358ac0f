"""Host: memory for two vectors outside the device, where the ends of a measured step wait until they are needed."""

from typing import Literal

from torch import Tensor

from smoothdiag.packing import Packing

Where = Literal["cpu"]


class HostMemory:
    """Memory for the start and the end of a step, made once; nothing, if they are to stay on the device.

    Args:
        where: "cpu", or ``None`` to keep both on the device.
    """

    def __init__(self, where: Where | None) -> None:
        self._where = where
        self._packing: Packing | None = None
        self._ends: list[list[Tensor]] = []

    def start(self, packing: Packing) -> list[Tensor] | None:
        """Returns memory for the start of a step."""
        return self._end(0, packing)

    def end(self, packing: Packing) -> list[Tensor] | None:
        """Returns memory for the end of a step."""
        return self._end(1, packing)

    def _end(self, number: int, packing: Packing) -> list[Tensor] | None:
        if self._where is None:
            return None
        if packing is not self._packing:
            self._packing, self._ends = packing, []  # first of all, lets go of the memory of another packing
            self._ends = [packing.host_memory(), packing.host_memory()]
        return self._ends[number]
