"""Draws docs/figures/lower_bound.png: how many steps a fixed rate costs, and how many clipping saves.

    python docs/lower_bound.py

Two functions with L0 = L1 = 1 force a fixed rate into a dilemma. On the steep function (`smoothdiag.problems.hybrid`,
quadratic and then exponential) the rate must be small, or descent diverges from a start where the gradient is M. The
slope of the flat function is hardly more than the tolerance, so a small rate needs many steps there. The printed table
counts the steps until the gradient is below the tolerance:

* steep, theorem: the rate 1/(L0 + L1 M), for which descent is known not to diverge;
* steep, best: the fastest of a grid of fixed rates, chosen with hindsight for that start;
* flat, fixed: the largest rate of the grid for which the steep function does not diverge from that start;
* clipped: rate 1/(2 L0) and threshold L0/L1 for every start and function.

Source: Zhang, He, Sra, Jadbabaie 2020 (ICLR), Theorems 3 and 4.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

BOUNDS = (1e1, 1e2, 1e3, 1e4, 1e5)
"""M: the gradient at the start on the steep function, in units of L0/L1."""
TOLERANCE = 0.01
GAP = 1.0
"""f(x0) - f* on the flat function, in units of L0/L1^2."""
RATE, THRESHOLD = 0.5, 1.0
GRID = 40
"""Number of rates per factor of ten."""
FIGURE = Path(__file__).parent / "figures" / "lower_bound.png"


@dataclass(frozen=True)
class Row:
    """Numbers of steps for one M, and the largest fixed rate that converges."""

    bound: float
    largest_rate: float
    best_rate: float
    steep_theorem: int
    steep_best: int
    steep_clipped: int
    flat_fixed: int
    flat_clipped: int


def steep(x: np.ndarray) -> np.ndarray:
    """Returns the gradient of the hybrid function for L0 = L1 = 1."""
    return np.sign(x) * np.where(np.abs(x) <= 1, np.abs(x), np.exp(np.minimum(np.abs(x), 700) - 1))


def steep_steps(bound: float, rates: np.ndarray, threshold: float = math.inf) -> np.ndarray:
    """Returns the steps that each rate takes on the steep function from a gradient of M; inf if the rate diverges."""
    x = np.full(len(rates), 1 + math.log(bound))
    steps = np.full(len(rates), math.inf)
    left = np.arange(len(rates))
    taken = 0
    while len(left):
        gradient = steep(x[left])
        inside = np.abs(x[left]) <= 1
        # There the gradient shrinks by 1 - rate in every step (and not at all with a rate of 2 or more): count those
        # steps at once.
        shrinkage = np.abs(1 - rates[left])
        with np.errstate(divide="ignore", invalid="ignore"):
            further = np.ceil(np.log(TOLERANCE / np.abs(x[left])) / np.log(shrinkage))
        further = np.where(np.abs(x[left]) <= TOLERANCE, 0, np.where(shrinkage == 0, 1, further))
        steps[left[inside]] = np.where(shrinkage < 1, taken + further, math.inf)[inside]
        x[left] -= rates[left] * gradient * np.minimum(1, threshold / np.maximum(np.abs(gradient), TOLERANCE))
        # Where a step leads further out than it began, the next one does even more.
        gone = np.abs(x[left]) > 1 + math.log(bound)
        left = left[~inside & ~gone]
        taken += 1
    return steps


def flat_steps(rate: float, gap: float = GAP) -> int:
    """Returns the steps on the flat function: e/4 (6 x^2 - x^4) on [-1, 1], slope 2 e beyond; e is the tolerance.

    Args:
        rate: Learning rate, at most 2 / (3 e).
        gap: f at the start minus the minimum of f.
    """
    slope = 2 * TOLERANCE
    f_at_one = TOLERANCE * 5 / 4
    x = 1 + (gap - f_at_one) / slope
    # The slope is below the threshold, so clipped descent walks here at its full rate.
    taken = math.ceil((x - 1) / (rate * slope))
    x -= taken * rate * slope
    while (gradient := TOLERANCE * (3 * x - x**3)) > TOLERANCE:
        x -= rate * gradient
        taken += 1
    return taken


def row(bound: float) -> Row:
    """Counts the steps for one M."""
    rates = 2.0 * 10 ** (-np.arange(0, (math.log10(bound) + 1) * GRID) / GRID)
    steps = steep_steps(bound, rates)
    converges = np.isfinite(steps)
    best = int(np.argmin(steps))
    # Not some larger one that happens to land well: every smaller rate of the grid converges too.
    first = int(np.argmax(np.logical_and.accumulate(converges[::-1])[::-1]))
    return Row(
        bound,
        float(rates[first]),
        float(rates[best]),
        int(steep_steps(bound, np.array([1 / (1 + bound)]))[0]),
        int(steps[best]),
        int(steep_steps(bound, np.array([RATE]), THRESHOLD)[0]),
        flat_steps(float(rates[first])),
        flat_steps(RATE),
    )


def table(rows: list[Row]) -> str:
    """Returns the table of steps."""
    lines = [
        "| M | largest rate | steep, theorem | steep, best (rate) | steep, clipped | flat, fixed | flat, clipped |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.bound:g} | {r.largest_rate:.2g} | {r.steep_theorem:,} | {r.steep_best:,} ({r.best_rate:.2g}) "
        f"| {r.steep_clipped:,} | {r.flat_fixed:,} | {r.flat_clipped:,} |"
        for r in rows
    ]
    return "\n".join(lines)


def draw_figure(rows: list[Row]) -> Figure:
    """Returns the figure: steps against M on both functions, as wide as a column."""
    figure = Figure(figsize=(3.4, 4.4), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    bounds = [r.bound for r in rows]
    lines = (
        (0, [r.steep_theorem for r in rows], "#D55E00", "s", "fixed, $1/(L_0+L_1M)$"),
        (0, [r.steep_best for r in rows], "#E69F00", "^", "fixed, best in hindsight"),
        (0, [r.steep_clipped for r in rows], "#0072B2", "o", "clipped"),
        (1, [r.flat_fixed for r in rows], "#E69F00", "^", "fixed, largest that converges"),
        (1, [r.flat_clipped for r in rows], "#0072B2", "o", "clipped"),
    )
    for panel, steps, color, marker, label in lines:
        panels[panel].plot(bounds, steps, color=color, marker=marker, markersize=4, linewidth=1.5, label=label)
    for ax, title in zip(panels, ("steep function", "flat function"), strict=True):
        ax.set(xscale="log", yscale="log", title=title, ylabel="steps to the tolerance")
        ax.title.set_size(9)
        ax.tick_params(labelsize=8)
        ax.yaxis.label.set_size(8)
        ax.grid(alpha=0.3, linewidth=0.5)
        ax.legend(fontsize=7, frameon=False, loc="upper left")
        ax.set_ylim(top=ax.get_ylim()[1] * 8)  # room for the legend
    panels[1].set_xlabel("gradient bound $M$, units of $L_0/L_1$", fontsize=8)
    return figure


if __name__ == "__main__":
    rows = [row(bound) for bound in BOUNDS]
    print(table(rows))
    FIGURE.parent.mkdir(exist_ok=True)
    draw_figure(rows).savefig(FIGURE, dpi=300)
