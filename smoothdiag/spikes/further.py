"""Further signals: what a guard watches on request beside gradient norm and loss, and what it clips for them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from smoothdiag.spikes.statistics import Judged, Statistics


class Further(Protocol):
    """Signals that are known before the optimizer steps.

    Attributes:
        names: What they are called in events.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """See above."""
        ...

    def values(self, step: int, seen: Tensor, shown: Tensor | None) -> Tensor:
        """Returns the value of each signal on a device, without waiting for it.

        Args:
            step: Number of steps before.
            seen: The norm of the gradients as the optimizer gets them.
            shown: The gradient norm that the loop has shown; ``None`` if it did not.
        """
        ...

    def make(self, device: torch.device) -> Statistics:
        """Returns statistics that judge these signals."""
        ...

    def clip(self, judged: Judged) -> None:
        """Shortens what spikes; what does not keeps its bits."""
        ...
