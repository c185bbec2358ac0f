"""plot_trace: loss, gradient norm and smoothness over the steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from smoothdiag.plots.common import (
    HOLLOW,
    NORM,
    as_drawn,
    check_axes,
    extent,
    floats,
    legend_below,
    log_axis,
    note,
    positive,
    select,
)
from smoothdiag.rows import USABLE_STATUSES

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from matplotlib.axes import Axes

    from smoothdiag.trace import Trace


def plot_trace(
    data: Trace | pd.DataFrame,
    *,
    estimator: str | None = None,
    group: str = "all",
    ax: Sequence[Axes] | npt.NDArray[np.object_] | None = None,
) -> npt.NDArray[np.object_]:
    """Draws loss, gradient norm and smoothness over the steps, in three panels with one step axis.

    The last panel also shows 2/lr, at which the smoothness of plain gradient descent settles. Rows that fits may not
    use are hollow. Values that an axis cannot show are counted in a note above their panel.

    Args:
        data: A trace, or its DataFrame.
        estimator: Name of the estimator whose rows to draw; None takes "local", else "path", else "hessian_norm", else
            the only one there is.
        group: Parameter group whose rows to draw.
        ax: Three axes to draw on; None makes a new figure.

    Returns:
        The three axes, from top to bottom, shape (3,).

    Raises:
        ValueError: If ``data`` has no such rows, or ``ax`` does not hold three axes.

    Units: loss [f], gradient norm [f/x], smoothness and 2/lr [f/x^2].

    Examples:
        >>> import pandas as pd
        >>> table = pd.DataFrame({"step": [0, 1], "loss": [3.0, 2.0], "grad_norm": [4.0, 2.0], "smoothness": [9, 5]})
        >>> panels = sd.plot_trace(table)
        >>> print([panel.get_ylabel().split()[0] for panel in panels])
        ['loss', 'gradient', 'smoothness']
    """
    rows = select(data, estimator, group).sort_values("step", kind="stable")
    if ax is not None:
        check_axes("ax", ax, 3)

    import seaborn as sns
    from matplotlib import pyplot as plt

    if ax is None:
        width, height = plt.rcParams["figure.figsize"]
        figure, panels = plt.subplots(3, sharex=True, layout="constrained", figsize=(width, 1.2 * height))
        figure.align_ylabels(panels)
    else:
        panels = np.asarray(ax, dtype=object).ravel()
    colors = sns.color_palette("colorblind")
    step, usable = floats(rows, "step"), rows["status"].isin(USABLE_STATUSES).to_numpy()
    labels = ("loss [f]", f"gradient norm\n{NORM} [f/x]", "smoothness\n$L$ [f/x$^2$]")
    for panel, column, label in zip(panels, ("loss", "grad_norm", "smoothness"), labels, strict=True):
        value, log = floats(rows, column), column != "loss"
        shown = positive(value) if log else np.isfinite(value)
        good, bad = shown & usable, shown & ~usable
        name = as_drawn(rows["estimator"].iloc[0], in_legend=True) if column == "smoothness" else None
        marker = "." if len(rows) < 200 else ""
        panel.plot(step[good], value[good], color=colors[0], linewidth=1, marker=marker, markersize=4, label=name)
        if bad.any():
            panel.scatter(step[bad], value[bad], 14, label="not usable", **HOLLOW)
        panel.set_ylabel(label)
        note(panel, int((~shown).sum()), "zero, < 0, inf, NaN" if log else "inf, NaN")
        reach = [value[shown]]
        if column == "smoothness" and (stable := positive(lr := floats(rows, "lr"))).any():
            # Rows without a positive rate have no line, rather than a line at infinity.
            line = np.where(stable, 2 / np.where(stable, lr, 1), np.nan)
            panel.step(step, line, where="post", color=colors[4], linestyle="-.", linewidth=1.2, label="2/lr (null)")
            reach.append(line[stable])
        if log and shown.any():
            log_axis(panel, "y", *extent(reach))
        sns.despine(ax=panel)
    panels[-1].set_xlabel("step")
    legend_below(panels[-1], None)
    return np.asarray(panels, dtype=object)
