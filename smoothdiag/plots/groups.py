"""plot_groups and plot_constants: several fits side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from smoothdiag.console import counted
from smoothdiag.plots.common import (
    HOLLOW,
    NORM,
    Array,
    as_drawn,
    as_table,
    band,
    check_axes,
    check_fits,
    draw_intervals,
    extent,
    floats,
    in_fit,
    legend_below,
    log_axis,
    positive,
    runs_together,
    select,
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

    Rows that fits may not use are hollow. Rows that a logarithmic axis cannot show are counted in the title of their
    panel.

    Args:
        data: A trace, or its DataFrame; for several runs a list of these.
        fits: Fits from ``fit_groups``, whose lines and verdicts to draw; they also decide which groups are drawn and in
            which order. None draws the rows of all groups, "all" first.

    Returns:
        One axes per group, in a new figure.

    Raises:
        ValueError: If ``data`` lacks a group of the fits, or has no row that a logarithmic axis can show.

    Units: x axes [f/x], y axes [f/x^2].

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
    lines = []
    for panel, (group, rows) in zip(panels, parts.items(), strict=False):
        fit = fits.get(group) if fits is not None else None
        lines.append(_draw_group(panel, rows, *clouds[group], shown[group], fit))
        title = [as_drawn(group)] if fits is None else [as_drawn(group), "no fit" if fit is None else fit.verdict.name]
        if left_out := int((~shown[group]).sum()):
            title.append(f"{counted(left_out, 'row')} not shown")
        panel.set_title("\n".join(title), loc="left", size="small")
        sns.despine(ax=panel)
    for panel in panels[len(parts) :]:
        panel.remove()
        panels[np.flatnonzero(panels == panel)[0] - columns].xaxis.set_tick_params(labelbottom=True)
    log_axis(panels[0], "x", *extent([x[shown[group]] for group, (x, _) in clouds.items()]))
    log_axis(panels[0], "y", *extent([*(y[shown[group]] for group, (_, y) in clouds.items()), *lines]))
    figure.supxlabel(f"gradient norm {NORM} [f/x]", size="medium")
    figure.supylabel("smoothness $L$ [f/x$^2$]", size="medium")
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


def _draw_group(ax: Axes, rows: pd.DataFrame, x: Array, y: Array, shown: Any, fit: SmoothnessFit | None) -> Array:
    """Draws the rows of a group and its line; returns the heights of the line."""
    import seaborn as sns

    usable = in_fit(rows)
    good, bad = shown & usable, shown & ~usable
    size = 8 if len(rows) < 500 else 3
    color = sns.color_palette("colorblind")[0]
    ax.scatter(x[good], y[good], size, color=color, alpha=0.6, linewidths=0, zorder=2, label="rows")
    if bad.any():
        ax.scatter(x[bad], y[bad], size, zorder=1.5, label="not usable", **HOLLOW)
    if not shown.any():
        ax.text(0.5, 0.5, "no rows to show", transform=ax.transAxes, ha="center", size="small", color="0.35")
    if fit is None or not shown.any():
        return np.zeros(0)
    fitted = good if good.any() else shown
    grid = np.geomspace(x[fitted].min(), x[fitted].max(), 60)
    line = fit.predict(grid)
    ax.plot(grid, line, color="black", linewidth=1.4, zorder=3, label="fit")
    if (ends := band(fit, grid)) is not None:
        ax.fill_between(grid, *ends, color="0.5", alpha=0.3, linewidth=0, zorder=1.2, label="interval")
    return line


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

    Units: L0 [f/x^2], L1 [1/x].

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
    for panel, constant, label in zip(panels, ("L0", "L1"), ("$L_0$ [f/x$^2$]", "$L_1$ [1/x]"), strict=True):
        values = np.array([getattr(fit, constant) for fit in fits.values()], dtype=np.float64)
        intervals = [getattr(fit, f"{constant}_interval") for fit in fits.values()]
        limits = _limits(values, intervals)
        for place, fit in enumerate(fits.values()):
            verdict = fit.verdict.name
            color, marker = _LOOKS[verdict]
            # One entry in the legend stands for all fits with the same verdict.
            first = verdict not in [other.verdict.name for other in list(fits.values())[:place]]
            look: dict[str, Any] = {"marker": marker, "color": colors[color]}
            look["label"] = verdict if first else f"_{verdict}"
            value, filled = float(values[place]), verdict == "L0L1"
            draw_intervals(panel, place, value, intervals[place], limits, filled=filled, **look)
        if limits[0] > 0:
            log_axis(panel, "x", *limits)
        else:
            panel.set_xlim(-0.02 * limits[1], 1.04 * limits[1])
        panel.set(xlabel=label, ylim=(len(names) - 0.5, -0.5))
        panel.set_yticks(range(len(names)), [as_drawn(name) for name in names])
        panel.grid(axis="y", color="0.9", linewidth=0.8)
        panel.set_axisbelow(True)
        sns.despine(ax=panel)
    legend_below(panels[1], None, ncols=1)
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
