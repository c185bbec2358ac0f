"""Figures of which_law.py: the grid of verdicts, and the points of some scans."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from checkpoints import KNOWN, NETS, STAGES
from law_tables import CLEAR, ends, usual
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

import smoothdiag as sd
from smoothdiag.plots.looks import GRAD_NORM, log_axis

VERDICTS = {
    "CONSTANT": ("C", "#0072b2", "constant"),
    "L0L1": ("L", "#009e73", "the line L0 + L1 ‖g‖"),
    "POWER": ("P", "#cc79a7", "another power"),
    "LOSS_GAP": ("G", "#e69f00", "the loss gap"),
    "NOT_IDENTIFIED": ("?", "#d9d9d9", "not identified: these points do not tell"),
}
"""Letter, colour and meaning of a verdict."""

SIGNS = {
    "+": ("#009e73", "‖H‖ falls, too"),
    "−": ("#d55e00", "‖H‖ rises instead"),
    "·": ("#d9d9d9", "neither"),
}
"""What ||H|| does while ||g|| falls: colours and words."""

CAPTION = (
    "One square a seed. ‖H‖: Hessian norm, ‖g‖: gradient norm, on fixed held-out examples. "
    "$\\rho$: exponent of ‖H‖ = $L_0 + L$‖g‖$^\\rho$, from the lowest to the highest end of the\n"
    "90% intervals; “up” to 3, the largest tried. Steps are those of training before the scan. "
    "Right: rank correlation of ‖H‖ and ‖g‖ beyond ±.5."
)

SHOWN = (("MLP, GELU", 0), ("GPT", 400), ("ResNet", 0), ("LSTM", 0))
"""Networks and stages whose points are drawn, each for the first seed."""

LIMIT = 2.99
"""The largest exponent that a fit tries is 3; an interval that reaches it has no upper end."""


def draw_grid(rows: pd.DataFrame, traces: Path) -> Figure:
    """A row for each network, a column for each stage; left the verdicts on leaving, right the way of arriving."""
    rows = usual(rows)
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(9.6, 5.9), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.55, 1))
        names = [*NETS, *KNOWN]
        for ax, title in (
            (left, "Which law does a scan out of this point find?"),
            (right, "Does ‖H‖ fall where descent lowers ‖g‖?"),
        ):
            ax.set(xlim=(0, 3), ylim=(len(names) + 0.35, 0), xticks=[0.5, 1.5, 2.5])
            ax.set_xticklabels([f"{stage} steps" if stage else "initialisation" for stage in STAGES])
            ax.set_yticks([_height(k) + 0.5 for k in range(len(names))], names if ax is left else [])
            ax.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
            ax.set_title(title, fontsize=10, fontweight="bold")
            ax.spines[:].set_visible(False)
            ax.axhline(len(NETS) + 0.17, color="0.4", linewidth=0.8)
        for k, name in enumerate(names):
            for column, stage in enumerate(STAGES):
                part = rows[(rows["subject"] == name) & (rows["stage"] == stage)].sort_values("seed")
                _leaving(left, column, _height(k), part)
                _arriving(right, column, _height(k), part)
        left.text(-0.02, len(NETS) + 0.17, "law known ↓ ", ha="right", va="center", fontsize=7, color="0.3")
        handles = [Patch(color=colour, label=f"{letter}  {words}") for letter, colour, words in VERDICTS.values()]
        left.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.4, 0), ncols=2, frameon=False, fontsize=8)
        signs = [Patch(color=colour, label=f"{sign}  {words}") for sign, (colour, words) in SIGNS.items()]
        right.legend(handles=signs, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=1, frameon=False, fontsize=8)
        figure.supxlabel(CAPTION, fontsize=8, color="0.25")
    return figure


def _height(k: int) -> float:
    return k + (0.35 if k >= len(NETS) else 0.0)


def _square(ax: Axes, x: float, y: float, width: float, letter: str, colour: str) -> None:
    ax.add_patch(Rectangle((x, y), width, 0.76, facecolor=colour, edgecolor="white", linewidth=1.5))
    dark = colour == "#d9d9d9"
    look: dict[str, Any] = {"ha": "center", "va": "center", "fontweight": "bold", "color": "0.35" if dark else "white"}
    ax.text(x + width / 2, y + 0.39, letter, **look)


def _leaving(ax: Axes, column: int, y: float, part: pd.DataFrame) -> None:
    """One square for each seed, and between which exponents all of their intervals lie."""
    for k, verdict in enumerate(part["verdict"]):
        letter, colour, _ = VERDICTS.get(verdict, ("x", "white", ""))
        _square(ax, column + 0.04 + 0.145 * k, y + 0.12, 0.145, letter, colour)
    if set(part["verdict"]) != {"CONSTANT"}:
        text = ends(part["exponent_low"], part["exponent_high"].where(part["exponent_high"] < LIMIT, 3.0))
        text = text.replace(" to 3.00", " up").replace(" to ", "–")
        ax.text(column + 0.5, y + 0.5, rf"$\rho$ {text}", ha="left", va="center", fontsize=8, color="0.25")


def _arriving(ax: Axes, column: int, y: float, part: pd.DataFrame) -> None:
    for k, rank in enumerate(part["down_rank"]):
        sign = "+" if rank > CLEAR else "−" if rank < -CLEAR else "·"
        _square(ax, column + 0.08 + 0.28 * k, y + 0.12, 0.28, sign, SIGNS[sign][0])


def draw_points(rows: pd.DataFrame, traces: Path) -> Figure:
    """The points of one scan a panel, joined along lines, with a descent from the same point."""
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(9.2, 2.9), layout="constrained")
        axes = figure.subplots(1, len(SHOWN))
        for ax, (name, stage) in zip(axes, SHOWN, strict=True):
            stem = f"{name.replace(', ', '_')}-{stage}-0.jsonl"
            lines, descent = (_usable(traces / f"{kind}-{stem}") for kind in ("lines", "descent"))
            start = lines[lines["scan"] == "start"]
            for _, line in lines[lines["scan"] != "start"].groupby("scan"):
                whole = pd.concat([start, line.sort_values("point")])
                ax.plot(whole["grad_norm"], whole["smoothness"], "o-", color="#0072b2", ms=2.5, lw=0.6, alpha=0.7)
            ax.plot(descent["grad_norm"], descent["smoothness"], "s--", color="#d55e00", ms=3, lw=1)
            ax.plot(start["grad_norm"], start["smoothness"], "k*", ms=8, zorder=3)
            both = pd.concat([lines, descent])
            log_axis(ax, "x", both["grad_norm"].min(), both["grad_norm"].max())
            log_axis(ax, "y", both["smoothness"].min(), both["smoothness"].max())
            ax.set_title(f"{name}, {stage} steps" if stage else f"{name}, initialisation", fontsize=9)
            ax.spines[["top", "right"]].set_visible(False)
        figure.supxlabel(GRAD_NORM, fontsize=9)
        figure.supylabel("‖H‖ [loss / parameter²]", fontsize=9)
        marks = {"the point": ("k", "*", ""), "leaving, along lines": ("#0072b2", "o", "-")}
        marks |= {"arriving, down the gradient": ("#d55e00", "s", "--")}
        handles = [Line2D([], [], color=c, marker=m, ls=ls, label=name) for name, (c, m, ls) in marks.items()]
        figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure


def _usable(path: Path) -> pd.DataFrame:
    frame = sd.Trace.read(path).to_frame()
    return frame[(frame["estimator"] == "hessian_norm") & (frame["status"] == "ok")]
