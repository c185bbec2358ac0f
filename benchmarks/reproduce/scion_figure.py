"""Figures of the runs of scion.py."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from learning import smoothed
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scion_tables import ADAMW, CLIPPED, HIGHER, PLAIN, SCHEDULES, TITLES, Best, Seeds, judged


def looks() -> dict[str, dict[str, Any]]:
    import seaborn as sns

    from smoothdiag.plots.looks import SERIES

    return {
        method: {"color": colour, "linestyle": dashes, "label": method}
        for method, colour, (dashes, _) in zip(
            (CLIPPED, PLAIN, ADAMW, HIGHER), sns.color_palette("colorblind"), SERIES, strict=False
        )
    }


def draw_curves(ax: Axes, rows: pd.DataFrame, task: str, schedule: str, best: Best, judged_by: Seeds) -> None:
    """Smoothed validation losses at the best rates: mean and range of the judging seeds."""
    runs = {m: judged(rows, task, m, schedule, best, judged_by) for m in looks()}
    for method, look in looks().items():
        if runs[method].empty:
            continue
        lines = np.array([smoothed(curves["valid"]) for curves in runs[method]["curves"]])
        steps = runs[method]["curves"].iloc[0]["step"]
        ax.plot(steps, lines.mean(axis=0), linewidth=1.4, **look)
        ax.fill_between(steps, lines.min(axis=0), lines.max(axis=0), color=look["color"], alpha=0.18, linewidth=0)
    finals = pd.concat(runs.values())["final"]
    ax.set(xlabel="step", ylim=(finals.min() - 0.05, finals.max() + 0.6), title=f"{TITLES[task]}, {schedule} rate")


HIGHEST_SHOWN = 1.0
"""Final losses this far above the lowest one are cut off [nats]."""


def draw_rates(ax: Axes, rows: pd.DataFrame, task: str) -> None:
    """Final losses at all rates on the choosing seed, in the colours of the legend of the figure."""
    own = rows[(rows["task"] == task) & (rows["seed"] == rows["seed"].min()) & (rows["why"] == "")]
    for schedule, marker, dashes in zip(SCHEDULES, "os", ("-", ":"), strict=True):
        for method in (CLIPPED, PLAIN, HIGHER):
            at = own[(own["method"] == method) & (own["schedule"] == schedule)].sort_values("rate")
            ax.plot(
                at["rate"],
                at["final"],
                dashes,
                marker=marker,
                markersize=4,
                linewidth=1.4,
                color=looks()[method]["color"],
            )
        ax.plot([], [], dashes, marker=marker, markersize=4, linewidth=1.4, color="0.35", label=f"{schedule} rate")
    top = own["final"].min() + HIGHEST_SHOWN
    ax.set(xscale="log", xlabel="longest step", title=f"{TITLES[task]}, one seed")
    ax.set_ylim(top=min(ax.get_ylim()[1], top))
    ax.legend(frameon=False, fontsize="small", loc="upper center")


def draw_norms(rows: pd.DataFrame, traces: Path) -> Figure:
    """Smoothness of all parameters over the gradient norm, under the verdicts of the fits."""
    from matplotlib import pyplot as plt

    from smoothdiag.plots.looks import log_axis

    plt.switch_backend("agg")
    run = rows[(rows["task"] == "norms") & (rows["data"] == "held-out")].iloc[0]
    verdicts = {fit["estimator"]: fit["verdict"] for fit in run["fits"] if fit["group"] == "all"}
    panels = {
        "run, in the optimizer's norm": (run["rows"]["local_steepest_own"], verdicts["local_steepest_own"]),
        "run, Euclidean": (run["rows"]["local"], verdicts["local"]),
        "scan, in the optimizer's norm": (run["scan"]["rows"], run["scan"]["verdict"]),
    }
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.4), layout="constrained")
    for ax, (title, (points, verdict)) in zip(axes, panels.items(), strict=True):
        x, y = np.array(points).T
        ax.scatter(x, y, s=12, color="0.35", linewidths=0)
        log_axis(ax, "x", float(x.min()), float(x.max()))
        log_axis(ax, "y", float(y.min()), float(y.max()))
        ax.set(xlabel="dual norm of the gradient", title=f"{title}\n{verdict}")
        ax.title.set_size("medium")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("smoothness in the same norm")
    return figure


def draw(rows: pd.DataFrame, traces: Path, *, best: Best, judged_by: Seeds) -> Figure:
    """Validation losses at the best rates, what other rates give, and smoothness in the optimizer's norm."""
    from matplotlib import pyplot as plt

    plt.switch_backend("agg")
    runs = rows[rows["task"] != "norms"]
    figure, panels = plt.subplots(2, 3, figsize=(10.5, 6.2), layout="constrained")
    for line, task in zip(panels, TITLES, strict=True):
        for ax, schedule in zip(line, SCHEDULES, strict=False):
            draw_curves(ax, runs, task, schedule, best, judged_by)
        draw_rates(line[2], runs, task)
        line[0].set_ylabel("validation loss [nats]")
        line[2].set_ylabel("final validation loss [nats]")
    for ax in panels.flat:
        ax.title.set_size("medium")
        ax.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure
