"""Figure of layers.py: constants over the length of the steps, and layer by layer."""

import math
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from layer_tables import MATRICES, PUBLISHED, WORDS, kind_of, layers_of
from matplotlib.axes import Axes
from matplotlib.figure import Figure

LOWEST, FARTHEST = 0.3, 4.0
"""Where the axis of constants begins at the left, and where bars are cut at the right."""

LOOKS = {
    "other": ("#d55e00", "o", "other batches, as published"),
    "null": ("0.45", "s", "noise alone: no move between the batches"),
    "same": ("#0072b2", "D", "same examples, whole step"),
    "short": ("#009e73", "^", "same examples, short displacement"),
}
"""Colour, marker and words of a kind of rows."""


def draw(rows: pd.DataFrame, traces: Path) -> Figure:
    found = layers_of(rows)
    own = found[(found["name"] == "gpt") & (found["norm"] == "own")]
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(9.4, 4.3), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
        over_steps(left, own[(own["batch"] == 16) & (own["part"].map(kind_of) == "hidden")])
        by_layer(right, own[(own["batch"] == 16) & (own["factor"] == 1)])
        handles, labels = right.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8.5)
    return figure


def over_steps(ax: Axes, hidden: pd.DataFrame) -> None:
    """Median and range over matrices and seeds, by the length of the steps."""
    lengths = hidden.groupby("factor")["length"].median()
    ends = np.array([lengths.min() / 2, lengths.max() * 2])
    ax.plot(ends, math.sqrt(2) / ends, "k--", linewidth=1)
    ax.annotate("√2 / step", (ends[0] * 1.3, math.sqrt(2) / ends[0] / 1.3), xytext=(6, 2), textcoords="offset points")
    for shift, (kind, (colour, marker, _)) in zip((0.86, 0.95, 1.05, 1.16), LOOKS.items(), strict=True):
        of = hidden.groupby("factor")["short fit" if kind == "short" else f"{kind} L1"]
        low, middle, high = (of.quantile(q) for q in (0.1, 0.5, 0.9))
        x = lengths * shift
        ax.vlines(x, low.clip(lower=LOWEST), high, color=colour, linewidth=1.3)
        ax.plot(x, middle, marker, color=colour, markersize=5.5, linestyle="none")
    least, most, step = PUBLISHED["hidden"]
    ax.plot([step], [(least + most) / 2], "*", color="black", markersize=13, zorder=4)
    ax.annotate("NanoGPT 124M,\npublished", (step, most), xytext=(10, 22), textcoords="offset points", fontsize=8)
    ax.set(xscale="log", yscale="log", xlim=tuple(ends), ylim=(LOWEST, 3000.0))
    ax.set_xlabel("length of a step, in the norm of the layer")
    ax.set_ylabel("$L_1$ of hidden matrices [1 / length]")
    ax.set_title("The constant follows the step", fontsize=10, fontweight="bold")
    ax.spines[["top", "right"]].set_visible(False)


def by_layer(ax: Axes, usual: pd.DataFrame) -> None:
    """Every seed a point; the bars reach over all intervals of the short displacement."""
    for k, name in enumerate(MATRICES):
        of = usual[usual["part"] == name]
        for shift, (kind, (colour, marker, words)) in zip((-0.24, -0.08, 0.08, 0.24), LOOKS.items(), strict=True):
            values = of["short fit" if kind == "short" else f"{kind} L1"] * of["length"] / math.sqrt(2)
            label = words if k == 0 else None
            ax.plot(values, np.full(len(of), k + shift), marker, color=colour, markersize=4, alpha=0.8, label=label)
            if kind == "short":
                low, high = ((of[f"short {end}"] * of["length"]) / math.sqrt(2) for end in ("low", "high"))
                ax.hlines(k + shift, max(low.min(), 0.01), high.max(), color=colour, linewidth=1.3)
                if high.max() > FARTHEST:
                    ax.plot(FARTHEST - 0.03, k + shift, ">", color=colour, markersize=5, label="_cut")
    ax.axvline(1, color="black", linestyle="--", linewidth=1)
    ax.annotate("√2 / step", (1, -0.62), xytext=(4, 0), textcoords="offset points", fontsize=8)
    ax.set_yticks(range(len(MATRICES)), [WORDS[name] for name in MATRICES])
    ax.set(xlim=(0, FARTHEST), ylim=(len(MATRICES) - 0.4, -0.8))
    ax.set_xlabel(f"$L_1$ × step / √2; arrows: intervals that go on beyond {FARTHEST:g}")
    ax.set_title("Layer by layer, at the published step", fontsize=10, fontweight="bold")
    ax.spines[["top", "right"]].set_visible(False)
