"""Tables and figure of the runs of zhang2020.py."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from experiment import markdown
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Choose = Callable[[pd.DataFrame, Any, str], float | None]

PAPER = {
    "cifar": {"SGD": 0.40, "SGDClip": 0.36, "MomClip": 0.30, "MixClip": 0.20},
    "ptb": {
        name: math.log(ppl) for name, ppl in (("SGD", 68.9), ("SGDClip", 63.2), ("MomClip", 63.0), ("MixClip", 62.2))
    },
}
"""Read off figure 2 [nats]: CIFAR-10 training loss at epoch 75, Penn Treebank validation loss at epoch 250."""

NAMES = {"cifar": "training loss before the first decay", "ptb": "final validation perplexity"}

CHANCE = {"cifar": math.log(10), "ptb": math.log(2000)}
"""Loss of equal probabilities [nats]; figures end there."""

TITLES = {"cifar": "CIFAR-10, ResNet-32", "ptb": "Penn Treebank, LSTM"}

PAIRS = {
    "cifar": [
        ("SGDClip", "SGD"),
        ("MomClip", "SGDClip"),
        ("MixClip", "MomClip"),
        ("MixClip", "SGD"),
        ("MomClip", "SGD"),
        ("MixClip, momentum 0.9", "MixClip"),
    ],
    "ptb": [
        ("SGDClip", "SGD"),
        ("MomClip", "SGDClip"),
        ("MixClip", "MomClip"),
        ("MixClip", "SGD"),
        ("MomClip", "SGD"),
        ("SGD, momentum 0.9", "SGD"),
        ("MomClip", "SGD, momentum 0.9"),
        ("MixClip, momentum 0.9", "MixClip"),
        ("MixClip, momentum 0.9", "MomClip"),
    ],
}
"""Compared methods: every step of the paper's order, the whole way, and the steps to the controls."""

NEEDED = {2: 6.36, 3: 1.31}
"""Ranges over so many seeds that two equal methods, with normal results, exceed at most once in twenty times.

They do so if one method has all the spread. For two seeds the bound is tan(0.475 pi) / 2.
"""

RATIOS = (1.0, 0.5, 0.1, 0.0)
"""Ratios of the smaller standard deviation of two methods to the larger one, for the table of what luck exceeds."""


@dataclass(frozen=True)
class Gap:
    """How far one method is below another in the same seeds.

    Attributes:
        mean: Mean difference over the seeds; negative if the first method is the better one.
        spread: The larger of the two methods' ranges over the seeds.
        number: Number of seeds.
    """

    mean: float
    spread: float
    number: int

    @property
    def clear(self) -> bool:
        return abs(self.mean) > self.needed

    @property
    def needed(self) -> float:
        return NEEDED.get(self.number, math.inf) * self.spread

    def __str__(self) -> str:
        if self.number < 2 or math.isnan(self.mean):
            return "no comparison"
        return f"{self.mean:+.3f} ({'clear' if self.clear else 'not clear'}, {self.needed:.3f})"


def gap(first: pd.Series, second: pd.Series) -> Gap:
    """Compares values by seed; a run that diverged leaves no comparison."""
    both = pd.concat([first, second], axis=1, join="inner")
    ranges = both.max() - both.min()
    difference = both.iloc[:, 0] - both.iloc[:, 1]
    return Gap(float(difference.mean(skipna=False)), float(ranges.max(skipna=False)), len(both))


def by_luck(seeds: int, ratio: float, draws: int = 200_000) -> float:
    """Returns how often two equal methods differ clearly, if one's standard deviation is this share of the other's."""
    drawn = np.random.default_rng(0).normal(size=(draws, 2, seeds)) * [[1.0], [ratio]]
    means, ranges = drawn.mean(axis=2), np.ptp(drawn, axis=2).max(axis=1)
    return float((np.abs(means[:, 0] - means[:, 1]) > NEEDED[seeds] * ranges).mean())


def needed() -> str:
    """Bounds for a clear difference, and how often equal methods exceed them."""
    lines = [[n, f"{bound:g}", *(f"{100 * by_luck(n, ratio):.1f}%" for ratio in RATIOS)] for n, bound in NEEDED.items()]
    return markdown(["seeds", "ranges needed", *(f"exceeded at {ratio:g}" for ratio in RATIOS)], lines)


def values(rows: pd.DataFrame, task: str, method: str, factor: float | None, column: str = "judged") -> pd.Series:
    """Returns a column of a method at a rate, by seed."""
    found = rows[(rows["task"] == task) & (rows["method"] == method) & (rows["factor"] == factor)]
    series: pd.Series = found.set_index("seed")[column].sort_index()
    return series


def tables(
    rows: pd.DataFrame,
    *,
    settings: Mapping[Any, Mapping[str, Any]],
    grids: Mapping[Any, Sequence[str]],
    best_factor: Choose,
) -> dict[str, str]:
    found = {"cost": cost(rows), "settings": written(settings), "needed": needed()}
    for task in PAPER:
        methods = grids[task]
        found[f"{task} published"] = published(rows, task)
        found[f"{task} order"] = order(rows, task, best_factor)
        found[f"{task} rates"] = rates(rows, task, methods, best_factor)
        found[f"{task} best"] = at_best(rows, task, methods, best_factor)
    return found


def shown(task: str, value: float) -> str:
    """Training loss as it is, validation loss as perplexity."""
    if math.isnan(value):
        return "diverged"
    return f"{judged_unit(task, value):.0f}" if task == "ptb" else f"{value:.2f}"


def judged_unit(task: str, value: float) -> float:
    return math.exp(value) if task == "ptb" else value


def published(rows: pd.DataFrame, task: str) -> str:
    lines = []
    for method in dict.fromkeys(rows.loc[rows["task"] == task, "method"]):
        own = values(rows, task, method, 1.0)
        windows = [curves["seen"] for curves in values(rows, task, method, 1.0, "curves")]
        threshold = values(rows, task, method, 1.0, "threshold").iloc[0]
        over = np.median(np.concatenate(windows)) / threshold
        right = values(rows, task, method, 1.0, "right").mean()
        paper = PAPER[task].get(method)
        lines.append(
            [
                method,
                "" if paper is None else f"{judged_unit(task, paper):.3g}",
                ", ".join(f"{shown(task, value)} (seed {seed})" for seed, value in own.items()),
                f"{own.mean(skipna=False):.3f}",
                "" if len(own) < 2 else f"{own.max() - own.min():.3f}",
                f"{100 * right:.1f}%",
                "never clips" if math.isnan(over) else f"{over:.2g}",
            ]
        )
    head = ["method", f"paper: {NAMES[task]}", "here", "mean [nats]", "range over seeds [nats]"]
    return markdown([*head, "right answers at the end", "norm / threshold"], lines)


def order(rows: pd.DataFrame, task: str, best_factor: Choose) -> str:
    lines = []
    paper = PAPER[task]
    for better, worse in PAIRS[task]:
        best = [values(rows, task, m, best_factor(rows, task, m)) for m in (better, worse)]
        lines.append(
            [
                f"{better} - {worse}",
                f"{paper[better] - paper[worse]:+.3f}" if better in paper and worse in paper else "",
                str(gap(values(rows, task, better, 1.0), values(rows, task, worse, 1.0))),
                str(gap(judging(rows, best[0]), judging(rows, best[1]))),
            ]
        )
    return markdown(["difference [nats]", "paper", "published rates", "best rates"], lines)


def written(settings: Mapping[Any, Mapping[str, Any]]) -> str:
    """Rates, longest steps, thresholds and momentum of every method."""
    lines = [
        [
            TITLES[task],
            name,
            "" if name in PAPER[task] else "control",
            f"{s.lr:g}",
            *(
                ("none", "none")
                if math.isinf(s.longest_step)
                else (f"{s.longest_step:g}", f"{s.longest_step / s.lr:.2g}")
            ),
            f"{s.momentum:g}",
            f"{s.nu:g}",
        ]
        for task, own in settings.items()
        for name, s in own.items()
    ]
    return markdown(["task", "method", "", "lr", "longest step gamma", "threshold", "momentum", "nu"], lines)


def rates(rows: pd.DataFrame, task: str, methods: Sequence[str], best_factor: Choose) -> str:
    grid = rows[(rows["task"] == task) & (rows["seed"] == rows["seed"].min())]
    factors = sorted(grid["factor"].unique())
    lines = []
    for method in methods:
        own = grid[grid["method"] == method].set_index("factor")["judged"]
        best = best_factor(rows, task, method)
        texts = [shown(task, own[factor]) if factor in own else "" for factor in factors]
        lines.append([method, *(f"**{t}**" if f == best else t for f, t in zip(factors, texts, strict=True))])
    return markdown(["method", *(f"published rate x {factor:.2g}" for factor in factors)], lines)


def at_best(rows: pd.DataFrame, task: str, methods: Sequence[str], best_factor: Choose) -> str:
    lines = []
    for method in methods:
        factor = best_factor(rows, task, method)
        judged, right = (judging(rows, values(rows, task, method, factor, name)) for name in ("judged", "right"))
        edges = {*rows.loc[(rows["task"] == task) & (rows["method"] == method), "factor"].agg(["min", "max"])}
        edge = ", at the edge of the grid" if factor in edges else ""
        lines.append(
            [
                method,
                "" if factor is None else f"x {factor:.2g}{edge}",
                ", ".join(f"{shown(task, value)} (seed {seed})" for seed, value in judged.items()),
                f"{judged.mean(skipna=False):.3f}",
                f"{judged.max() - judged.min():.3f}",
                f"{100 * right.mean():.1f}%",
            ]
        )
    head = ["method", "best rate, in published ones", NAMES[task], "mean [nats]", "range over seeds [nats]"]
    return markdown([*head, "right answers at the end"], lines)


def judging(rows: pd.DataFrame, series: pd.Series) -> pd.Series:
    """Leaves out the seed that chose the rates."""
    kept: pd.Series = series.drop(rows["seed"].min(), errors="ignore")
    return kept


def cost(rows: pd.DataFrame) -> str:
    lines = [
        [TITLES[str(task)], len(own), int(own["steps"].max()), f"{own['seconds'].sum() / 60:.1f}"]
        for task, own in rows.groupby("task")
    ]
    lines.append(["both", len(rows), "", f"{rows['seconds'].sum() / 60:.1f}"])
    return markdown(["task", "runs", "steps of a run", "CPU minutes"], lines)


def looks(methods: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    import seaborn as sns

    from smoothdiag.plots.looks import SERIES

    for method, colour, (dashes, _) in zip(methods, sns.color_palette("colorblind"), SERIES, strict=False):
        yield method, {"color": colour, "linestyle": dashes, "label": method}


def draw_curves(ax: Axes, rows: pd.DataFrame, task: str, name: str, methods: Sequence[str]) -> None:
    """The mean over the seeds at the published rate, and their range."""
    for method, look in looks(methods):
        runs = list(values(rows, task, method, 1.0, "curves"))
        steps, lines = runs[0]["step"], np.array([curves[name] for curves in runs])
        scale = {"right": 100.0}.get(name, 1.0)
        ax.plot(steps, lines.mean(axis=0) * scale, linewidth=1.4, **look)
        ax.fill_between(
            steps, lines.min(axis=0) * scale, lines.max(axis=0) * scale, color=look["color"], alpha=0.18, linewidth=0
        )
    ax.set_xlabel("step")


def draw(rows: pd.DataFrame, traces: Path, *, methods: Sequence[str]) -> Figure:
    """Curves at the published rates, and what other rates give."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    plt.switch_backend("agg")
    figure, panels = plt.subplots(2, 3, figsize=(9.0, 5.4), layout="constrained")
    for (left, middle, right), task in zip(panels, PAPER, strict=True):
        draw_curves(left, rows, task, "train", methods)
        draw_curves(middle, rows, task, "right" if task == "cifar" else "valid", methods)
        left.set(ylabel="training loss [nats]", title=TITLES[task])
        middle.set_ylabel("right answers, held out [%]" if task == "cifar" else "validation loss [nats]")
        grid = rows[(rows["task"] == task) & (rows["seed"] == rows["seed"].min())]
        for method, look in looks(methods):
            own = grid[grid["method"] == method].sort_values("factor")
            right.plot(own["factor"], own["judged"], marker="o", markersize=4, linewidth=1.4, **look)
        right.set(xscale="log", xlabel="rate, in published ones", title="other rates, one seed")
        right.set_ylim(top=min(right.get_ylim()[1], CHANCE[task]))
        middle.set_ylim(top=min(middle.get_ylim()[1], 100 if task == "cifar" else CHANCE[task]))
        right.xaxis.set_major_locator(FixedLocator(sorted(grid["factor"].unique())))
        right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
        right.xaxis.set_minor_locator(NullLocator())
        right.set_ylabel("training loss before the decay" if task == "cifar" else "final validation loss [nats]")
        middle.set_title("published rates, range of the seeds", size="medium")
    for ax in panels.flat:
        ax.title.set_size("medium")
        ax.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure
