"""Tables and a figure of the runs in a results file."""

import argparse
import io
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from arms import ARMS, ORACLE
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from regret import at_edge, doses, summary, widths, with_regret
from results import read_whole

DOSE = "autoclip_x"
BESIDE = ("relative_0.01", "relative_0.03", "control_percentile")
"""Arms without a multiple that stand beside the dose-response."""


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
    print("\nMean regret by multiple of the measured length [%]")
    print((100 * doses(runs, DOSE)).round(1).to_string())
    lost = runs.loc[~runs["rescued"], ["workload", "lr", "seed"]].drop_duplicates()
    print(f"\nCases in which no fixed threshold survived, or none was run: {len(lost)}")
    print("Best member of the oracle, how often:", at_edge(runs, list(ORACLE)).to_dict())


def draw_regrets(runs: pd.DataFrame, ax: Axes) -> None:
    shown = [name for name in ARMS if name in set(runs["arm"]) and name not in set(ORACLE) - {"none"}]
    shown = [name for name in shown if not name.startswith(DOSE)]
    data = runs[runs["arm"].isin(shown) & runs["rescued"]].assign(regret=lambda d: 100 * d["regret"])
    sns.boxplot(data, y="arm", x="regret", order=shown, color="0.92", fliersize=0, width=0.6, ax=ax)
    sns.stripplot(
        data, y="arm", x="regret", hue="workload", order=shown, palette="colorblind", size=4, alpha=0.8, ax=ax
    )
    ax.set_xscale("symlog", linthresh=1)
    ax.set(xlabel="regret to the best fixed threshold at the same rate [%]", ylabel="")
    ax.axvline(0, color="0.5", lw=0.8, zorder=0)
    ax.legend(title=None, fontsize="small", loc="lower right")


def draw_doses(runs: pd.DataFrame, ax: Axes) -> None:
    table = (100 * doses(runs, DOSE)).stack().rename("regret").reset_index()
    workloads = sorted(runs["workload"].unique())
    if not table.empty:
        sns.lineplot(
            table, x="multiple", y="regret", hue="workload", hue_order=workloads, style="workload",
            markers=True, dashes=False, palette="colorblind", legend=False, ax=ax,
        )  # fmt: skip
        ax.set_xscale("log")
    beside = runs[runs["arm"].isin(BESIDE) & runs["rescued"]].groupby("arm")["regret"].mean()
    right = float(table["multiple"].max()) if not table.empty else 1.0
    for name, style in zip(BESIDE, ("--", ":", "-."), strict=True):
        if name in beside:
            ax.axhline(100 * beside[name], color="0.3", ls=style, lw=1)
            ax.annotate(f"{name}, mean", (right, 100 * beside[name]), ha="right", va="bottom", fontsize="x-small")
    ax.set_yscale("symlog", linthresh=1)
    ax.set(xlabel="longest step [measured lengths]", ylabel="mean regret [%]")


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
    parser.add_argument("--loss", choices=("final", "tail", "best"), default="final")
    parser.add_argument("--steps", type=int, help="runs of this length only")
    parser.add_argument("--figure", type=Path, help="default: beside the results")
    args = parser.parse_args()
    runs = read(args.results)
    if args.steps is not None:
        runs = runs[runs["steps"] == args.steps]
    runs = with_regret(runs, set(ORACLE), args.loss)
    print_tables(runs, args.loss)
    path = args.figure or args.results.with_suffix(".png")
    figure(runs, path)
    print(f"Figure: {path}")


if __name__ == "__main__":
    main()
