"""Tables and a figure of the runs in a results file, by part of the pool.

    python benchmarks/autoclip/report.py benchmarks/autoclip/results.csv
    python benchmarks/autoclip/report.py benchmarks/autoclip/results.csv --write docs/autoclip.md

A page holds a table between the lines ``<!-- begin: final arms by report.py -->`` and ``<!-- end -->``, with the part
of the pool and the name of the table: arms, tasks, cells, pairs, free, law. Regrets are in %.
"""

import argparse
import io
import math
import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, get_args

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from arms import ARMS, FREE, LAW, ORACLE
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from regret import CASE, at_edge, common, doses, summary, with_regret
from results import read_whole
from tables import OWN, arms_table, cells_table, free_table, label, law_table, pairs_table, percent, tasks_table
from tasks import Part
from workloads import workload

PARTS = get_args(Part)

DOSES = {"autoclip_x": ("autoclip", "o-", "AutoClip"), "set_x": ("autoclip_set", "s--", "AutoClip, set")}
"""Beginnings of the names of arms that end in a dose: the arm of dose 1, how to draw them, and what they are."""

BLOCK = re.compile(r"(<!-- begin: (\w+ \w+) by report\.py -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def read(path: Path, steps: int = 300) -> pd.DataFrame:
    """Returns the runs of this length with the columns task, part, optimizer, schedule and rate [safe rates].

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a workload is not in the pool.
    """
    if not path.exists():
        raise FileNotFoundError(f"There are no results at `{path}`.")
    runs = pd.read_csv(io.StringIO(read_whole(path)))
    runs = runs[runs["steps"] == steps]
    known = {name: workload(name) for name in runs["workload"].unique()}
    columns = {
        "task": {name: each.task.name for name, each in known.items()},
        "part": {name: each.task.part for name, each in known.items()},
        "optimizer": {name: each.optimizer_name for name, each in known.items()},
        "schedule": {name: each.schedule for name, each in known.items()},
    }
    runs = runs.assign(**{column: runs["workload"].map(found) for column, found in columns.items()})
    runs["diverged"] = runs["diverged"].astype(str) == "True"
    runs["rate"] = runs["lr"] / runs["workload"].map({name: each.safe_rate for name, each in known.items()})
    order = {name: i for i, name in enumerate(ARMS)}
    return runs.sort_values("arm", key=lambda arm: arm.map(order), kind="stable")


def oracle_of(runs: pd.DataFrame) -> list[str]:
    present = set(runs["arm"])
    return [name for name in ORACLE if name in present]


def compared(runs: pd.DataFrame, loss: str) -> pd.DataFrame:
    """Returns the runs that have a rate, with regret, of the cases whose oracle is complete."""
    oracle = oracle_of(runs)
    found = with_regret(common(runs[~runs["arm"].isin(FREE)], oracle), oracle, loss)
    return found[found["rescued"]]


def tables(runs: pd.DataFrame, loss: str, parts: Collection[str]) -> dict[str, str]:
    """Returns the Markdown tables by name, such as ``"final arms"``."""
    found = {}
    for part in parts:
        own = runs[runs["part"] == part]
        cases = compared(own, loss)
        if cases.empty:
            continue
        found[f"{part} arms"] = arms_table(cases)
        if OWN in set(cases["arm"]):
            found[f"{part} tasks"] = tasks_table(cases)
            found[f"{part} cells"] = cells_table(cases)
            found[f"{part} pairs"] = pairs_table(cases)
        if set(LAW) & set(cases["arm"]):
            found[f"{part} law"] = law_table(cases)
        if set(FREE) & set(own["arm"]):
            found[f"{part} free"] = free_table(own, loss)
    return found


def written(page: str, found: Mapping[str, str]) -> str:
    """Returns the page with these tables between their markers; other tables of the page stay as they are."""
    return BLOCK.sub(lambda m: f"{m[1]}{found[m[2]]}\n{m[4]}" if m[2] in found else m[0], page)


def blocks(page: str) -> list[str]:
    """Returns the names of the tables that the page has markers for."""
    return [name for _, name, _, _ in BLOCK.findall(page)]


def notes(runs: pd.DataFrame, loss: str) -> str:
    """Returns what the tables leave out, where in its grid the oracle was best, and what AutoClip did and cost."""
    oracle = oracle_of(runs)
    rated = runs[~runs["arm"].isin(FREE)]
    cases = with_regret(common(rated, oracle), oracle, loss)
    number, whole = rated.groupby(list(CASE)).ngroups, cases.groupby(list(CASE))["rescued"].first()
    best = ", ".join(f"{name} {count}" for name, count in at_edge(cases, oracle).items())
    lines = [
        f"Cases with the whole oracle: {len(whole)} of {number}; in {(~whole).sum()} of them nothing of it survived.",
        f"Best member of the oracle, how often: {best}.",
    ]
    if OWN in set(cases.loc[cases["rescued"], "arm"]):
        clipped, probing = percent(summary(cases).loc[OWN, ["clipped", "probing"]])
        lines.append(f"AutoClip shortened {clipped}% of the steps; its probe took {probing}% more gradients.")
    return "\n".join(lines)


def draw_regrets(runs: pd.DataFrame, ax: Axes) -> None:
    """Draws every case as a point with the colour of its task, one line per arm."""
    shown = [arm for arm in ARMS if arm in set(runs["arm"]) and arm not in set(ORACLE) - {"none"}]
    shown = [arm for arm in shown if not arm.startswith(tuple(DOSES))]
    names = [label(arm).strip("*`") for arm in shown]
    data = runs[runs["arm"].isin(shown)].assign(regret=lambda d: 100 * d["regret"])
    data["arm"] = data["arm"].map(dict(zip(shown, names, strict=True)))
    sns.boxplot(data, y="arm", x="regret", order=names, color="0.92", fliersize=0, width=0.6, ax=ax)
    sns.stripplot(data, y="arm", x="regret", order=names, hue="task", palette=colours(runs), size=3.5, ax=ax)
    ax.set_xscale("symlog", linthresh=1)
    ax.set_xlim(-100, 110)
    ax.set(xlabel="regret to the best threshold by hand [%]", ylabel="")
    ax.axvline(0, color="0.5", lw=0.8, zorder=0)
    sns.move_legend(ax, "lower left", bbox_to_anchor=(0, 1.06), ncol=2, title=None, fontsize="small", frameon=False)


def draw_doses(runs: pd.DataFrame, ax: Axes) -> None:
    """Draws the mean regret of each task by the dose."""
    for prefix, (unit, style, said_as) in DOSES.items():
        table = 100 * doses(runs, prefix, unit)
        for task in table:
            ax.plot(table.index, table[task], style, color=colours(runs)[task], ms=4)
        if not table.empty:
            ax.plot([], [], style, color="0.3", label=said_as)
    ax.set_xscale("log")
    ax.set_yscale("symlog", linthresh=1)
    ax.set(xlabel="longest step [longest steps of AutoClip]", ylabel="mean regret [%]")
    ax.legend(fontsize="small", frameon=False)


def colours(runs: pd.DataFrame) -> dict[str, Any]:
    tasks = sorted(runs["task"].unique())
    return dict(zip(tasks, sns.color_palette("colorblind", len(tasks)), strict=True))


def figure(by_part: Mapping[str, pd.DataFrame], path: Path) -> None:
    """Saves a panel of regrets for each part, two beside each other; further panels where arms of doses were run."""
    mpl.use("Agg")
    panels = [(draw_regrets, part) for part in by_part]
    panels += [(draw_doses, part) for part, runs in by_part.items() if runs["arm"].str.startswith(tuple(DOSES)).any()]
    height = 2.5 + 0.24 * max(runs["arm"].nunique() for runs in by_part.values())
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    fig, axes = plt.subplots(rows, columns, figsize=(6 * columns, height * rows), layout="constrained", squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    for (draw, part), ax in zip(panels, axes.flat, strict=False):
        draw(by_part[part], ax)
        ax.set_title(part, loc="left")
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all that were run")
    parser.add_argument("--loss", choices=("final", "tail", "best"), default="tail")
    parser.add_argument("--steps", type=int, default=300, help="runs of this length only; a page has those of 300")
    parser.add_argument("--figure", type=Path, metavar="PATH", help="draw the regrets")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables between the markers of a page")
    args = parser.parse_args()
    try:
        runs = read(args.results, args.steps)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    found = tables(runs, args.loss, args.parts)
    for name, table in found.items():
        print(f"{name}\n\n{table}\n")
    for part in args.parts:
        if f"{part} arms" in found:
            print(f"{part}: {notes(runs[runs['part'] == part], args.loss)}")
    if args.write is not None:
        page = args.write.read_text(encoding="utf-8")
        args.write.write_text(written(page, found), encoding="utf-8")
        left = [name for name in blocks(page) if name not in found]
        print(f"Tables of {args.write} that are new: {len(blocks(page)) - len(left)}; not in the results: {left}")
    if args.figure is not None:
        by_part = {part: compared(runs[runs["part"] == part], args.loss) for part in args.parts}
        figure({part: cases for part, cases in by_part.items() if not cases.empty}, args.figure)


if __name__ == "__main__":
    main()
