"""Where a planted run spikes, by its pair: the run from the same seed, on the same batches, without the plant.

No rule that is judged can know the pair. A step spikes if loss or gradient norm lies more than ``DEVIATIONS`` ordinary
deviations above the pair, and above the median of the ``BEFORE`` steps before it in the run itself. Ordinary is what
the pair does by itself: the standard deviation, over its whole run after warm-up, around the running median. Norms are
compared by their logarithm. A value that is not finite spikes.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from planted import WARM_UP

DEVIATIONS = 5.0
"""Ordinary steps do not pass five standard deviations in a run, if they are normal."""

BEFORE = 20

GAP = 3

LEAST_RATIO = 2.0
"""A norm that is not twice as large is no spike."""


@dataclass(frozen=True)
class Spike:
    """The first spike of a run.

    Attributes:
        step: Its first step.
        last: Its last step: the last before ``GAP`` steps that do not spike.
        column: ``"loss"``, ``"grad_norm"`` or ``"both"``.
        size: How far above the pair [ordinary deviations]; inf if not finite.
    """

    step: int
    last: int
    column: str
    size: float


def excess(run: pd.Series, pair: pd.Series) -> pd.Series:
    """Returns how far the run lies above its pair and above its own past, whichever is less [ordinary deviations]."""
    usual = pair.rolling(2 * BEFORE + 1, center=True, min_periods=BEFORE).median()
    ordinary = float((pair - usual).iloc[WARM_UP:].std())
    past = run.shift(1).rolling(BEFORE, min_periods=BEFORE).median()
    found = np.minimum(run - pair.iloc[: len(run)], run - past) / ordinary
    return found.where(np.isfinite(run), np.inf)


def first_spike(run: pd.DataFrame, pair: pd.DataFrame, start: int) -> Spike | None:
    """Returns the first spike from this step on, or None."""
    with np.errstate(all="ignore"):
        loss = excess(run["loss"], pair["loss"])
        grad_norm = excess(np.log(run["grad_norm"]), np.log(pair["grad_norm"]))
        ratio = run["grad_norm"] / pair["grad_norm"].iloc[: len(run)]
    grad_norm = grad_norm.where((ratio >= LEAST_RATIO) | np.isinf(grad_norm), 0.0)
    sizes = pd.DataFrame({"loss": loss, "grad_norm": grad_norm}).fillna(0.0)[start:]
    hits = sizes[(sizes > DEVIATIONS).any(axis=1)]
    if hits.empty:
        return None
    first = hits.iloc[0]
    gaps = [int(step) for step, following in zip(hits.index, hits.index[1:], strict=False) if following - step > GAP]
    column = "both" if (first > DEVIATIONS).all() else str(first.idxmax())
    last = gaps[0] if gaps else int(hits.index[-1])
    return Spike(int(hits.index[0]), last, column, float(first.max()))
