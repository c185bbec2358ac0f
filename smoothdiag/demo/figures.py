"""The demo's figures: gradient norm against smoothness with a fit, and the losses of the three runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from smoothdiag.plots import plot_smoothness

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from smoothdiag.demo.training import Run
    from smoothdiag.fits import SmoothnessFit
    from smoothdiag.trace import Trace

STYLES = (("C3", ":"), ("C0", "--"), ("C2", "-"))
"""Colour and dashes of the runs, in their order: nobody needs the colours."""

SMOOTHED = 10
"""Steps in a mean of the drawn losses; single batches scatter."""


def save_smoothness(trace: Trace, fit: SmoothnessFit, title: str, path: Path) -> None:
    """Writes gradient norm against smoothness, with the fit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    ax = figure.subplots()
    plot_smoothness(trace, fit=fit, ax=ax)
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=150)


def save_curves(runs: Mapping[str, Run], lr: float, chance: float, path: Path) -> None:
    """Writes the losses of all runs in one figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    plot_curves(runs, lr, chance, figure.subplots())
    figure.savefig(path, dpi=150)


def plot_curves(runs: Mapping[str, Run], lr: float, chance: float, ax: Axes) -> Axes:
    """Draws the losses of all runs, each a running mean, and the loss of guessing."""
    for (name, run), (colour, dashes) in zip(runs.items(), STYLES, strict=True):
        width = min(SMOOTHED, len(run.losses))
        means = np.convolve(run.losses, np.ones(width) / width, mode="valid")
        steps = np.arange(width - 1, len(run.losses))
        ax.plot(steps, means, color=colour, linestyle=dashes, label=f"{name}: ends at {run.last:.3g}")
    ax.axhline(chance, color="0.5", linewidth=0.8)
    ax.annotate("guessing", (0.01, chance), xycoords=("axes fraction", "data"), va="bottom", color="0.4", fontsize=8)
    ax.set_yscale("log")
    ax.set_xlabel("step")
    ax.set_ylabel(f"training loss, mean of {SMOOTHED} steps\n[nats per character]")
    ax.set_title(f"One model, one seed, SGD at lr = {lr:g}: three ways to clip")
    ax.legend(title="clipping")
    return ax
