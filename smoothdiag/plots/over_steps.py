"""plot_trace: loss, gradient norm and smoothness over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from smoothdiag.names import readable
from smoothdiag.plots.common import (
    Array,
    Mask,
    as_drawn,
    check_axes,
    floats,
    positive,
    rescales,
    runs_by_name,
    select,
)
from smoothdiag.plots.density import draw_hollow, draw_series
from smoothdiag.plots.looks import NORM, NULL, NULL_REACH, SERIES, extent, head, legend_below, limits, log_axis
from smoothdiag.rows import USABLE_STATUSES

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from smoothdiag.trace import Trace

_COLUMNS = {
    "loss": "loss",
    "grad_norm": f"gradient norm {NORM}\n[loss / parameter]",
    "smoothness": "smoothness $L$\n[loss / parameter$^2$]",
}
_LOG_LOSS = 300.0
"""Largest loss over the smallest above which a linear axis would show only the largest ones."""


def plot_trace(
    data: Trace | pd.DataFrame | Mapping[str, Trace | pd.DataFrame] | Sequence[Trace | pd.DataFrame],
    *,
    estimator: str | None = None,
    group: str = "all",
    ax: Sequence[Axes] | npt.NDArray[np.object_] | None = None,
) -> npt.NDArray[np.object_]:
    """Draws loss, gradient norm and smoothness over the steps, in three panels with one step axis.

    Each run has dashes of its own. A single run also has 2/lr in the last panel, at which the smoothness of plain
    gradient descent settles, unless the trace says that its optimizer rescales gradients. Rows that fits may not use
    are hollow. A note above each panel counts the values that its axis cannot show, and outliers that would squeeze all
    others. More than 5000 rows are drawn as the median and the range of stretches of rows.

    Args:
        data: A trace, or its DataFrame; for several runs a list of these, or a dict of them by name.
        estimator: Name of the estimator whose rows to draw; None takes "local", else "path", else "hessian_norm", else
            the only one there is.
        group: Parameter group whose rows to draw.
        ax: Three axes to draw on; None makes a new figure.

    Returns:
        The three axes, from top to bottom, shape (3,).

    Raises:
        ValueError: If ``data`` has no such rows, or ``ax`` does not hold three axes.

    Units: loss [loss], gradient norm [loss / parameter], smoothness and 2/lr [loss / parameter^2].

    Examples:
        >>> import pandas as pd
        >>> table = pd.DataFrame({"step": [0, 1], "loss": [3.0, 2.0], "grad_norm": [4.0, 2.0], "smoothness": [9, 5]})
        >>> panels = sd.plot_trace(table)
        >>> print([panel.get_ylabel().split()[0] for panel in panels])
        ['loss', 'gradient', 'smoothness']
    """
    runs = {
        name: select(run, estimator, group).sort_values("step", kind="stable")
        for name, run in runs_by_name(data).items()
    }
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
    for panel, column in zip(panels, _COLUMNS, strict=True):
        _draw_panel(panel, runs, column)
        impossible, beyond = _left_out(panel, runs, column)
        title = "Loss, gradient norm, smoothness" if panel is panels[0] else ""
        is_log = column != "loss"
        head(panel, title, group, log=impossible * is_log, linear=impossible * (not is_log), beyond=beyond)
        sns.despine(ax=panel)
    panels[-1].set_xlabel("step")
    legend_below(panels[-1], None)
    return np.asarray(panels, dtype=object)


def _draw_panel(ax: Axes, runs: Mapping[str, pd.DataFrame], column: str) -> None:
    """Draws a column of every run, with limits and a label for its axis."""
    import seaborn as sns

    colors, is_log, hollow = sns.color_palette("colorblind"), column != "loss", "not usable"
    reach = []
    for place, (name, rows) in enumerate(runs.items()):
        step, value, shown = _values(rows, column)
        usable = rows["status"].isin(USABLE_STATUSES).to_numpy()
        dashes, marker = SERIES[place % len(SERIES)]
        dots: dict[str, Any] = {"marker": "." if len(rows) < 200 else ""}
        if len(runs) > 1:
            dots = {"marker": marker, "markevery": max(1, len(rows) // 12)}
        look: dict[str, Any] = {"color": colors[place % len(colors)], "linestyle": dashes, "linewidth": 1, **dots}
        label = as_drawn(name if len(runs) > 1 else readable(rows["estimator"].iloc[0]), in_legend=True)
        good = shown & usable
        draw_series(ax, step[good], value[good], label=label, markersize=4, **look)
        draw_hollow(ax, step, value, shown & ~usable, 14, hollow)
        hollow = "_" + hollow.lstrip("_") if (shown & ~usable).any() else hollow  # one entry stands for all runs
        reach += [np.array(limits(value[shown], is_log=is_log))] if shown.any() else []
    ax.set_ylabel(_COLUMNS[column])
    if not reach:
        return
    low, high = np.concatenate(reach).min(), np.concatenate(reach).max()
    if is_log or (low > 0 and high > _LOG_LOSS * low):
        if column == "smoothness" and len(runs) == 1:
            low, high = extent([np.array([low, high]), _draw_rate(ax, *runs.values(), near=(low, high))])
        log_axis(ax, "y", low, high)
    else:
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        ax.set_ylim(low - margin, high + margin)


def _draw_rate(ax: Axes, rows: pd.DataFrame, *, near: tuple[float, float]) -> Array:
    """Draws 2/lr, and returns its heights near the rows: at rates near zero it would squeeze them."""
    import seaborn as sns

    if not (stable := positive(lr := floats(rows, "lr"))).any() or rescales(rows):
        return np.zeros(0)
    # Rows without a positive rate have no line, rather than a line at infinity.
    line = np.where(stable, 2 / np.where(stable, lr, 1), np.nan)
    look: dict[str, Any] = {"color": sns.color_palette("colorblind")[4], "linestyle": "-.", "linewidth": 1.2}
    low, high = near[0] / NULL_REACH, near[1] * NULL_REACH
    far = ", far above" if line[stable].min() > high else ", far below" if line[stable].max() < low else ""
    ax.step(floats(rows, "step"), line, where="post", label=f"2/lr ({NULL}{far})", **look)
    return line[(line >= low) & (line <= high)]


def _left_out(ax: Axes, runs: Mapping[str, pd.DataFrame], column: str) -> tuple[int, int]:
    """Returns how many values no limits could show, and how many lie outside the limits."""
    impossible = beyond = 0
    bottom, top = ax.get_ylim()
    for rows in runs.values():
        _, value, shown = _values(rows, column)
        impossible += int((~shown).sum())
        beyond += int((shown & ((value < bottom) | (value > top))).sum())
    return impossible, beyond


def _values(rows: pd.DataFrame, column: str) -> tuple[Array, Array, Mask]:
    """Returns steps, values, and which of them an axis can show."""
    step, value = floats(rows, "step"), floats(rows, column)
    return step, value, positive(value) if column != "loss" else np.isfinite(value)
