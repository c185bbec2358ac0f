"""Warm-ups: whether a learning rate is on its way to the peak that its schedule has planned."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from smoothdiag.adapters import Group
from smoothdiag.autoclip.calibration import PHASE

LONGEST_WARM_UP = 100_000
"""Steps of the longest warm-up that is believed: published ones have a few thousand."""


class WarmUp(NamedTuple):
    """What is known of the way of a learning rate up to the peak that its schedule left in the group.

    The planned peak is believed until the rate falls before it, or has not risen for thirty steps. While the rate rises
    so slowly that it would need 100,000 steps, the peak is doubted: some schedules multiply a rate of 1 that is never
    reached.

    Attributes:
        rate: Rate of the last step [x^2/f]; NaN before the first.
        highest: Largest rate so far [x^2/f].
        still: Steps since it rose.
        believed: Whether the planned peak may be reached.
        slow: Whether the rate rises too slowly for it.
    """

    rate: float = math.nan
    highest: float = 0.0
    still: int = 0
    believed: bool = True
    slow: bool = False

    def after(self, rate: float, group: Group) -> WarmUp:
        """Returns what is known after a step at ``rate``."""
        rise, way = rate - self.rate, planned(group) - rate
        fell, still = rate < self.rate, 0 if rate > self.highest else self.still + 1
        believed = self.believed and not (way > 0 and (fell or still >= PHASE))
        # A cycle says its peak; it may begin as slowly as it likes.
        slow = self.slow if rise == 0 else way > LONGEST_WARM_UP * rise and "max_lr" not in group
        return WarmUp(rate, max(rate, self.highest), still, believed, slow)

    def peak(self, group: Group) -> float:
        """Returns the rate to count with."""
        return max(self.highest, planned(group)) if self.believed and not self.slow else self.highest


def planned(group: Group) -> float:
    """Returns the largest rate that a schedule of torch plans for a group; 0 without a schedule, or on a device."""
    rates = [group[name] for name in ("initial_lr", "max_lr") if name in group]
    known = [float(rate) for rate in rates if not isinstance(rate, Tensor) or rate.device.type == "cpu"]
    return max(known, default=0.0)
