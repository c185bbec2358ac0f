"""Learning rates and thresholds that the cited theorems choose for fitted constants."""

from __future__ import annotations

import pandas as pd

from smoothdiag.clipping.trust import check_fit
from smoothdiag.fits.base import SmoothnessFit


def clip_table(fit: SmoothnessFit) -> pd.DataFrame:
    """The choices of the cited theorems for the fitted constants, side by side.

    Each row holds the rate for small gradients, the longest step and the threshold, for plain descent without momentum.
    Constants of zero give infinite rates or steps, as the formulas do.

    1. Zhang 2019 also bounds the step by 1 and the threshold by 10 L0. These bounds are left out, because their units
       do not fit.

    Args:
        fit: from `fit_smoothness`; the verdict makes no difference.

    Returns:
        DataFrame: columns `max_lr`, `step_cap`, `threshold`, one row per source.

    Units: max_lr [x^2/f], step_cap [x], threshold [f/x].

    Source: Zhang et al., 2020 (arXiv 2019), Theorem 3; Pethick et al., 2025, Theorem 4.3 with threshold L0/L1;
        Vankov et al., 2024, clipped descent.
    """
    check_fit(fit)
    rate, cap = fit.max_lr, fit.step_cap
    ratio = fit.L0 * cap if fit.L0 > 0 else 0.0
    rows = {
        "Zhang 2019": (rate / 10, cap / 10, ratio),
        "Pethick 2025": (rate / 2, cap / 2, ratio),
        "Vankov 2024": (rate / 2, cap / 3, 2 / 3 * ratio),
    }
    return pd.DataFrame.from_dict(rows, orient="index", columns=["max_lr", "step_cap", "threshold"])
