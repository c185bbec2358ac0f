"""Tables and a figure of the runs in a results file."""

import argparse
import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from arms import ARMS, ORACLE, named
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from regret import at_edge, common, doses, harmless, over_seeds, summary, widths, with_regret
from results import read_whole
from workloads import SET_ASIDE, WORKLOADS

DOSES = {"autoclip_x": ("autoclip", "o-", "AutoClip"), "set_x": ("autoclip_set", "s--", "AutoClip, set")}
"""Beginnings of the names of arms that end in a dose: the arm of dose 1, how to draw them, and what they are."""

LOSSES = ("final", "tail", "best")

BESIDE = {"relative_0.01": "--", "relative_0.03": ":", "control_percentile": "-."}
"""Arms without a dose that are drawn beside the dose-response."""


def read(path: Path) -> pd.DataFrame:
    if not path.exists():
        raise FileNotFoundError(f"There are no results at `{path}`.")
    runs = pd.read_csv(io.StringIO(read_whole(path)))
    runs["diverged"] = runs["diverged"].astype(str) == "True"
    order = {name: i for i, name in enumerate(ARMS)}
    return runs.sort_values("arm", key=lambda arm: arm.map(order), kind="stable")


def percent(table: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    table = table.copy()
    table[columns] = (100 * table[columns]).round(1)
    return table


def print_pooled(runs: pd.DataFrame) -> None:
    """Prints median, mean and worst regret by all three losses: where these disagree, noise decides."""
    columns = ["median", "mean", "worst"]
    for said, regret in {"every seed by itself": with_regret, "mean loss over seeds": over_seeds}.items():
        tables = {loss: summary(regret(runs, set(ORACLE), loss))[columns] for loss in LOSSES}
        table = (100 * pd.concat(tables, axis=1)).round(1)
        print(f"Regret, {said}, by the loss: after the last step, mean of the last tenth, lowest on the way [%]")
        print(table.drop(index=list(set(ORACLE) - {"none"}), errors="ignore").to_string(), end="\n\n")


def print_tables(runs: pd.DataFrame, loss: str) -> None:
    shares = ["median", "mean", "worst", "clipped", "probing"]
    others = runs[~runs["arm"].isin(set(ORACLE) - {"none"})]
    print(f"Regret of the {loss} validation loss to the best fixed threshold, or none, at the same rate [%]")
    print(percent(summary(others), shares).to_string())
    for kind, part in others.groupby("kind"):
        print(f"\n{kind} [%]")
        print(percent(summary(part), shares).to_string())
    print("\nMean over seeds by workload and rate [%]")
    cases = others[others["rescued"]].pivot_table(index="arm", columns=["workload", "lr"], values="regret", sort=False)
    print((100 * cases).round(1).sort_index(axis=1).to_string())
    print("\nRange of rates that end within 5% of the best loss [factor]")
    print(widths(runs, loss).reindex([a for a in ARMS if a in set(others["arm"])]).round().to_string())
    for prefix, (unit, _, label) in DOSES.items():
        print(f"\nMean regret by dose: longest steps in those of {label} [%]")
        print((100 * doses(runs, prefix, unit)).round(1).to_string())
    print(
        "\nWhere clipping does not matter: change of the loss, and its standard deviation over seeds [% of the descent]"
    )
    print((100 * harmless(runs, "autoclip", loss)).round(2).to_string())
    lost = runs.loc[~runs["rescued"], ["workload", "lr", "seed"]].drop_duplicates()
    print(f"\nCases in which no fixed threshold survived, or none was run: {len(lost)}")
    print("Best member of the oracle, how often:", at_edge(runs, list(ORACLE)).to_dict())


def colours(runs: pd.DataFrame) -> dict[str, Any]:
    workloads = [name for name in WORKLOADS if name in set(runs["workload"])]
    return dict(zip(workloads, sns.color_palette("colorblind", len(workloads)), strict=True))


def draw_regrets(runs: pd.DataFrame, ax: Axes) -> None:
    present = set(runs["arm"])
    shown = [name for name in ARMS if name in present and name not in set(ORACLE) - {"none"}]
    shown = [name for name in shown if not name.startswith(tuple(DOSES))]
    data = runs[runs["arm"].isin(shown) & runs["rescued"]].assign(regret=lambda d: 100 * d["regret"])
    by_workload = {"hue": "workload", "palette": colours(runs), "hue_order": list(colours(runs))}
    sns.boxplot(data, y="arm", x="regret", order=shown, color="0.92", fliersize=0, width=0.6, ax=ax)
    sns.stripplot(data, y="arm", x="regret", order=shown, size=4, alpha=0.8, ax=ax, **by_workload)
    ax.set_xscale("symlog", linthresh=1)
    ax.set(xlabel="regret to the best fixed threshold at the same rate [%]", ylabel="")
    ax.axvline(0, color="0.5", lw=0.8, zorder=0)
    sns.move_legend(ax, "lower left", bbox_to_anchor=(0, 1.01), ncol=3, title=None, fontsize="small", frameon=False)


def draw_doses(runs: pd.DataFrame, ax: Axes) -> None:
    colour = colours(runs)
    for prefix, (unit, style, label) in DOSES.items():
        table = 100 * doses(runs, prefix, unit)
        for workload in table:
            regret = table[workload].dropna()
            ax.plot(regret.index, regret, style, color=colour[workload], ms=4)
        if not table.empty:
            ax.plot([], [], style, color="0.3", label=label)
    for name, style in BESIDE.items():
        regret = runs.loc[(runs["arm"] == name) & runs["rescued"], "regret"]
        if not regret.empty:
            ax.axhline(100 * regret.mean(), color="0.3", ls=style, lw=1, label=f"{name}, mean over all")
    ax.set_xscale("log")
    ax.set_yscale("symlog", linthresh=1)
    ax.set(xlabel="longest step [longest steps of AutoClip]", ylabel="mean regret [%]")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1.01), ncol=2, fontsize="small", frameon=False)


def figure(runs: pd.DataFrame, path: Path) -> None:
    mpl.use("Agg")
    count = runs["arm"].nunique()
    fig, (left, right) = plt.subplots(1, 2, figsize=(13, 2 + 0.22 * count), width_ratios=(3, 2), layout="constrained")
    draw_regrets(runs, left)
    draw_doses(runs, right)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--loss", choices=LOSSES, default="final")
    parser.add_argument("--steps", type=int, help="runs of this length only")
    parser.add_argument("--figure", type=Path, help="default: beside the results")
    parser.add_argument(
        "--arms", nargs="+", metavar="NAME", help="these beside the oracle, in cases that have them all"
    )
    parser.add_argument("--final", action="store_true", help="the workloads set aside, instead of all others")
    args = parser.parse_args()
    runs = read(args.results)
    runs = runs[runs["workload"].isin(SET_ASIDE) == args.final]
    if args.arms is not None:
        arms = named(args.arms)
        runs = common(runs[runs["arm"].isin({*arms, *ORACLE})], arms)
    if args.steps is not None:
        runs = runs[runs["steps"] == args.steps]
    print_pooled(runs)
    runs = with_regret(runs, set(ORACLE), args.loss)
    print_tables(runs, args.loss)
    path = args.figure or args.results.with_suffix(".png")
    figure(runs, path)
    print(f"Figure: {path}")


if __name__ == "__main__":
    main()
