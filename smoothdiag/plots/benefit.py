"""plot_benefit: whether clipping would have been worth it, step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np

from smoothdiag import arguments
from smoothdiag.plots.common import as_table, check_axes, floats
from smoothdiag.plots.looks import current_axes, head, legend_below
from smoothdiag.rows import BENEFIT_BEFORE, BENEFIT_HELD_OUT, CLIP_BENEFIT, NOTES

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

NAMES: Final = {
    CLIP_BENEFIT: "the step's own batch",
    BENEFIT_BEFORE: "the batch before",
    BENEFIT_HELD_OUT: "held-out batches",
}
"""The data on which clipping is judged, by column."""

MARKERS: Final = ("o", "s", "^")


def plot_benefit(data: Any, *, ax: Axes | None = None) -> Axes:
    """Draws how much lower the loss would be, had long steps been clipped, over the steps.

    Above the line at zero, clipping would have lowered the loss; below it, clipping would have done harm. The step's
    own batch, from which the step was computed, flatters long steps; held-out batches do not. Beyond half of all values
    the axis is logarithmic on both sides.

    Args:
        data: An AutoClip in shadow mode, a SpikeGuard, their ``benefits`` or ``history``, or the trace of the probe.
        ax: Axes to draw on; None takes the current axes.

    Returns:
        The axes.

    Raises:
        ValueError: If nothing is known about any step, as when none was too long.

    Units: [loss].

    Examples:
        >>> import pandas as pd, matplotlib.pyplot as plt
        >>> benefits = pd.DataFrame({"step": [3, 9], "clip_benefit": [0.2, -0.1]})
        >>> ax = sd.plot_benefit(benefits, ax=plt.subplots()[1])  # or sd.plot_benefit(clipper)
        >>> print(ax.get_legend_handles_labels()[1])
        ["the step's own batch: lower at 1 of 2"]
    """
    if ax is not None:
        check_axes("ax", ax)
    found = _table(data)
    series = {name: floats(found, name) for name in NAMES if name in found}
    series = {name: values for name, values in series.items() if np.isfinite(values).any()}
    if not series:
        raise ValueError(
            "Parameter `data` should have steps at which clipping was judged: an AutoClip in shadow mode, or a "
            'SpikeGuard with `keep="parameters"`. Found none, so no step was too long, or none was looked at.'
        )

    import seaborn as sns

    ax = current_axes() if ax is None else ax
    colors = sns.color_palette("colorblind")
    step, every = floats(found, "step"), np.concatenate(list(series.values()))
    sizes = np.abs(every[np.isfinite(every) & (every != 0)])
    ax.set_yscale("symlog", linthresh=float(np.median(sizes)) if sizes.size else 1.0)
    ax.axhline(0, color="0.25", linewidth=0.9, zorder=1)
    for (name, values), marker, color in zip(series.items(), MARKERS, colors, strict=False):
        known = np.isfinite(values)
        label = f"{NAMES[name]}: lower at {int((values[known] > 0).sum())} of {int(known.sum())}"
        ax.plot(step[known], values[known], marker, color=color, markersize=4.5, alpha=0.8, label=label)
    ax.set(xlabel="step", ylabel="loss lower by, had the\nstep been clipped [loss]")
    head(ax, "Was clipping worth it?")
    sns.despine(ax=ax)
    legend_below(ax, None, ncols=1)
    return ax


def recorded(frame: pd.DataFrame) -> pd.DataFrame:
    """Returns what clipping would have been worth at the steps of a trace, one row for each that was judged."""
    import pandas as pd

    rows = frame[frame["estimator"].isin(NOTES)].reindex(columns=["step", "clip_share", *NAMES])
    rows = rows.apply(pd.to_numeric, errors="coerce")
    found: pd.DataFrame = rows[rows[list(NAMES)].notna().any(axis=1)]
    return found.sort_values("step", kind="stable", ignore_index=True)


def _table(data: Any) -> pd.DataFrame:
    """Returns the benefits that an object knows of."""
    if hasattr(data, "benefits"):
        return cast("pd.DataFrame", data.benefits)
    found = data.history if hasattr(data, "history") else data
    if hasattr(found, "to_frame"):
        found = as_table(found)
    import pandas as pd

    if not isinstance(found, pd.DataFrame) or "step" not in found:
        raise arguments.wrong("data", "an AutoClip, a SpikeGuard, or the trace of a probe", data)
    if "estimator" in found:
        return recorded(found)
    if "signal" in found:  # the history of a guard judges by the batch before
        return found.drop_duplicates("step").rename(columns={CLIP_BENEFIT: BENEFIT_BEFORE})
    return found
