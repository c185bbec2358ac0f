"""plot_groups and plot_constants: several fits side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from smoothdiag.console import counted
from smoothdiag.plots.common import (
    Array,
    Mask,
    as_table,
    band,
    check_axes,
    check_fits,
    floats,
    in_fit,
    positive,
    runs_together,
    select,
)
from smoothdiag.plots.density import DENSE, draw_density, draw_hollow
from smoothdiag.plots.looks import (
    GRAD_NORM,
    L0_LABEL,
    L1_LABEL,
    SMOOTHNESS,
    broken,
    draw_intervals,
    extent,
    head,
    legend_below,
    limits,
    log_axis,
    outside,
    verdict,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from matplotlib.axes import Axes

    from smoothdiag.fits.base import Interval, SmoothnessFit
    from smoothdiag.fits.groups import GroupFits
    from smoothdiag.trace import Trace

_PANEL: Final = 1.65
"""Smallest width of a small panel in inches at which its ticks do not touch."""

_LOOKS: Final = {
    "L0L1": (0, "o"),
    "CONSTANT": (1, "D"),
    "POWER": (2, "^"),
    "LOSS_GAP": (4, "v"),
    "NOT_IDENTIFIED": (3, "s"),
    "ARTEFACT": (7, "X"),
}
"""Colour of the palette and marker of each verdict."""

_FAR: Final = 5.0
"""An interval may stretch the axis to this many times the largest constant; longer intervals end in a caret."""

_DECADES: Final = 1.5
"""Decades of constants above which an axis is logarithmic."""


def plot_groups(
    data: Trace | pd.DataFrame | Sequence[Trace | pd.DataFrame],
    *,
    fits: GroupFits | Mapping[str, SmoothnessFit] | None = None,
) -> npt.NDArray[np.object_]:
    """Draws smoothness against the gradient norm for every parameter group, in small panels with shared axes.

    Rows that fits may not use are hollow. The title of a panel counts rows that a logarithmic axis cannot show, and
    outliers that would squeeze all other rows. More than 5000 rows are drawn as density.

    Args:
        data: A trace, or its DataFrame; for several runs a list of these.
        fits: Fits from ``fit_groups``, whose lines and verdicts to draw; they also decide which groups are drawn and in
            which order. None draws the rows of all groups, "all" first.

    Returns:
        One axes per group, in a new figure.

    Raises:
        ValueError: If ``data`` lacks a group of the fits, or has no row that a logarithmic axis can show.

    Units: x axes [loss / parameter], y axes [loss / parameter^2].

    Examples:
        >>> import pandas as pd
        >>> table = pd.DataFrame({"group": ["embed", "head"], "grad_norm": [1.0, 2.0], "smoothness": [3.0, 4.0]})
        >>> panels = sd.plot_groups(table)
        >>> print([panel.get_title("left") for panel in panels])
        ['embed', 'head']
    """
    if fits is not None:
        check_fits(fits)
    table = runs_together(data)
    parts = _parts(table, fits)
    clouds = {group: (floats(rows, "grad_norm"), floats(rows, "smoothness")) for group, rows in parts.items()}
    shown = {group: positive(x) & positive(y) for group, (x, y) in clouds.items()}
    if not any(there.any() for there in shown.values()):
        raise ValueError(
            "Parameter `data` should have rows whose gradient norm and smoothness are positive and finite. "
            f"Found none in the groups {list(parts)}."
        )

    import seaborn as sns
    from matplotlib import pyplot as plt

    width, height = plt.rcParams["figure.figsize"]
    depth = math.ceil(len(parts) / max(1, int(width / _PANEL)))
    columns = math.ceil(len(parts) / depth)
    size = (width, max(0.75 * height, depth * (0.9 * width / columns + 0.4)) if columns > 1 else height)
    figure, grid = plt.subplots(
        depth, columns, sharex=True, sharey=True, squeeze=False, layout="constrained", figsize=size
    )
    panels = grid.ravel()
    reach = []
    for panel, (group, rows) in zip(panels, parts.items(), strict=False):
        fit = fits.get(group) if fits is not None else None
        reach.append(_draw_group(panel, rows, *clouds[group], shown[group], fit))
        sns.despine(ax=panel)
    for panel in panels[len(parts) :]:
        panel.remove()
        panels[np.flatnonzero(panels == panel)[0] - columns].xaxis.set_tick_params(labelbottom=True)
    for axis, ends in zip("xy", zip(*reach, strict=True), strict=True):
        log_axis(panels[0], "x" if axis == "x" else "y", *extent(ends))
    for panel, (group, rows) in zip(panels, parts.items(), strict=False):
        (x, y), there, fit = clouds[group], shown[group], None if fits is None else fits.get(group)
        if (good := there & in_fit(rows)).sum() > DENSE:
            draw_density(panel, x[good], y[good], cmap="Blues", vmin=0.3, zorder=1.1, label="rows, as density")
        title = [broken(group)] if fits is None else [broken(group), "no fit" if fit is None else fit.verdict.name]
        if left_out := int((~there).sum()) + outside(panel, x, y, there):
            title.append(f"{counted(left_out, 'row')} not shown")
        panel.set_title("\n".join(title), loc="left", size="small")
    handles = {
        name: handle for panel in panels for handle, name in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside upper left", ncols=4, fontsize="small", frameon=False)
    figure.supxlabel(GRAD_NORM, size="medium")
    figure.supylabel(SMOOTHNESS, size="medium")
    return np.asarray(panels[: len(parts)], dtype=object)


def _parts(
    table: Trace | pd.DataFrame, fits: GroupFits | Mapping[str, SmoothnessFit] | None
) -> dict[str, pd.DataFrame]:
    """Returns for each group to draw its rows of one estimator."""
    frame = as_table(table)
    if fits is None:
        names = frame["group"].astype(str).unique().tolist() if "group" in frame.columns else ["all"]
        names.sort(key=lambda name: name != "all")
        estimator = None
    else:
        names = [*fits, *getattr(fits, "failed", ())]
        estimator = next((fit.estimator for fit in fits.values()), None)
    if not names:
        raise ValueError("Parameter `fits` should hold at least one fit. Found none.")
    parts = {}
    for group in names:
        fit = fits.get(group) if fits is not None else None
        try:
            parts[group] = select(frame, fit.estimator if fit is not None else estimator, group)
        except ValueError:
            if fit is not None or group not in getattr(fits, "failed", ()):
                raise
            parts[group] = select(frame, None, "all")[:0] if "all" in names else select(frame, estimator, names[0])[:0]
    return parts


def _draw_group(
    ax: Axes, rows: pd.DataFrame, x: Array, y: Array, shown: Mask, fit: SmoothnessFit | None
) -> tuple[Array, Array]:
    """Draws the rows of a group and its line; returns how far both reach, across and up."""
    import seaborn as sns

    usable = in_fit(rows)
    good, bad = shown & usable, shown & ~usable
    size = 8 if len(rows) < 500 else 3
    color = sns.color_palette("colorblind")[0]
    if not shown.any():
        ax.text(0.5, 0.5, "no rows to show", transform=ax.transAxes, ha="center", size="small", color="0.35")
        return np.zeros(0), np.zeros(0)
    if good.sum() <= DENSE:
        ax.scatter(x[good], y[good], size, color=color, alpha=0.6, linewidths=0, zorder=2, label="rows")
    draw_hollow(ax, x, y, bad, size, "not usable", zorder=1.5)
    across, up = np.array(limits(x[shown])), np.array(limits(y[shown]))
    if fit is None:
        return across, up
    fitted = np.clip(x[good if good.any() else shown], *across)
    grid = np.geomspace(fitted.min(), fitted.max(), 60)
    line = fit.predict(grid)
    ax.plot(grid, line, color="black", linewidth=1.4, zorder=3, label="fitted line")
    if (ends := band(fit, grid)) is not None:
        name = f"its {fit.interval_level:.0%} interval"
        ax.fill_between(grid, *ends, color="0.5", alpha=0.3, linewidth=0, zorder=1.2, label=name)
    return across, np.concatenate([up, line])


def plot_constants(
    fits: GroupFits | Mapping[str, SmoothnessFit],
    *,
    axes: Sequence[Axes] | npt.NDArray[np.object_] | None = None,
) -> npt.NDArray[np.object_]:
    """Draws L0 and L1 of several fits with their intervals, one line per fit: per parameter group or per run.

    Markers are filled if the verdict is L0L1. All others are hollow, because there the constants should not be used. An
    interval that leads beyond the axis ends in a caret.

    Args:
        fits: Fits from ``fit_groups``, or fits of your own by name.
        axes: Two axes to draw on, for L0 and L1; None makes a new figure, with one above the other if it is narrow.

    Returns:
        The axes of L0 and of L1, shape (2,).

    Raises:
        ValueError: If there is no fit, or ``axes`` does not hold two axes.

    Units: L0 [loss / parameter^2], L1 [1 / parameter].

    Examples:
        >>> import pandas as pd
        >>> norms = 10 ** torch.arange(200.0).sin().double().numpy()
        >>> runs = {f"run {k}": pd.DataFrame({"grad_norm": norms, "smoothness": 1 + k * norms}) for k in (2, 3)}
        >>> panels = sd.plot_constants({name: sd.fit_smoothness(run, num_boot=20) for name, run in runs.items()})
        >>> print([label.get_text() for label in panels[0].get_yticklabels()])
        ['run 2', 'run 3']
    """
    check_fits(fits)
    if axes is not None:
        check_axes("axes", axes, 2)

    import seaborn as sns
    from matplotlib import pyplot as plt

    if axes is None:
        width, height = plt.rcParams["figure.figsize"]
        tall = 1.5 + 0.3 * len(fits)
        shape = (1, 2) if width > 3 * _PANEL else (2, 1)
        size = (width, max(0.6 * height, tall * shape[0]))
        grid = plt.subplots(*shape, sharey=shape[0] == 1, layout="constrained", figsize=size)[1]
        panels = grid.ravel()
    else:
        panels = np.asarray(axes, dtype=object).ravel()
    colors = sns.color_palette("colorblind")
    names = list(fits)
    side_by_side = panels[0].get_position().y0 == panels[1].get_position().y0
    titles = "$L_0$, the floor", "$L_1$, the slope"
    for panel, constant, label, title in zip(panels, ("L0", "L1"), (L0_LABEL, L1_LABEL), titles, strict=True):
        values = np.array([getattr(fit, constant) for fit in fits.values()], dtype=np.float64)
        intervals = [getattr(fit, f"{constant}_interval") for fit in fits.values()]
        limits = _limits(values, intervals)
        for place, fit in enumerate(fits.values()):
            name = fit.verdict.name
            color, marker = _LOOKS[name]
            # One entry in the legend stands for all fits with the same verdict.
            first = name not in [other.verdict.name for other in list(fits.values())[:place]]
            look: dict[str, Any] = {"marker": marker, "color": colors[color]}
            said = verdict(fit) if side_by_side else verdict(fit).replace(": ", ":\n")  # a narrow figure
            look["label"] = said if first else f"_{name}"
            value, filled = float(values[place]), name == "L0L1"
            draw_intervals(panel, place, value, intervals[place], limits, filled=filled, **look)
        if limits[0] > 0:
            log_axis(panel, "x", *limits)
        else:
            panel.set_xlim(-0.02 * limits[1], 1.04 * limits[1])
        panel.set(xlabel=label, ylim=(len(names) - 0.5, -0.5))
        panel.set_yticks(range(len(names)), [broken(name) for name in names])
        panel.grid(axis="y", color="0.9", linewidth=0.8)
        panel.set_axisbelow(True)
        sns.despine(ax=panel)
        head(panel, title)
    legend_below(panels[0 if side_by_side else 1], None, ncols=1)
    return np.asarray(panels, dtype=object)


def _limits(values: Array, intervals: list[Interval]) -> Interval:
    """Returns where the axis of a constant begins and ends; the axis is logarithmic if it begins above zero."""
    seen = values[np.isfinite(values)]
    top = float(seen.max()) if seen.size and seen.max() > 0 else 1.0
    reach = max([top, *(high for _, high in intervals if high <= _FAR * top)])
    if seen.size == 0 or seen.min() <= 0 or math.log10(top / seen.min()) <= _DECADES:
        return 0.0, reach
    bottom = float(seen.min())
    return min([bottom, *(low for low, _ in intervals if low >= bottom / _FAR)]), reach
