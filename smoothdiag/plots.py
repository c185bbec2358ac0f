"""Figures of a trace: smoothness against the gradient norm, and both over the steps.

The functions draw on the axes they are given, return them, and leave the style, the backend and every other
figure alone. Importing this module loads neither matplotlib nor seaborn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import numpy.typing as npt

from smoothdiag.rows import USABLE_STATUSES

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from matplotlib.axes import Axes

    from smoothdiag.fits.base import SmoothnessFit
    from smoothdiag.trace import Trace

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

_HOLLOW: Final[dict[str, Any]] = {"facecolors": "none", "edgecolors": "0.5", "linewidths": 0.8}
_PREFERRED: Final = ("local", "path")  # the first does not depend on the length of the step taken
_NORM: Final = r"$\|g\|$"
_NULL_REACH: Final = 10.0
"""How far beyond the points a null line may stretch an axis. A ceiling three decades up says only that it is far
away, and a label says that as well without squeezing the points into a stripe."""


def plot_smoothness(
    data: Trace | pd.DataFrame,
    *,
    fit: SmoothnessFit | None = None,
    estimator: str | None = None,
    group: str = "all",
    ax: Axes | None = None,
) -> Axes:
    """Draws smoothness against the gradient norm, one point per row, the colour being the step.

    Beside the points stand the two lines that a measurement can follow without any curvature behind it: the
    largest smoothness that the displacement itself allows, (||g_0|| + ||g_1||) / ||d||, and 2/lr. Points that
    crowd along either speak of the step, not of the loss. Rows that fits may not use are hollow; rows that a
    logarithmic axis cannot show are counted in a note above the axes.

    Args:
        data: A trace, or its DataFrame.
        fit: What to draw as the envelope, with its interval and its verdict.
        estimator: Whose rows to draw; None takes the one that was fitted, else "local", else "path", else the
            only one there is.
        group: Parameter group whose rows to draw.
        ax: Where to draw; None takes the current axes.

    Returns:
        The axes drawn on.

    Raises:
        ValueError: If ``data`` has no such rows, or none that a logarithmic axis can show.

    Units: x axis [f/x], y axis [f/x^2].
    """
    if fit is not None and fit.group != group:
        raise ValueError(f"Parameter `group` should be the fit's, `{fit.group}`. Found `group = {group!r}`.")
    rows = _select(data, estimator or (fit.estimator if fit is not None else None), group)
    x, y = _floats(rows, "grad_norm"), _floats(rows, "smoothness")
    shown, usable = _positive(x) & _positive(y), rows["status"].isin(USABLE_STATUSES).to_numpy()
    if not shown.any():
        raise ValueError(
            "Parameter `data` should have rows whose gradient norm and smoothness are positive and finite. "
            f"Found {len(rows)} rows of estimator `{rows['estimator'].iloc[0]}`, group `{group}`, and none such."
        )

    import seaborn as sns
    from matplotlib import pyplot as plt

    if ax is None:
        if not plt.get_fignums():
            plt.figure(layout="constrained")  # the legend stands below the axes and needs its room
        ax = plt.gca()
    _draw_points(ax, rows, x, y, shown & usable, shown & ~usable)
    reach = [y[shown]]
    if fit is not None:
        # The line stands over the rows it was fitted to and promises nothing beside them.
        fitted = shown & usable if (shown & usable).any() else shown
        reach.append(_draw_fit(ax, fit, np.geomspace(x[fitted].min(), x[fitted].max(), 200)))
    saturation = _floats(rows, "saturation")
    ceiling = y / np.where(saturation > 0, saturation, np.nan)
    reach += _draw_nulls(ax, x[shown], ceiling[shown], _floats(rows, "lr"), _reach(reach))

    ax.set(xlabel=f"gradient norm {_NORM} [f/x]", ylabel="smoothness $L$ [f/x$^2$]")
    _log_axis(ax, "x", *_reach([x[shown]]))
    _log_axis(ax, "y", *_reach(reach))
    sns.despine(ax=ax)
    _note(ax, int((~shown).sum()))
    _legend_below(ax, None if fit is None else f"verdict: {fit.verdict.name}")
    return ax


def plot_trace(
    data: Trace | pd.DataFrame,
    *,
    estimator: str | None = None,
    group: str = "all",
    ax: Sequence[Axes] | npt.NDArray[np.object_] | None = None,
) -> npt.NDArray[np.object_]:
    """Draws loss, gradient norm and smoothness over the steps, in three panels with one step axis.

    The last panel also shows 2/lr, where the smoothness of plain gradient descent settles. Rows that fits may
    not use are hollow; values that an axis cannot show are counted in a note above their panel.

    Args:
        data: A trace, or its DataFrame.
        estimator: Whose rows to draw; None takes "local", else "path", else the only one there is.
        group: Parameter group whose rows to draw.
        ax: Three axes to draw on; None makes a new figure.

    Returns:
        The three axes, from top to bottom, shape (3,).

    Raises:
        ValueError: If ``data`` has no such rows, or ``ax`` does not hold three axes.

    Units: loss [f], gradient norm [f/x], smoothness and 2/lr [f/x^2].
    """
    rows = _select(data, estimator, group).sort_values("step", kind="stable")
    if ax is not None and np.size(np.asarray(ax, dtype=object)) != 3:
        raise ValueError(f"Parameter `ax` should hold three axes. Found {np.size(np.asarray(ax, dtype=object))}.")

    import seaborn as sns
    from matplotlib import pyplot as plt

    if ax is None:
        width, height = plt.rcParams["figure.figsize"]
        figure, panels = plt.subplots(3, sharex=True, layout="constrained", figsize=(width, 1.2 * height))
        figure.align_ylabels(panels)
    else:
        panels = np.asarray(ax, dtype=object).ravel()
    colors = sns.color_palette("colorblind")
    step, usable = _floats(rows, "step"), rows["status"].isin(USABLE_STATUSES).to_numpy()
    labels = ("loss [f]", f"gradient norm\n{_NORM} [f/x]", "smoothness\n$L$ [f/x$^2$]")
    for panel, column, label in zip(panels, ("loss", "grad_norm", "smoothness"), labels, strict=True):
        value, log = _floats(rows, column), column != "loss"
        shown = _positive(value) if log else np.isfinite(value)
        good, bad = shown & usable, shown & ~usable
        name = f"{rows['estimator'].iloc[0]}" if column == "smoothness" else None
        marker = "." if len(rows) < 200 else ""
        panel.plot(step[good], value[good], color=colors[0], linewidth=1, marker=marker, markersize=4, label=name)
        if bad.any():
            panel.scatter(step[bad], value[bad], 14, label="not usable", **_HOLLOW)
        panel.set_ylabel(label)
        _note(panel, int((~shown).sum()), log=log)
        reach = [value[shown]]
        if column == "smoothness" and (stable := _positive(lr := _floats(rows, "lr"))).any():
            # Outside of the rows with a positive rate there is no line, not a line at infinity.
            line = np.where(stable, 2 / np.where(stable, lr, 1), np.nan)
            panel.step(step, line, where="post", color=colors[4], linestyle="-.", linewidth=1.2, label="2/lr (null)")
            reach.append(line[stable])
        if log and shown.any():
            _log_axis(panel, "y", *_reach(reach))
        sns.despine(ax=panel)
    panels[-1].set_xlabel("step")
    _legend_below(panels[-1], None)
    return np.asarray(panels, dtype=object)


def _select(data: Trace | pd.DataFrame, estimator: str | None, group: str) -> pd.DataFrame:
    """Returns the rows of one estimator and one group, with every column that the figures need."""
    import pandas as pd

    frame = data if isinstance(data, pd.DataFrame) else data.to_frame()
    missing = [name for name in ("grad_norm", "smoothness") if name not in frame.columns]
    if missing:
        raise ValueError(f"Parameter `data` should have the columns of a trace. Missing: {', '.join(missing)}.")
    if frame.empty:
        raise ValueError("Parameter `data` should have rows. Found none.")
    defaults: dict[str, Any] = {"step": range(len(frame)), "estimator": "unnamed", "group": "all", "status": "ok"}
    defaults |= dict.fromkeys(("loss", "lr", "saturation"), np.nan)
    frame = frame.assign(**{name: value for name, value in defaults.items() if name not in frame.columns})
    frame = _only(frame, "group", group)
    if estimator is None:
        names = frame["estimator"].unique().tolist()
        found = [name for name in _PREFERRED if name in names] or names
        # Estimators that nobody ranked measure different things; picking one would be a guess.
        estimator = found[0] if len(names) == 1 or found[0] in _PREFERRED else None
    return _only(frame, "estimator", estimator)


def _only(frame: pd.DataFrame, column: str, value: str | None) -> pd.DataFrame:
    if value not in (names := sorted(frame[column].unique().tolist())):
        raise ValueError(f"Parameter `{column}` should be one of {names}. Found `{column} = {value!r}`.")
    return frame[frame[column] == value]


def _draw_points(ax: Axes, rows: pd.DataFrame, x: Array, y: Array, good: Mask, bad: Mask) -> None:
    """Draws the usable rows in the colour of their step, with a colour bar, and the others hollow."""
    from matplotlib.ticker import MaxNLocator

    step, name = _floats(rows, "step"), rows["estimator"].iloc[0]
    size = 22 if len(rows) < 100 else 14 if len(rows) < 1000 else 6
    many = len(rows) > 5000  # a vector file with a path per point opens slowly
    # Shuffled, because drawn in order of time the late rows would hide the early ones.
    order = np.random.default_rng(0).permutation(np.flatnonzero(good))
    points = ax.scatter(x[order], y[order], size, step[order], cmap="viridis", alpha=0.85, linewidths=0, zorder=3)
    points.set(label=f"{name}, {_rows(len(order))}", rasterized=many)
    if bad.any():
        label = f"not usable, {_rows(int(bad.sum()))}"
        ax.scatter(x[bad], y[bad], size, zorder=2, rasterized=many, label=label, **_HOLLOW)
    if len(np.unique(step[good])) > 1:
        # An inset takes no room from the axes, so a grid of axes stays a grid, under any layout engine.
        inset = ax.inset_axes((1.02, 0.0, 0.03, 1.0))
        bar = ax.figure.colorbar(points, cax=inset, label="step", ticks=MaxNLocator(4, integer=True))
        bar.outline.set_visible(False)


def _draw_fit(ax: Axes, fit: SmoothnessFit, grid: Array) -> Array:
    """Draws the envelope and, where it is finite, its band; returns the heights of the envelope."""
    line = fit.predict(grid)
    label = rf"$L_0 + L_1${_NORM}: $L_0$ = {fit.L0:.3g}, $L_1$ = {fit.L1:.3g}"
    ax.plot(grid, line, color="black", linewidth=1.6, zorder=4, label=label)
    low, high = (fit.L0_interval[end] + fit.L1_interval[end] * grid for end in (0, 1))
    if np.isfinite([low, high]).all():
        label = f"{fit.interval_level:.0%} intervals of $L_0$ and $L_1$"
        ax.fill_between(grid, low, high, color="0.5", alpha=0.3, linewidth=0, zorder=1.2, label=label)
    return line


def _draw_nulls(ax: Axes, x: Array, ceiling: Array, lr: Array, near: tuple[float, float]) -> list[Array]:
    """Draws what a measurement shows without any curvature behind it; returns the heights worth an axis."""
    import seaborn as sns

    colors = sns.color_palette("colorblind")
    low, high = near[0] / _NULL_REACH, near[1] * _NULL_REACH
    worth = []
    if (known := _positive(ceiling)).any():
        far = ", far above" if ceiling[known].min() > high else ""
        label = rf"ceiling $(\|g_0\| + \|g_1\|)\,/\,\|d\|$ (null{far})"
        dashes = ax.scatter(x[known], ceiling[known], 18, color=colors[3], marker="_", alpha=0.6, zorder=1.5)
        dashes.set(label=label, linewidths=0.8 if known.sum() < 500 else 0.5)
        worth.append(ceiling[known])
    if (stable := _positive(lr)).any():
        bottom, top = 2 / lr[stable].max(), 2 / lr[stable].min()
        far = ", far above" if bottom > high else ", far below" if top < low else ""
        if top > bottom:
            label = f"2/lr = {bottom:.3g} to {top:.3g} (null{far})"
            ax.axhspan(bottom, top, color=colors[4], alpha=0.2, linewidth=0, zorder=1, label=label)
        else:
            label = f"2/lr = {top:.3g} (null{far})"
            ax.axhline(top, color=colors[4], linestyle="-.", linewidth=1.2, zorder=1.6, label=label)
        worth.append(np.array([bottom, top]))
    return [values[(low <= values) & (values <= high)] for values in worth]


def _floats(rows: pd.DataFrame, column: str) -> Array:
    import pandas as pd

    return np.asarray(pd.to_numeric(rows[column], errors="coerce"), dtype=np.float64)


def _positive(value: Array) -> Mask:
    return np.isfinite(value) & (value > 0)


def _reach(parts: Sequence[Array]) -> tuple[float, float]:
    values = np.concatenate([part[_positive(part)] for part in parts])
    return float(values.min()), float(values.max())


def _log_axis(ax: Axes, name: Literal["x", "y"], low: float, high: float) -> None:
    """Makes an axis logarithmic over [low, high] with margins, with few ticks and readable labels."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    # At least 2/3 of a decade: a cloud without range must look like one, and an axis needs two labels.
    decades = float(np.log10(high / low))
    margin = max(0.05 * decades, (2 / 3 - decades) / 2, 0.03)
    ax.set(**{f"{name}scale": "log", f"{name}lim": (low / 10**margin, high * 10**margin)})
    axis = ax.xaxis if name == "x" else ax.yaxis
    if decades < 1.5:  # powers of ten alone would label one tick or none
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades > 0.9 else (1, 1.5, 2, 3, 5, 7)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _note(ax: Axes, num_left_out: int, *, log: bool = True) -> None:
    """Says above the axes how many rows could not be drawn."""
    if num_left_out:
        text = f"{_rows(num_left_out)} not shown ({'zero, < 0, inf, NaN' if log else 'inf, NaN'})"
        ax.text(1, 1.01, text, transform=ax.transAxes, ha="right", va="bottom", fontsize="small", color="0.35")


def _rows(number: int) -> str:
    return f"{number} row{'' if number == 1 else 's'}"


def _legend_below(ax: Axes, title: str | None) -> None:
    """Puts the legend under the label of the x axis, where it covers no point at any size of figure."""
    from matplotlib.transforms import ScaledTranslation

    texts = (ax.xaxis.label, ax.xaxis.get_major_ticks(1)[0].label1)
    depth = 15 + sum(1.1 * text.get_fontproperties().get_size_in_points() for text in texts)  # 15: ticks and pads
    ax.legend(
        loc="upper left",
        bbox_to_anchor=(0, 0),
        bbox_transform=ax.transAxes + ScaledTranslation(0, -depth / 72, ax.figure.dpi_scale_trans),
        ncols=2 if ax.get_window_extent().width / ax.figure.dpi > 4 else 1,
        title=title,
        title_fontproperties={"weight": "bold", "size": "small"},
        fontsize="small",
        alignment="left",
        frameon=False,
        borderaxespad=0,
        labelspacing=0.3,
        scatterpoints=3,
        scatteryoffsets=[0.5],
    )
