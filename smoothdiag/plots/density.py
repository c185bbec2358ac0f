"""Many rows at once: clouds as dots or as density, series as a line or as median and range."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from smoothdiag.console import counted
from smoothdiag.plots.common import Array, Mask
from smoothdiag.plots.looks import HOLLOW

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PolyCollection

DENSE: Final = 5000
"""Rows above which a figure shows density, because dots hide each other and a vector file of them opens slowly."""

_SOME: Final = 300
"""Rows that stand for all where too many are hollow."""

_COLUMNS: Final = 250
"""Points of a series that stands for more than `DENSE` rows: about as many as a page can tell apart."""


def draw_density(ax: Axes, x: Array, y: Array, *, cmap: str, **look: Any) -> PolyCollection:
    """Draws the number of rows in each hexagon of a logarithmic plane; the axes should have their limits.

    The numbers are on a logarithmic scale. Rows outside the limits are left out.
    """
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    ticks = [(axis, axis.get_major_locator(), axis.get_major_formatter()) for axis in (ax.xaxis, ax.yaxis)]
    from matplotlib.ticker import NullFormatter

    inside = (x >= left) & (x <= right) & (y >= bottom) & (y <= top)
    wide, high = ax.get_window_extent().width, ax.get_window_extent().height
    cells = int(np.clip(wide / ax.figure.dpi * 11, 15, 60))
    found = ax.hexbin(
        x[inside],
        y[inside],
        xscale="log",
        yscale="log",
        bins="log",
        mincnt=1,
        gridsize=(cells, max(8, int(cells * high / wide / 1.7))),
        extent=tuple(np.log10([left, right, bottom, top])),
        cmap=cmap,
        linewidths=0.1,
        **look,
    )
    ax.set(xlim=(left, right), ylim=(bottom, top))
    for axis, locator, formatter in ticks:  # hexbin makes both axes logarithmic once more
        axis.set_major_locator(locator)
        axis.set_major_formatter(formatter)
        axis.set_minor_formatter(NullFormatter())
    return found


def draw_hollow(ax: Axes, x: Array, y: Array, bad: Mask, size: float, label: str = "", **look: Any) -> None:
    """Draws rows that fits may not use as hollow markers; of many rows a random part, which the label tells."""
    chosen = np.flatnonzero(bad)
    if not len(chosen):
        return
    label = label or f"not usable, {counted(len(chosen), 'row')}"
    if len(chosen) > DENSE // 5:
        label = f"not usable, {_SOME} of {len(chosen)} rows"
        chosen = np.sort(np.random.default_rng(0).choice(chosen, _SOME, replace=False))
    ax.scatter(x[chosen], y[chosen], size, label=label, **HOLLOW | look)


def draw_series(ax: Axes, step: Array, value: Array, *, label: str | None, **look: Any) -> None:
    """Draws values over steps as a line; of many rows the median and the range of each stretch."""
    if len(step) <= DENSE:
        ax.plot(step, value, label=label, **look)
        return
    parts = np.array_split(np.arange(len(step)), _COLUMNS)
    at = np.array([np.median(step[part]) for part in parts])
    low, middle, high = np.array([np.quantile(value[part], [0, 0.5, 1]) for part in parts]).T
    per = int(np.ceil(len(step) / _COLUMNS))
    name = f"{label}, " if label else ""
    line = look | {"marker": look.get("marker") if look.get("markevery") else ""}
    line["markevery"] = max(1, _COLUMNS // 20)
    ax.plot(at, middle, label=f"{name}median of {per} rows", **line)
    ax.fill_between(at, low, high, color=look["color"], alpha=0.25, linewidth=0, label="their range")


def thinned(x: Array, y: Array) -> tuple[Array, Array]:
    """Returns points as they are; of many points the medians of stretches of x."""
    if len(x) <= DENSE:
        return x, y
    parts = np.array_split(np.argsort(x, kind="stable"), _COLUMNS // 4)
    return tuple(np.array([np.median(of[part]) for part in parts]) for of in (x, y))  # type: ignore[return-value]
