"""plot_smoothness: smoothness against the gradient norm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from smoothdiag.console import counted
from smoothdiag.names import readable
from smoothdiag.plots.common import (
    Array,
    Mask,
    as_drawn,
    band,
    check_axes,
    check_fit,
    floats,
    in_fit,
    positive,
    rescales,
    runs_together,
    select,
)
from smoothdiag.plots.density import DENSE, draw_density, draw_hollow, thinned
from smoothdiag.plots.looks import (
    GRAD_NORM,
    NORM,
    NULL,
    NULL_REACH,
    SMOOTHNESS,
    current_axes,
    extent,
    head,
    is_log_spaced,
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

    from smoothdiag.fits.base import SmoothnessFit
    from smoothdiag.trace import Trace


def plot_smoothness(
    data: Trace | pd.DataFrame | Sequence[Trace | pd.DataFrame],
    *,
    fit: SmoothnessFit | None = None,
    estimator: str | None = None,
    group: str = "all",
    ax: Axes | None = None,
) -> Axes:
    """Draws smoothness against the gradient norm, one point per row, coloured by step.

    The points of a scan are coloured by their distance from its start. The scale of the colours is logarithmic if the
    steps are log-spaced. More than 5000 rows are drawn as density: the number of rows in each hexagon.

    The figure also shows two lines that measurements can follow without any curvature behind them: 2/lr (unless the
    trace says that its optimizer rescales gradients), and the largest smoothness that the displacement itself allows,
    (||g_0|| + ||g_1||) / ||d||. Points that crowd along one of these lines tell about the step and not about the loss.
    Rows that fits may not use are hollow. A note above the axes counts the rows that a logarithmic axis cannot show,
    and outliers that would squeeze all other rows.

    Args:
        data: A trace, or its DataFrame; for several runs a list of these.
        fit: Fit to draw as the envelope, with its verdict and the interval of its height at each gradient norm.
        estimator: Name of the estimator whose rows to draw; None takes the one that was fitted, else "local", else
            "path", else "hessian_norm", else the only one there is.
        group: Parameter group whose rows to draw.
        ax: Axes to draw on; None takes the current axes.

    Returns:
        The axes drawn on.

    Raises:
        ValueError: If ``data`` has no such rows, or none that a logarithmic axis can show.

    Units: x axis [loss / parameter], y axis [loss / parameter^2].

    Examples:
        >>> import pandas as pd
        >>> norms = 10 ** torch.arange(200.0).sin().double().numpy()
        >>> table = pd.DataFrame({"grad_norm": norms, "smoothness": 1 + 2 * norms, "saturation": 0.1})
        >>> ax = sd.plot_smoothness(table, fit=sd.fit_smoothness(table, num_boot=50))
        >>> print(ax.get_legend().get_title().get_text())
        L0L1: L0 and L1 can be used
    """
    if fit is not None:
        check_fit(fit)
    if ax is not None:
        check_axes("ax", ax)
    if fit is not None and fit.group != group:
        raise ValueError(f"Parameter `group` should be the fit's, `{fit.group}`. Found `group = {group!r}`.")
    rows = select(runs_together(data), estimator or (fit.estimator if fit is not None else None), group)
    x, y = floats(rows, "grad_norm"), floats(rows, "smoothness")
    shown, usable = positive(x) & positive(y), in_fit(rows)
    if not shown.any():
        raise ValueError(
            "Parameter `data` should have rows whose gradient norm and smoothness are positive and finite. "
            f"Found {counted(len(rows), 'row')} of estimator `{rows['estimator'].iloc[0]}`, group `{group}`, without "
            "such values."
        )

    import seaborn as sns

    ax = current_axes() if ax is None else ax
    good, bad, size = shown & usable, shown & ~usable, 22 if len(rows) < 100 else 14 if len(rows) < 1000 else 6
    across, reach = limits(x[shown]), [np.array(limits(y[shown]))]
    name = as_drawn(readable(rows["estimator"].iloc[0]), in_legend=True)
    label, is_dense = f"{name}, {counted(int(good.sum()), 'row')}", good.sum() > DENSE
    if not is_dense:
        _draw_points(ax, rows, x, y, good, size, label)
    draw_hollow(ax, x, y, bad, size, zorder=2)
    if fit is not None:
        # The line covers only the range of the rows that it was fitted to, because it says nothing about other norms.
        fitted = np.clip(x[good if good.any() else shown], *across)
        reach.append(_draw_fit(ax, fit, np.geomspace(fitted.min(), fitted.max(), 200)))
    saturation = floats(rows, "saturation")
    ceiling = y / np.where(saturation > 0, saturation, np.nan)
    lr = np.full(len(x), np.nan) if rescales(rows) else floats(rows, "lr")
    reach += _draw_nulls(ax, x[shown], ceiling[shown], lr, extent(reach))

    ax.set(xlabel=GRAD_NORM, ylabel=SMOOTHNESS)
    log_axis(ax, "x", *across)
    log_axis(ax, "y", *extent(reach))
    if is_dense:
        cloud = draw_density(ax, x[good], y[good], cmap="viridis", zorder=1.1, label=label)
        _draw_bar(ax, cloud, "rows in a hexagon")
    sns.despine(ax=ax)
    head(ax, "Smoothness against gradient norm", group, log=int((~shown).sum()), beyond=outside(ax, x, y, shown))
    legend_below(ax, None if fit is None else verdict(fit))
    return ax


def _draw_points(ax: Axes, rows: pd.DataFrame, x: Array, y: Array, good: Mask, size: float, label: str) -> None:
    """Draws the usable rows in the colour of their step or distance, with a colour bar."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    is_scan = "scan" in rows.columns and "distance" in rows.columns and rows["scan"].notna().all()
    shade = floats(rows, "distance" if is_scan else "step")
    # The order is shuffled, because in order of time the late rows would hide the early ones.
    order = np.random.default_rng(0).permutation(np.flatnonzero(good))
    is_log = is_log_spaced(shade[good]) and not is_scan
    if is_log:  # a logarithmic scale has no colour for step 0
        shade = np.maximum(shade, shade[good & (shade > 0)].min())
    norm = LogNorm() if is_log else None
    points = ax.scatter(x[order], y[order], size, shade[order], cmap="viridis", norm=norm, alpha=0.85, linewidths=0)
    points.set(label=label, zorder=3)
    if len(np.unique(shade[good])) > 1:
        ticks = None if is_log else MaxNLocator(4, integer=not is_scan)
        _draw_bar(ax, points, "distance from the start [parameter]" if is_scan else "step", ticks)


def _draw_bar(ax: Axes, points: Any, label: str, ticks: Any = None) -> None:
    """Draws a colour bar beside the axes: an inset takes no room from them, so a grid of axes stays a grid."""
    inset = ax.inset_axes((1.02, 0.0, 0.03, 1.0))
    bar = ax.figure.colorbar(points, cax=inset, label=label, ticks=ticks)
    bar.outline.set_visible(False)


def _draw_fit(ax: Axes, fit: SmoothnessFit, grid: Array) -> Array:
    """Draws the envelope and, if there are enough steps, its band; returns the heights of the envelope."""
    line = fit.predict(grid)
    label = rf"$L_0 + L_1${NORM}: $L_0$ = {fit.L0:.3g}, $L_1$ = {fit.L1:.3g}"
    ax.plot(grid, line, color="black", linewidth=1.6, zorder=4, label=label)
    if (ends := band(fit, grid)) is not None:
        label = f"{fit.interval_level:.0%} interval of the line"
        ax.fill_between(grid, *ends, color="0.5", alpha=0.3, linewidth=0, zorder=1.2, label=label)
    return line


def _draw_nulls(ax: Axes, x: Array, ceiling: Array, lr: Array, near: tuple[float, float]) -> list[Array]:
    """Draws the lines that measurements can follow without any curvature; returns the heights near the points."""
    import seaborn as sns

    colors = sns.color_palette("colorblind")
    low, high = near[0] / NULL_REACH, near[1] * NULL_REACH
    worth = []
    if (known := positive(ceiling)).any():
        at, ceiling = thinned(x[known], ceiling[known])
        far = ", far above" if ceiling.min() > high else ""
        label = f"ceiling ({NULL}{far})"
        dashes = ax.scatter(at, ceiling, 18, color=colors[3], marker="_", alpha=0.6, zorder=1.5)
        dashes.set(label=label, linewidths=0.8 if len(at) < 500 else 0.5)
        worth.append(ceiling)
    if (stable := positive(lr)).any():
        bottom, top = 2 / lr[stable].max(), 2 / lr[stable].min()
        far = ", far above" if bottom > high else ", far below" if top < low else ""
        if top > bottom:
            label = f"2/lr = {bottom:.3g} to {top:.3g} ({NULL}{far})"
            look: dict[str, Any] = {"facecolor": (*colors[4], 0.2), "edgecolor": (*colors[4], 0.5), "hatch": "//"}
            ax.axhspan(bottom, top, linewidth=0, zorder=1, label=label, **look)
        else:
            label = f"2/lr = {top:.3g} ({NULL}{far})"
            ax.axhline(top, color=colors[4], linestyle="-.", linewidth=1.2, zorder=1.6, label=label)
        worth.append(np.array([bottom, top]))
    return [values[(low <= values) & (values <= high)] for values in worth]
