"""Findings: what a review finds in a log, without the words for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from smoothdiag.logs.outliers import RULE, Spike

ADVISED: Final = 90
"""Percentile that is advised, as by `clip_rule` without a fit; importing it from there would load scipy."""


@dataclass(frozen=True)
class ThresholdUse:
    """How often clipping at a threshold would have acted on the norms of a log.

    Attributes:
        threshold: Largest gradient norm left alone [f/x].
        origin: Where the threshold comes from.
        clipped: Share of the norms above the threshold.
        clipped_late: Share of the norms above the threshold in the later half of the steps.
        clipped_at_most: Largest share of norms that can have been above the threshold before the run's own clipping;
            equal to `clipped` if that clipping hides none.
    """

    threshold: float
    origin: str
    clipped: float
    clipped_late: float
    clipped_at_most: float


@dataclass(frozen=True)
class Findings:
    """The fields of a `LogReview`, which documents them."""

    num_norms: int
    num_zeros: int
    num_losses: int
    first_step: int
    last_step: int
    interval: float
    percentiles: dict[int, float]
    thresholds: tuple[ThresholdUse, ...]
    spikes: tuple[Spike, ...]
    non_finite: tuple[int, ...]
    pile_up: float
    pile_share: float
    dead_since: int | None = None
    dead_column: str = ""
    dead_rows: int = 0
    notes: tuple[str, ...] = ()

    @property
    def advice(self) -> float:
        """The 90th percentile of the norms, which does not come from a fit [f/x].

        NaN if there are fewer than 20 norms, if the percentile is 0, or if the run's own clipping hides it.
        """
        if self.num_norms < RULE.fewest:
            return math.nan
        value = self.percentiles[ADVISED]
        return math.nan if value == 0 or value >= self.pile_up else value
