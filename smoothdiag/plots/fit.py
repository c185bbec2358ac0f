"""plot_fit: residuals, quantile lines, frontier and rival models of one fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from smoothdiag.plots.common import (
    Array,
    band,
    check_axes,
    check_fit,
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
    from smoothdiag.trace import Trace

_NARROW: Final = 5.0
"""Width of a figure in inches below which two panels do not fit side by side."""

_ROWS_BEYOND: Final = 2.0
"""Rows beyond the quantile that each bin should have: with fewer rows the quantile of a bin is its largest row."""

_MAX_BINS: Final = 10

_LINE_REACH: Final = 10.0
"""Factor by which a line may stretch an axis beyond the rows and the fitted line."""

_RESIDUALS: Final = "Residuals"


def plot_fit(
    fit: SmoothnessFit,
    data: Trace | pd.DataFrame | Sequence[Trace | pd.DataFrame] | None = None,
    *,
    axes: Sequence[Axes] | npt.NDArray[np.object_] | None = None,
) -> npt.NDArray[np.object_]:
    """Draws the evidence for and against a fit, in four panels.

    1. Residuals: smoothness over the height of the line, against the gradient norm. The quantile of the rows in each
       range of gradient norms should stay at 1; where it drifts, the law is not a line.
    2. The lines at other quantiles, the mean and the hard envelope, with the interval of the fitted line. Lines that
       fan out show that the spread grows with the gradient norm. Lines that cross show that there are few rows.
    3. The frontier: pairs of L1 and L0 that cover every row, with the fitted pair, its intervals and its resamples. If
       the cloud of resamples slopes down, a smaller L1 with a larger L0 describes the rows as well.
    4. The rival models: the share of the constant's loss on later steps (of a scan: on lines left out) that each model
       removes, with its interval.

    Args:
        fit: The fit to draw.
        data: The rows that were fitted, as they were given to the fit; None leaves the first panel empty, with a note
            that says so.
        axes: Four axes to draw on; None makes a new figure, which has one column if it is narrow.

    Returns:
        The four axes in the order above, shape (4,).

    Raises:
        ValueError: If ``axes`` does not hold four axes, or ``data`` has no rows of the fit's estimator and group.

    Units: gradient norm [loss / parameter], smoothness and L0 [loss / parameter^2], L1 [1 / parameter]; residuals and
    skill have no unit.

    Examples:
        >>> import pandas as pd
        >>> norms = 10 ** torch.arange(200.0).sin().double().numpy()
        >>> table = pd.DataFrame({"grad_norm": norms, "smoothness": 1 + 2 * norms, "saturation": 0.1})
        >>> panels = sd.plot_fit(sd.fit_smoothness(table, num_boot=50), table)
        >>> print([label.get_text() for label in panels[3].get_yticklabels()])  # the models in the last panel
        ['constant', 'affine', 'power 1.00', 'isotonic']
    """
    check_fit(fit)
    if axes is not None:
        check_axes("axes", axes, 4)
    rows = None if data is None else select(runs_together(data), fit.estimator, fit.group)

    import seaborn as sns
    from matplotlib import pyplot as plt

    if axes is None:
        width, height = plt.rcParams["figure.figsize"]
        columns = 2 if width > _NARROW else 1
        size = (width, 1.6 * height if columns == 2 else 3.8 * height)
        figure, grid = plt.subplots(4 // columns, columns, layout="constrained", figsize=size)
        panels = grid.ravel()
    else:
        panels = np.asarray(axes, dtype=object).ravel()
        figure = panels[0].figure
    owns = set(figure.axes) == set(panels) and not figure.get_suptitle()
    if owns:
        figure.suptitle(verdict(fit), weight="bold", size="medium")
    else:  # other panels of the figure may belong to other fits
        panels[0].set_title(f"{verdict(fit)}\n{_RESIDUALS}", size="medium")
    _draw_residuals(panels[0], fit, rows)
    _draw_lines(panels[1], fit, rows)
    _draw_frontier(panels[2], fit)
    _draw_rivals(panels[3], fit)
    for panel in panels:
        sns.despine(ax=panel)
    return np.asarray(panels, dtype=object)


def _draw_residuals(ax: Axes, fit: SmoothnessFit, rows: pd.DataFrame | None) -> None:
    """Draws smoothness over the line, and the quantile of this ratio in ranges of the gradient norm."""
    import seaborn as sns

    ax.set(xlabel=_in_two_lines(GRAD_NORM), ylabel="smoothness / line")
    if rows is None:
        head(ax, _RESIDUALS)
        _say(ax, "residuals need the rows:\nplot_fit(fit, data)")
        return
    colors = sns.color_palette("colorblind")
    x, y = floats(rows, "grad_norm"), floats(rows, "smoothness")
    line = fit.predict(x)
    ratio = y / np.where(line > 0, line, np.nan)
    shown, usable = positive(x) & positive(ratio), in_fit(rows)
    if not shown.any():
        head(ax, _RESIDUALS, log=len(rows))
        _say(ax, "no row can be shown\non logarithmic axes")
        return
    good, bad = shown & usable, shown & ~usable
    size, is_dense = 14 if len(rows) < 1000 else 6, good.sum() > DENSE
    if not is_dense:
        ax.scatter(x[good], ratio[good], size, color=colors[0], alpha=0.6, linewidths=0, label="rows")
    draw_hollow(ax, x, ratio, bad, size, "not usable")
    centres, heights = _running_quantile(x[good], ratio[good], fit.quantile)
    if len(centres):
        label = f"their {fit.quantile:g} quantile"
        ax.plot(centres, heights, color=colors[3], marker="D", markersize=4, linewidth=1.2, label=label)
    ax.axhline(1, color="black", linewidth=1.2, label="where it should be", zorder=1.5)
    log_axis(ax, "x", *limits(x[shown]))
    log_axis(ax, "y", *extent([np.array(limits(ratio[shown])), np.ones(1)]))
    if is_dense:
        draw_density(ax, x[good], ratio[good], cmap="Blues", vmin=0.3, zorder=1.1, label="rows, as density")
    head(ax, _RESIDUALS, log=int((~shown).sum()), beyond=outside(ax, x, ratio, shown))
    legend_below(ax, None, ncols=1)


def _running_quantile(x: Array, ratio: Array, quantile: float) -> tuple[Array, Array]:
    """Returns median gradient norm and quantile of the ratio, in as many bins of equally many rows as are sensible."""
    beyond = min(quantile, 1 - quantile) * len(x)
    bins = int(min(_MAX_BINS, beyond / _ROWS_BEYOND))
    if bins < 2:  # The fit makes the quantile of all rows 1, so a single bin would show nothing.
        return np.zeros(0), np.zeros(0)
    parts = np.array_split(np.argsort(x, kind="stable"), bins)
    # The fit has a share of the rows at or below the line, and the inverse of the empirical distribution counts alike.
    heights = [np.quantile(ratio[part], quantile, method="inverted_cdf") for part in parts]
    return np.array([np.median(x[part]) for part in parts]), np.array(heights)


def _draw_lines(ax: Axes, fit: SmoothnessFit, rows: pd.DataFrame | None) -> None:
    """Draws the lines at all quantiles over the recorded gradient norms, on top of a faint cloud if there are rows."""
    import seaborn as sns

    shades = sns.color_palette("colorblind")
    ends = fit.grad_norm_quantiles[0], fit.grad_norm_quantiles[-1]
    grid = np.geomspace(ends[0], ends[1], 60)
    x, y = np.zeros(0), np.zeros(0)
    if rows is not None:
        x, y = floats(rows, "grad_norm"), floats(rows, "smoothness")
        shown = positive(x) & positive(y) & in_fit(rows)
        x, y = x[shown], y[shown]
        if len(x) <= DENSE:
            ax.scatter(x, y, 6, color="0.75", linewidths=0, zorder=1)
    looks = {
        "mean": (shades[2], ":"),
        "0.5": (shades[9], (0, (1, 1))),
        "0.9": (shades[0], "--"),
        "0.95": (shades[4], "-."),
        "0.99": (shades[3], (0, (5, 1, 1, 1, 1, 1))),
        "hard": (shades[7], (0, (6, 2))),
    }
    fitted = f"{fit.quantile:g}"
    line = fit.predict(grid)
    reach = [part for part in (line, np.array(limits(y)) if len(y) else y) if len(part) and positive(part).all()]
    far = _LINE_REACH * max((part.max() for part in reach), default=np.inf)
    for name, (L0, L1) in fit.lines.items():
        height = L0 + L1 * grid
        if name != fitted and positive(height).all():
            color, dashes = looks.get(name, (shades[5], "-"))
            label = f"{name}, far above" if height.min() > far else name
            ax.plot(grid, height, color=color, linestyle=dashes, linewidth=1.3, label=label, zorder=2)
            reach.append(height[height <= far])
    if positive(line).all():
        ax.plot(grid, line, color="black", linewidth=1.8, label=f"{fitted}, fitted", zorder=3)
    if (between := band(fit, grid)) is not None:
        ax.fill_between(grid, *between, color="0.5", alpha=0.3, linewidth=0, zorder=1.2, label="its interval")
    ax.set(xlabel=_in_two_lines(GRAD_NORM), ylabel=_in_two_lines(SMOOTHNESS))
    log_axis(ax, "x", *ends)
    if reach:
        # Lines with a zero intercept fall as far as the gradient norms do; four decades are enough.
        low, high = extent(reach)
        log_axis(ax, "y", max(low, high / 1e4), high)
        if len(x) > DENSE:
            draw_density(ax, x, y, cmap="Greys", alpha=0.45, zorder=1)
    head(ax, "Lines at other quantiles", beyond=outside(ax, x, y, positive(y)) if reach else 0)
    legend_below(ax, None, ncols=2)


def _draw_frontier(ax: Axes, fit: SmoothnessFit) -> None:
    """Draws the pairs (L1, L0) that cover every row, and the fitted pair with its intervals and resamples."""
    import seaborn as sns
    from matplotlib.patches import Rectangle

    colors = sns.color_palette("colorblind")
    hard = fit.lines.get("hard", (fit.L0, fit.L1))
    across = _window(fit.L1, fit.L1_interval, hard[1])
    up = _window(fit.L0, fit.L0_interval, hard[0])
    frontier = fit.frontier()
    # The frontier is straight between the corners, and beyond the last corner, where it keeps the L0 of that corner.
    L1 = np.append(frontier["L1"].to_numpy(), max(across[1], float(frontier["L1"].iloc[-1])) * 2)
    ax.plot(L1, fit.frontier(L1)["L0"], color=colors[0], linewidth=1.5, label="frontier", zorder=2)
    if fit.replicates:
        pairs = np.array(fit.replicates)
        ax.scatter(pairs[:, 1], pairs[:, 0], 5, color="0.6", linewidths=0, alpha=0.7, label="resamples", zorder=1.5)
    (left, right), (bottom, top) = fit.L1_interval, fit.L0_interval
    label = f"{fit.interval_level:.0%} intervals"
    if np.isfinite([left, right, bottom, top]).all():
        box = Rectangle((left, bottom), right - left, top - bottom, facecolor="none", edgecolor="black")
        box.set(linewidth=1, linestyle="--", zorder=2.5, label=label)
        ax.add_patch(box)
    else:
        ax.plot([], [], linestyle="none", label=f"no {label}")
    look: dict[str, Any] = {"linestyle": "none", "zorder": 4, "clip_on": False}
    inside = across[0] <= hard[1] <= across[1] and up[0] <= hard[0] <= up[1]
    at = ([hard[1]], [hard[0]]) if inside else ([], [])
    label = "hard" if inside else "hard, beyond the axes"
    ax.plot(*at, color=colors[3], marker="D", markersize=6, label=label, **look)
    ax.plot([fit.L1], [fit.L0], color="black", marker="o", markersize=5, label="fitted", **look)
    ax.set(xlim=across, ylim=up, xlabel=L1_LABEL, ylabel=L0_LABEL)
    head(ax, "Pairs that cover every row")
    legend_below(ax, None, ncols=2)


def _window(value: float, interval: Interval, hard: float) -> Interval:
    """Returns where an axis of constants begins and ends: around the fit, and at zero if zero is near."""
    if value > 0 and hard > _LINE_REACH * value:  # it follows from a single row
        hard = value
    largest = max(value, hard)
    if not largest > 0:
        largest = interval[1] if 0 < interval[1] < np.inf else 1.0
    # Rows that say little may have an interval many times as long as the constants, and all else would become one dot.
    top = max(largest, interval[1] if interval[1] <= 10 * largest else 2 * largest)
    bottom = min(value, hard, max(interval[0], 0.0) if np.isfinite(interval[0]) else 0.0)
    margin = 0.15 * (top - bottom) or 0.15 * top
    return (0.0 if bottom - margin < 0.3 * top else bottom - margin), top + margin


def _draw_rivals(ax: Axes, fit: SmoothnessFit) -> None:
    """Draws the skill of every model with its interval."""
    import seaborn as sns

    colors, markers = sns.color_palette("colorblind"), "osD^vP*X"
    names = [f"{score.name} {score.exponent:.2f}" if score.name == "power" else score.name for score in fit.comparison]
    limits = (-1.0, 1.0)
    for place, score in enumerate(fit.comparison):
        look: dict[str, Any] = {
            "color": colors[place % len(colors)],
            "marker": markers[place % len(markers)],
            "label": names[place],
        }
        draw_intervals(ax, place, score.skill, score.skill_interval, limits, **look)
        if np.isnan(score.skill):
            ax.text(0.04, place, "not scored", fontsize="small", color="0.35", va="center")
    ax.axvline(0, color="0.5", linewidth=1, zorder=1)
    ax.set(
        xlim=(-1.03, 1.03),
        ylim=(len(names) - 0.5, -0.5),
        xlabel=f"skill on {'lines left out' if fit.num_scans else 'later steps'}\n(1: no loss, 0: as the constant)",
    )
    ax.set_yticks(range(len(names)), names)
    head(ax, "Rival models")


def _in_two_lines(label: str) -> str:
    """Returns a label with its unit below, because these panels are small."""
    return label.replace(" [", "\n[")


def _say(ax: Axes, text: str) -> None:
    """Writes a text into the middle of axes that have nothing to show."""
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", fontsize="small", color="0.35")
    ax.set(xticks=[], yticks=[])
