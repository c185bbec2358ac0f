"""Axes to draw on, and the artists that a figure has drawn, found by their labels."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

NARROW, WIDE = 3.3, 6.4  # inches: a column of a two-column paper, and the whole width


def axes(width: float = WIDE) -> Axes:
    return Figure((width, width), layout="constrained").add_subplot()


def labels(ax: Axes) -> list[str]:
    return ax.get_legend_handles_labels()[1]


def labelled(ax: Axes, label: str) -> Any:
    """The one artist with this label."""
    handles, names = ax.get_legend_handles_labels()
    (found,) = [handle for handle, name in zip(handles, names, strict=True) if name == label]
    return found


def starting(ax: Axes, start: str) -> Any:
    """The one artist whose label begins with ``start``."""
    handles, names = ax.get_legend_handles_labels()
    (found,) = [handle for handle, name in zip(handles, names, strict=True) if name.startswith(start)]
    return found
