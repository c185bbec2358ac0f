"""Spiking: when a value counts as a spike, for logs that are read afterwards and for runs that are watched."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from smoothdiag import arguments

if TYPE_CHECKING:
    import pandas as pd

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

IQR_OF_NORMAL: Final = 1.349
"""The interquartile range of a normal distribution, in standard deviations."""


@dataclass(frozen=True)
class SpikeRule:
    """A value is a spike if it lies far above the values before it, in robust standard deviations and as a ratio.

    Gradient norms, and the lengths of updates, are compared by their logarithm. Values that are not finite, and norms
    of 0, are left out of the values before. Spikes themselves are not: the median hardly notices them.

    Args:
        window: How many of the last values count.
        fewest: With fewer values than this, nothing is a spike.
        deviations: Least distance from the median, in robust standard deviations (interquartile range / 1.349).
        least_ratio: Least ratio of a norm to the median.
        least_rise: Least distance of a loss from the median, as a share of the median.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> import numpy as np
        >>> norms = np.where(np.arange(100) == 80, 9.0, 1 + 0.1 * np.sin(np.arange(100)))
        >>> is_spike, usual = sd.SpikeRule().find(norms, is_norm=True)
        >>> print(np.flatnonzero(is_spike), usual[80].round(1))
        [80] 1.0
    """

    window: int = 50
    fewest: int = 20
    deviations: float = 6.0
    least_ratio: float = 2.0
    least_rise: float = 0.1

    def __post_init__(self) -> None:
        arguments.whole("window", self.window, 4)
        arguments.whole("fewest", self.fewest, 4)
        if self.fewest > self.window:
            raise arguments.wrong("fewest", f"at most `window = {self.window}`", self.fewest)
        arguments.positive("deviations", self.deviations)
        arguments.number("least_ratio", self.least_ratio, "at least 1 and finite", lambda v: 1 <= v < math.inf)
        arguments.number("least_rise", self.least_rise, "at least 0 and finite", lambda v: 0 <= v < math.inf)

    def find(self, values: npt.ArrayLike, *, is_norm: bool) -> tuple[Mask, Array]:
        """Returns which values are spikes, and the median of the values before each.

        Args:
            values: One value for each step.
            is_norm: Whether the values are norms, which are compared by their logarithm, and not losses.
        """
        import pandas as pd

        value = np.asarray(values, dtype=np.float64)
        keep = np.isfinite(value) & ((value > 0) if is_norm else True)
        found, usual = np.zeros(len(value), dtype=np.bool_), np.full(len(value), math.nan)
        scale = pd.Series(np.log(value[keep]) if is_norm else value[keep])
        found[keep], middle = self._far(scale, is_norm=is_norm)
        usual[keep] = np.exp(middle) if is_norm else middle
        return found, usual

    def _far(self, scale: pd.Series, *, is_norm: bool) -> tuple[Mask, Array]:
        before = scale.shift(1).rolling(self.window, min_periods=self.fewest)
        usual = before.median()
        least = 0 * usual + math.log(self.least_ratio) if is_norm else self.least_rise * usual.abs()
        far = scale - usual >= least
        if far.any():  # quantiles of all windows take twice as long as their medians
            deviation = (before.quantile(0.75) - before.quantile(0.25)) / IQR_OF_NORMAL
            far &= scale - usual > self.deviations * deviation
        return far.to_numpy(dtype=np.bool_), usual.to_numpy(dtype=np.float64)

    @property
    def text(self) -> str:
        """What a spike is, in words, indented by two blanks."""
        return (
            f"  A spike lies more than {self.deviations:g} robust standard deviations (interquartile range / "
            f"{IQR_OF_NORMAL}) above the\n"
            f"  median of the {self.window} rows before it (at least {self.fewest}). Gradient norms are compared by "
            "their logarithm and must\n"
            f"  be at least {self.least_ratio:g} times the median. Losses must be at least {self.least_rise:.0%} above "
            "the median."
        )
