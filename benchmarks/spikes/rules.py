"""Published rules for spikes, from the columns that a run leaves behind; each returns the steps it would act on.

Source: OLMo-core, `src/olmo_core/optim/skip_step_optimizer.py`; ZClip (Kumar et al. 2025), `zclip.py`; as released.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd

WINDOW, SIGMAS = 128, 6.0
"""Of OLMo-core; the rule begins when half of the window is full."""

ALPHA, Z_THRESHOLD, EPS, FIRST = 0.97, 2.5, 1e-6, 25
"""Of ZClip."""


def six_sigma(curve: pd.DataFrame) -> list[int]:
    """OLMo-core: loss or gradient norm six standard deviations above the mean of the last 128."""
    found = np.zeros(len(curve), dtype=bool)
    for column in ("loss", "grad_norm"):
        value = curve[column]
        # Newer versions leave values that are not finite out of the statistics, and reject the step.
        past = value.where(np.isfinite(value)).shift(1).rolling(WINDOW, min_periods=2)
        most = past.mean() + SIGMAS * past.std()
        found |= ~(value <= most).to_numpy() | ~np.isfinite(value).to_numpy()
    found[: WINDOW // 2 - 1] = False
    return [int(step) for step in curve["step"][found]]


def z_clip(curve: pd.DataFrame) -> list[int]:
    """ZClip: gradient norms whose score, by moving averages of mean and variance, is above 2.5; without a fixed norm.

    The averages take a clipped norm in place of an outlier. A norm that is not finite would spoil them for ever; here
    it counts as found, and the averages leave it out.
    """
    found: list[int] = []
    mean, variance = np.nan, np.nan
    for step, norm in zip(curve["step"], curve["grad_norm"], strict=True):
        if step < FIRST:
            first = curve["grad_norm"][: step + 1]
            mean, variance = float(first.mean()), float(first.var(ddof=0))
            continue
        deviation = float(np.sqrt(variance))
        z = (norm - mean) / (deviation + EPS)
        if not np.isfinite(norm) or z > Z_THRESHOLD:
            found.append(int(step))
        if np.isfinite(norm):
            kept = mean + Z_THRESHOLD * deviation / (z / Z_THRESHOLD) if z > Z_THRESHOLD else norm
            mean = ALPHA * mean + (1 - ALPHA) * kept
            variance = ALPHA * variance + (1 - ALPHA) * (kept - mean) ** 2
    return found


RULES: dict[str, Callable[[pd.DataFrame], list[int]]] = {
    "six sigma": six_sigma,
    "ZClip": z_clip,
}

GUARDS = {"parameters": "guard", "batches": "guard, batches"}
"""Names of the guard in the table of flags, by what it keeps to answer with."""
