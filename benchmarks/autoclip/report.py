"""Tables and a figure of the runs in a results file, by part of the pool.

    python benchmarks/autoclip/report.py benchmarks/autoclip/results.csv
    python benchmarks/autoclip/report.py benchmarks/autoclip/results.csv --write docs/autoclip.md

A page holds a table between the lines ``<!-- begin: final arms by report.py -->`` and ``<!-- end -->``, with the part
of the pool and the name of the table: arms, tasks, cells, pairs, free. Regrets are in %.
"""

import argparse
import io
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from arms import ARMS, BASELINES, FREE, ORACLE
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from regret import ANY_RATE, CASE, at_edge, common, doses, interval, paired, summary, task_means, with_regret
from results import read_whole
from tasks import Part
from workloads import OPTIMIZERS, RATES, SCHEDULES, workload

PARTS = get_args(Part)

OWN = "autoclip"

SHOWN_RIVALS = 3
"""So many rivals, the best by the mean over tasks, stand beside AutoClip in tables by task and by cell."""

LABELS = {
    "autoclip": "**AutoClip**",
    "autoclip_set": '**AutoClip**, `"set"`',
    "none": "no clipping",
    "max_norm_1": "max_norm = 1",
    "relative_0.01": "steps within .01 of the parameters",
    "relative_0.03": "steps within .03 of the parameters",
    "percentile_10": "10th percentile",
    "zclip": "ZClip",
    "agc": "AGC",
    "adagc": "AdaGC",
    "spectral": "SPECTRA",
    "skip_step": "skip-step",
    "stable_adamw": "StableAdamW",
    "normalized": "normalised momentum",
    "mixclip": "MixClip",
    "prodigy": "Prodigy",
    "schedule_free": "schedule-free AdamW",
}
"""Names of arms on a page; other arms go by their names in the results."""

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


def percent(values: Iterable[float]) -> list[str]:
    return ["–" if pd.isna(value) else f"{100 * value + 0.0:.1f}" for value in values]


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    first, *lines = (f"| {' | '.join(map(str, line))} |" for line in [head, *rows])
    return "\n".join([first, f"|{'---|' * len(head)}", *lines])


def label(arm: str) -> str:
    return LABELS.get(arm, f"`{arm}`")


def said(mean: float, low: float, high: float) -> str:
    """Returns a mean with its interval, in %."""
    shown = percent([mean, low, high])
    return shown[0] if "–" in shown else f"{shown[0]} ({shown[1]} to {shown[2]})"


def arms_table(runs: pd.DataFrame) -> str:
    """Returns regret by arm; rows from the lowest mean over tasks to the highest."""
    found = summary(runs[~runs["arm"].isin(set(ORACLE) - {"none"})]).sort_values("mean_task", kind="stable")
    head = ["arm", "median", "mean", "worst", "diverged", "mean over tasks (90%)", "cases", "tasks"]
    rows = []
    for arm, row in found.iterrows():
        means = said(row["mean_task"], row["low"], row["high"])
        counts = row[["diverged", "cases", "tasks"]].astype(int)
        shares = percent([row["median"], row["mean"], row["worst"]])
        rows.append([label(str(arm)), *shares, counts["diverged"], means, counts["cases"], counts["tasks"]])
    return markdown(head, rows)


def best_rivals(runs: pd.DataFrame) -> list[str]:
    """Returns the rivals that do best beside AutoClip, of those that apply to every kind of optimizer."""
    kinds = set(runs["kind"])
    rivals = [arm for arm in runs["arm"].unique() if arm in BASELINES and kinds <= set(ARMS[arm].kinds)]
    lead = {arm: paired(runs, arm, OWN).mean() for arm in rivals}
    return sorted(lead, key=lambda arm: lead[arm])[:SHOWN_RIVALS]


def beside_rivals(runs: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Returns AutoClip, the best rivals and no clipping, and the cases that all of them were run in."""
    arms = [OWN, *best_rivals(runs), "none"]
    return common(runs[runs["arm"].isin(arms)], arms), arms


def tasks_table(runs: pd.DataFrame) -> str:
    """Returns mean and worst regret over the cases of each task."""
    runs, arms = beside_rivals(runs)
    groups = {task: runs[runs["task"] == task] for task in sorted(runs["task"].unique())}
    return sliced("task", groups, arms)


def cells_table(runs: pd.DataFrame) -> str:
    """Returns mean and worst regret by schedule, by optimizer and by rate."""
    runs, arms = beside_rivals(runs)
    groups = {name: runs[runs["schedule"] == name] for name in SCHEDULES}
    groups |= {name: runs[runs["optimizer"] == name] for name in OPTIMIZERS}
    groups |= {f"{rate} x safe": runs[(runs["rate"] / rate - 1).abs() < 1e-6] for rate in RATES}
    return sliced("cases of", groups, arms)


def sliced(first: str, groups: Mapping[str, pd.DataFrame], arms: Sequence[str]) -> str:
    """Returns the mean over tasks and the worst regret of each group of runs."""
    rows = []
    for name, group in groups.items():
        if not group.empty:
            means, worst = task_means(group).mean(), group.groupby("arm")["regret"].max()
            cells = [" / ".join(percent([means[arm], worst[arm]])) for arm in arms]
            rows.append([name, *cells, int((group["arm"] == OWN).sum())])
    return markdown([first, *map(label, arms), "cases"], rows)


def pairs_table(runs: pd.DataFrame) -> str:
    """Returns AutoClip's regret minus that of each other arm, over the cases that both were run in."""
    rows = []
    for arm in runs["arm"].unique():
        if arm in set(ORACLE) - {"none"} or arm == OWN:
            continue
        found = paired(runs, OWN, arm)
        if not found.empty:
            shown = said(found.mean(), *interval(found))
            rows.append([label(arm), shown, f"{(found < 0).sum()} of {len(found)}"])
    return markdown(["rival", "AutoClip minus rival (90%)", "tasks on which AutoClip is better"], rows)


def free_table(runs: pd.DataFrame, loss: str) -> str:
    """Returns how far runs end above the best of all arms, rates, optimizers and schedules on the same task.

    Optimizers without a rate stand beside AutoClip, max_norm = 1 and no clipping at all rates of the pool.
    """
    free = [name for name in FREE if name in set(runs["arm"])]
    runs = with_regret(common(runs, free, ANY_RATE), set(ARMS), loss, ANY_RATE)
    return arms_table(runs[runs["arm"].isin({*free, OWN, "max_norm_1", "none"})])


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
    data = runs[runs["arm"].isin(shown)].assign(regret=lambda d: 100 * d["regret"])
    sns.boxplot(data, y="arm", x="regret", order=shown, color="0.92", fliersize=0, width=0.6, ax=ax)
    sns.stripplot(data, y="arm", x="regret", order=shown, hue="task", palette=colours(runs), size=3.5, ax=ax)
    ax.set_xscale("symlog", linthresh=1)
    ax.set(xlabel="regret to the best fixed threshold at the same rate [%]", ylabel="")
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
    """Saves a panel of regrets for each part; a second row where arms of doses were run."""
    mpl.use("Agg")
    dosed = any(runs["arm"].str.startswith(tuple(DOSES)).any() for runs in by_part.values())
    height = 2.5 + 0.24 * max(runs["arm"].nunique() for runs in by_part.values())
    size = (6 * len(by_part), height + 3.5 * dosed)
    fig, axes = plt.subplots(1 + dosed, len(by_part), figsize=size, layout="constrained", squeeze=False)
    for (part, runs), column in zip(by_part.items(), axes.T, strict=True):
        draw_regrets(runs, column[0])
        column[0].set_title(part, loc="left")
        if dosed:
            draw_doses(runs, column[1])
    fig.savefig(path, dpi=150)
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
