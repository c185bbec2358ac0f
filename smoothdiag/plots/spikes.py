"""plot_spikes: a run over its steps, with its spikes and their causes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from smoothdiag import arguments
from smoothdiag.plots.common import as_table, check_axes, floats, positive
from smoothdiag.plots.density import draw_series
from smoothdiag.plots.looks import current_axes, extent, head, legend_below, log_axis
from smoothdiag.rows import SPIKE

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from smoothdiag.trace import Trace

CAUSES: Final = ("data", "edge", "optimizer", "numerics", "unknown")
"""Causes in the order of their colours and markers."""

MARKERS: Final = ("o", "^", "s", "D", "X")

NUMBERS: Final = ("value", "usual", "deviations")
"""Columns of each signal of a spike; in a trace their names begin with that of the signal."""

WORDS: Final = ("done", "cause", "explanation")
"""Columns of each spike."""

SIGNAL: Final = re.compile(r"grad_norm of \S+|\S+")
"""A signal in the list that a trace keeps: that of a module has two blanks."""

COLUMNS: Final = ("step", "signal", "value", "usual", "done", "cause")


class Guard(Protocol):
    """Anything with a history of spikes, such as a SpikeGuard."""

    @property
    def history(self) -> pd.DataFrame:
        """The spikes, one row for each signal."""
        ...


def plot_spikes(
    data: Guard | Trace | pd.DataFrame, *, log: pd.DataFrame | None = None, signal: str = "loss", ax: Axes | None = None
) -> Axes:
    """Draws the spikes of a run over its steps, coloured by cause, on the curve of the run.

    A thin line leads from what was usual to the spike. Spikes that are not finite stand at the top of the axes. A
    hollow marker is a spike that the guard skipped or clipped.

    Args:
        data: A SpikeGuard, its ``history``, or the trace of its probe, also as a table.
        log: The curve of the run, with the columns ``step`` and ``signal``; ``None`` draws what the rows of a trace
            tell, or else none.
        signal: Which signal to draw: ``"loss"``, ``"grad_norm"``, ``"update_norm"``, or that of a module, such as
            ``"grad_norm of layers.3"``.
        ax: Axes to draw on; None takes the current axes.

    Returns:
        The axes.

    Raises:
        ValueError: If a table lacks columns, or there is neither a curve nor a spike of this signal.

    Examples:
        >>> import pandas as pd, matplotlib.pyplot as plt
        >>> spike = {"step": 80, "signal": "loss", "value": 9.0, "usual": 2.0, "done": "logged", "cause": "data"}
        >>> ax = sd.plot_spikes(pd.DataFrame([spike]), ax=plt.subplots()[1])  # or sd.plot_spikes(guard)
        >>> print(ax.get_legend_handles_labels()[1])
        ['data (1)']
    """
    if ax is not None:
        check_axes("ax", ax)
    found = data.history if hasattr(data, "history") else data
    if hasattr(found, "to_frame") or {"estimator", "status"} <= set(getattr(found, "columns", ())):  # a trace
        frame = as_table(found)
        found, log = recorded(frame), measured(frame, signal) if log is None else log
    history = _checked("data", found, COLUMNS)
    curve = None if log is None else _checked("log", log, ("step", signal))
    rows = history[history["signal"] == signal]
    if rows.empty and (curve is None or curve.empty):
        raise ValueError(
            "Parameter `signal` should name a signal that spiked, or have a curve in `log`. Found "
            f"`signal = {signal!r}` with spikes of {sorted(set(history['signal'])) or 'nothing'}."
        )

    import seaborn as sns

    ax = current_axes() if ax is None else ax
    colors = sns.color_palette("colorblind")
    step, value, usual = (floats(rows, name) for name in ("step", "value", "usual"))
    lines = [] if curve is None else [(floats(curve, "step"), floats(curve, signal))]
    shown = [part for part in (value, usual, *(y for _, y in lines)) if positive(part).any()]
    low, high = extent(shown) if shown else (0.1, 10.0)
    log_axis(ax, "y", low, high)
    for x, y in lines:
        draw_series(ax, x, np.where(positive(y), y, np.nan), label=signal, color="0.6", linewidth=0.9, zorder=1)
    top = ax.get_ylim()[1]
    height = np.where(positive(value), value, top)
    for number, (cause, marker) in enumerate(zip(CAUSES, MARKERS, strict=True)):
        mine = (rows["cause"] == cause).to_numpy()
        if not mine.any():
            continue
        color = "0.25" if cause == "unknown" else colors[number]
        known = mine & positive(usual)
        ax.vlines(step[known], usual[known], height[known], color=color, linewidth=0.8, alpha=0.6, zorder=2)
        look: dict[str, Any] = {"marker": marker, "markersize": 5.5, "linestyle": "none", "zorder": 3, "clip_on": False}
        is_hollow = (rows["done"] != "logged").to_numpy()
        label: str | None = f"{cause} ({int(mine.sum())})"
        for chosen, fill in ((mine & ~is_hollow, color), (mine & is_hollow, "white")):
            if chosen.any():
                ax.plot(
                    step[chosen], height[chosen], color=color, markerfacecolor=fill, markeredgecolor=color, label=label,
                    **look,
                )  # fmt: skip
                label = None
    ax.set(xlabel="step", ylabel=signal)
    head(ax, "Spikes, and why", log=0)
    sns.despine(ax=ax)
    if ax.get_legend_handles_labels()[1]:
        legend_below(ax, None, ncols=3)
    return ax


def measured(frame: pd.DataFrame, signal: str) -> pd.DataFrame | None:
    """Returns the values of a signal in the other rows of a trace, one for each step; ``None`` if there are none."""
    if not {"step", "estimator", "group", signal} <= set(frame.columns):
        return None
    rows: pd.DataFrame = frame[(frame["estimator"] != SPIKE) & (frame["group"] == "all")]
    rows = rows[rows[signal].notna()].drop_duplicates("step")
    return rows if len(rows) else None


def recorded(frame: pd.DataFrame) -> pd.DataFrame:
    """Returns the spikes in the rows of a trace, as the ``history`` of a guard has them, with the reasons in words."""
    import pandas as pd

    rows = frame[frame["estimator"] == SPIKE] if "spiked" in frame else frame[:0]
    found = [
        (row["step"], name, *(row.get(f"{name}_{part}") for part in NUMBERS), *(row.get(part) for part in WORDS))
        for row in rows.to_dict("records")
        if isinstance(row["spiked"], str)
        for name in SIGNAL.findall(row["spiked"])
    ]
    history = pd.DataFrame(found, columns=["step", "signal", *NUMBERS, *WORDS])
    for name in NUMBERS:  # a trace written by hand may lack some
        history[name] = pd.to_numeric(history[name], errors="coerce")
    return history.fillna(dict.fromkeys(WORDS, ""))


def _checked(name: str, table: Any, columns: tuple[str, ...]) -> pd.DataFrame:
    """Returns a table with these columns; a ValueError if it is none."""
    import pandas as pd

    requirement = "a SpikeGuard or its history" if name == "data" else "a table with a row for each step"
    if not isinstance(table, pd.DataFrame):
        raise arguments.wrong(name, requirement, table)
    if missing := [column for column in columns if column not in table]:
        raise ValueError(f"Parameter `{name}` should be {requirement}. Found no column {', '.join(missing)}.")
    return table
