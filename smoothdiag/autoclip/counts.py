"""Counts: how often steps were shortened, without waiting for the device."""

from __future__ import annotations

from torch import Tensor


class Counts:
    """How many steps were shortened and how many gradients were not finite, counted on the device.

    Attributes:
        num_acted: Steps there were.
        clipped: Steps that were longer than allowed.
        skipped: Gradients that were not finite.
        last_skipped: Step of the last of these, or -1.
    """

    def __init__(self) -> None:
        self.num_acted = 0
        self.clipped: Tensor | int = 0
        self.skipped: Tensor | int = 0
        self.last_skipped: Tensor | int = -1

    @property
    def is_at_hand(self) -> bool:
        """Whether reading them does not wait for a device."""
        return not isinstance(self.skipped, Tensor) or self.skipped.device.type == "cpu"

    def add_clipped(self, clipped: Tensor) -> None:
        """Counts a step."""
        self.clipped = self.clipped + clipped.long()

    def add_gradient(self, finite: Tensor, step: int) -> None:
        """Counts the gradient of a step."""
        skipped = self.skipped + (~finite).long()
        # Numbers that become tensors, as in `where`, would be waited for: step where it is not finite, else -1.
        last = ((~finite).long() * (step + 1) - 1).clamp(min=self.last_skipped)
        self.skipped, self.last_skipped = skipped, last  # both, or neither
