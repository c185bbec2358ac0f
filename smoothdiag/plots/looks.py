"""How all figures look: units, limits that show the rows, titles, notes and legends."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from smoothdiag.console import counted
from smoothdiag.names import VERDICTS
from smoothdiag.plots.common import Array, Mask, as_drawn, positive

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from smoothdiag.fits.base import Interval, SmoothnessFit

HOLLOW: Final[dict[str, Any]] = {"facecolors": "none", "edgecolors": "0.5", "linewidths": 0.8}
NORM: Final = r"$\|g\|$"

GRAD_NORM: Final = f"gradient norm {NORM} [loss / parameter]"
SMOOTHNESS: Final = "smoothness $L$ [loss / parameter$^2$]"
L0_LABEL: Final = "$L_0$ [loss / parameter$^2$]"
L1_LABEL: Final = "$L_1$ [1 / parameter]"

NULL: Final = "artefact line"
"""What the legend says of lines that measurements can follow whatever the loss is."""

NULL_REACH: Final = 10.0
"""Factor by which a null line may stretch an axis beyond the points. If a ceiling lies three decades above them, a
label says so just as well, and the points are not squeezed into a stripe."""

SERIES: Final = (("-", "o"), ("--", "s"), ("-.", "^"), (":", "D"), ((0, (5, 1, 1, 1, 1, 1)), "v"), ((0, (6, 2)), "P"))
"""Dashes and marker of each line of a panel, in the order of the palette."""

_WIDEST: Final = 0.8
"""Share of the figure beyond which a legend does not fit beside the labels; its widest entry is broken."""

_LINE, _LINES = 20, 3
"""Characters in a line of a name that is broken, and most lines."""

_FEW: Final = 20
"""Rows below which none counts as an outlier."""

_OUTLIERS: Final = 0.02
"""Largest share of the rows, at either end, that may lie outside the limits, beside one row."""


def current_axes() -> Axes:
    """Returns the current axes, or the axes of a new figure with room for a legend below them."""
    from matplotlib import pyplot as plt

    if not plt.get_fignums():
        plt.figure(layout="constrained")
    return plt.gca()


def extent(parts: Sequence[Array]) -> tuple[float, float]:
    """Returns the smallest and the largest of the values that a logarithmic axis can show."""
    values = np.concatenate([part[positive(part)] for part in parts])
    return float(values.min()), float(values.max())


def limits(values: Array, *, is_log: bool = True) -> tuple[float, float]:
    """Returns the limits that show the rows: outliers stay outside if they would squeeze all others.

    A value is an outlier if it lies further beyond the range of the inner 96% than this range is wide; on a logarithmic
    axis also at least a decade beyond it.

    Args:
        values: The values that the axis can show, at least one.
        is_log: Whether the axis is logarithmic.
    """
    ordered = np.sort(np.log10(values) if is_log else values)
    if len(ordered) >= _FEW:
        out = 1 + int(np.ceil(_OUTLIERS * len(ordered)))
        low, high = ordered[out], ordered[-1 - out]
        reach = max(high - low, 1.0 if is_log else 0.0) or np.inf
        ordered = ordered[(ordered >= low - reach) & (ordered <= high + reach)]
    ends = (ordered[0], ordered[-1])
    return (float(10 ** ends[0]), float(10 ** ends[1])) if is_log else (float(ends[0]), float(ends[1]))


def is_log_spaced(steps: Array) -> bool:
    """Returns whether steps span decades and lie denser where they are small, so that a linear scale hides most."""
    known = steps[positive(steps)]
    if not known.size:
        return False
    return bool(known.max() >= 100 * known.min() and np.median(known) < known.max() / 4)


def log_axis(ax: Axes, name: Literal["x", "y"], low: float, high: float) -> None:
    """Makes an axis logarithmic over [low, high], with margins, few ticks and readable labels."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    # At least 2/3 of a decade, so that a cloud without range looks like one and the axis has two labels.
    decades = float(np.log10(high / low))
    margin = max(0.05 * decades, (2 / 3 - decades) / 2, 0.03)
    ax.set(**{f"{name}scale": "log", f"{name}lim": (low / 10**margin, high * 10**margin)})
    axis = ax.xaxis if name == "x" else ax.yaxis
    powers = np.floor(np.log10(high) + margin) - np.ceil(np.log10(low) - margin) + 1
    if decades < 1.5 or powers < 2:  # powers of ten alone would label one tick or none
        subs = (1, 3) if decades > 1.5 else (1, 2, 5) if decades > 0.9 else (1, 1.5, 2, 3, 5, 7)
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def outside(ax: Axes, x: Array, y: Array, shown: Mask) -> int:
    """Returns how many of the rows that are shown lie outside the limits of the axes."""
    (left, right), (bottom, top) = sorted(ax.get_xlim()), sorted(ax.get_ylim())
    inside = (x >= left) & (x <= right) & (y >= bottom) & (y <= top)
    return int((shown & ~inside).sum())


def head(ax: Axes, title: str, group: str = "all", *, log: int = 0, linear: int = 0, beyond: int = 0) -> None:
    """Writes a title above the axes, unless they have one, and below it how many rows are not in the figure.

    Args:
        ax: The axes.
        title: The title; empty for a panel whose neighbour has it.
        group: Parameter group of the rows; groups other than "all" are named.
        log: Number of rows that a logarithmic axis cannot show.
        linear: Number of rows that a linear axis cannot show.
        beyond: Number of rows outside the limits.
    """
    left_out = {"zero, < 0, inf, NaN": log, "inf, NaN": linear, "beyond the axes": beyond}
    said = [f"{counted(number, 'row')} not shown ({why})" for why, number in left_out.items() if number]
    if said:
        look: dict[str, Any] = {"ha": "right", "va": "bottom", "fontsize": "small", "color": "0.35"}
        ax.text(1, 1.01, "\n".join(said), transform=ax.transAxes, **look)
    if title and not ax.get_title():
        ax.set_title(title if group == "all" else f"{title}: {as_drawn(group)}", size="medium", pad=6 + 11 * len(said))


def broken(name: object, most: int = _LINE) -> str:
    """Returns a name as drawn, in lines of about `most` characters, broken after dots and the like.

    Beyond three lines, the middle is left out: names of modules mostly differ at either end.
    """
    lines = [""]
    for part in re.findall(r"[^._/\-\s]*[._/\-\s]*", str(name)):
        if part and lines[-1] and len(lines[-1]) + len(part.rstrip()) > most:
            lines.append("")
        lines[-1] += part
    cut = [line[k : k + most] for line in lines for k in range(0, max(len(line), 1), most)]
    return "\n".join(map(as_drawn, cut if len(cut) <= _LINES else [cut[0], "…", cut[-1]]))


def verdict(fit: SmoothnessFit) -> str:
    """Returns the verdict of a fit in a few words."""
    return f"{fit.verdict.name}: {VERDICTS[fit.verdict.name]}"


def draw_intervals(
    ax: Axes, height: float, value: float, interval: Interval, limits: Interval, *, filled: bool = True, **look: Any
) -> None:
    """Draws an estimate and its interval on an axis that ends at `limits`, with a caret at an end that lies beyond."""
    if not np.isfinite(value):
        return
    low, high = limits
    ends = [float(np.clip(end, low, high)) for end in interval]
    if not np.isnan(ends).any():
        ax.plot(ends, [height, height], linewidth=1.4, solid_capstyle="butt", color=look["color"], zorder=2)
        for end, edge, caret in ((interval[0], low, 4), (interval[1], high, 5)):  # 4, 5: carets with their tip there
            if (end < edge) if edge == low else (end > edge):
                ax.plot([edge], [height], linestyle="none", marker=caret, markersize=6, color=look["color"], zorder=2)
    if low <= value <= high:
        face = look["color"] if filled else "white"
        ax.plot([value], [height], linestyle="none", markersize=5.5, markerfacecolor=face, zorder=3, **look)


def legend_below(ax: Axes, title: str | None, *, ncols: int = 2) -> None:
    """Puts the legend below the label of the x axis, where it covers no point in a figure of any size.

    Args:
        ax: The axes.
        title: Title of the legend.
        ncols: Columns of the legend; one if two are wider than the axes and their labels.
    """
    from matplotlib.transforms import ScaledTranslation

    texts = (ax.xaxis.label, ax.xaxis.get_major_ticks(1)[0].label1)
    lines = [(1 + text.get_text().count("\n")) * text.get_fontproperties().get_size_in_points() for text in texts]
    depth = 15 + 1.1 * sum(lines)  # 15: ticks and pads
    legend = ax.legend(
        loc="upper left",
        bbox_to_anchor=(0, 0),
        bbox_transform=ax.transAxes + ScaledTranslation(0, -depth / 72, ax.figure.dpi_scale_trans),
        ncols=ncols,
        title=title,
        title_fontproperties={"weight": "bold", "size": "small"},
        fontsize="small",
        alignment="left",
        frameon=False,
        borderaxespad=0,
        labelspacing=0.3,
        columnspacing=1.2,
        scatterpoints=3,
        scatteryoffsets=[0.5],
    )
    if ncols > 1 and legend.get_window_extent().width > 1.08 * ax.get_window_extent().width:
        legend_below(ax, title, ncols=1)
    elif legend.get_window_extent().width > _WIDEST * ax.figure.bbox.width:
        widest = max(legend.get_texts(), key=lambda text: text.get_window_extent().width)
        widest.set_text(widest.get_text().replace(", ", ",\n"))
