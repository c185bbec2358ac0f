"""The figure of the page on Zhang et al. 2019: a panel for each run and way."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from kept import Kept
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from zhang_judged import Figures, frames_of, number
from zhang_ways import STILL, WAYS, trace_of

from smoothdiag.plots.common import Array, floats
from smoothdiag.plots.looks import GRAD_NORM, SMOOTHNESS, extent, limits, log_axis

FIGURE = "reproduce_zhang2019.png"
SCRIPTS = ("zhang2019_lstm", "zhang2019_resnet")

COLOURS = mpl.colormaps["viridis"].resampled(6)

CEILING, NOISE, NO_STEP = "the most a row could show: its ceiling", "two batches, no curvature", "no step, cut anew"
"""Legends of what rows can follow whatever the loss is."""

MOST_DASHES = 60


def figure(results: pd.DataFrame, traces: Path) -> Figure:
    """Draws the runs of both scripts that have traces beside these, each that gave the same rows only once."""
    size = traces.name.rsplit("-", 1)[1]
    cases = list[tuple[str, Figures, Path]]()
    for script in SCRIPTS:
        folder = traces.parent / f"{script}-{size}"
        kept = Kept(Path(__file__).parent / "results" / f"{script}-{size}.jsonl")
        for row in kept.rows:
            if trace_of(folder, row["key"], 0).exists() and row["ways"] not in [ways for _, ways, _ in cases]:
                cases.append((row["key"], row["ways"], folder))
    drawn = Figure(figsize=(9, 1.6 * len(cases) + 0.9), layout="constrained")
    panels = drawn.subplots(len(cases), len(WAYS), squeeze=False)
    for row, (key, ways, folder) in zip(panels, cases, strict=True):
        _row(row, key, ways, folder)
    for ax, name in zip(panels[0], WAYS, strict=True):
        ax.set_title(f"{name}\n{ax.get_title()}", size=9)
    for ax in panels[-1]:
        ax.set_xlabel(GRAD_NORM.split(" [")[0], size=8)
    drawn.supylabel(SMOOTHNESS, size=9)
    _legend(drawn, panels)
    return drawn


def _row(panels: Any, key: str, ways: Figures, folder: Path) -> None:
    paths = [trace_of(folder, key, seed) for seed in range(len(ways["as released"]["seeds"]))]
    rows = {name: pd.concat(frames_of(paths, way)) for name, way in WAYS.items()}
    x, y = (np.concatenate([floats(part, column) for part in rows.values()]) for column in ("grad_norm", "smoothness"))
    across, up = limits(x[x > 0]), limits(y[y > 0])
    for ax, (name, part) in zip(panels, rows.items(), strict=True):
        _nulls(ax, name, part, rows["as released"], paths)
        shade = part["step"].to_numpy() / part["step"].max()
        order = np.random.default_rng(0).permutation(len(part))
        x, y = floats(part, "grad_norm"), floats(part, "smoothness")
        ax.scatter(x[order], y[order], 7, shade[order], cmap=COLOURS, linewidths=0, zorder=3)
        log_axis(ax, "x", *across)
        log_axis(ax, "y", *extent([np.array(up)]))
        way = ways[name]
        ax.set_title(f"slope {number(way['slope'])}, given step {number(way['partial'])}", size=8)
        ax.text(0.03, 0.95, way["verdicts"]["0.95"]["verdict"], transform=ax.transAxes, size=7, va="top", zorder=5)
        ax.tick_params(labelsize=7)
        if ax is not panels[0]:
            ax.tick_params(labelleft=False)
    panels[0].set_ylabel(key.replace(", ", "\n", 1), size=8)
    sns.despine(fig=panels[0].figure)


def _nulls(ax: Axes, name: str, part: pd.DataFrame, released: pd.DataFrame, paths: list[Path]) -> None:
    colours = sns.color_palette("colorblind")
    look: dict[str, Any] = {"s": 12, "marker": "_", "linewidths": 1.0, "zorder": 2}

    def dashes(x: Array, y: Array, colour: int, label: str) -> None:
        every = -(-len(x) // MOST_DASHES)
        ax.scatter(x[::every], y[::every], color=colours[colour], label=label, **look)

    dashes(floats(part, "grad_norm"), floats(part, "smoothness") / floats(part, "saturation"), 3, CEILING)
    if name == "as released" and len(still := pd.concat(frames_of(paths, (STILL, "tenth")))):
        dashes(floats(still, "grad_norm"), floats(still, "smoothness"), 7, NO_STEP)
    if name == "path, step's batch":
        keys = ["step", "lr"]
        both = part[[*keys, "grad_norm"]].merge(released[[*keys, "noise_line"]], on=keys)
        dashes(floats(both, "grad_norm"), floats(both, "noise_line"), 4, NOISE)


def _legend(drawn: Figure, panels: Any) -> None:
    bar = drawn.colorbar(
        mpl.cm.ScalarMappable(mpl.colors.Normalize(0, 1), COLOURS), ax=panels, fraction=0.015, pad=0.01
    )
    bar.set_label("share of the run", size=8)
    bar.ax.tick_params(labelsize=7)
    found: dict[str, Any] = {}
    for ax in panels.flat:
        found |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    drawn.legend(
        found.values(),
        found.keys(),
        loc="outside lower center",
        ncols=len(found),
        frameon=False,
        fontsize=8,
        markerscale=2,
    )
