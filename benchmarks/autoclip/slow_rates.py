"""Rates that are too small: how far AutoClip with ``set_lr`` ends behind the best of several rates.

    SMOOTHDIAG_DATA=... python benchmarks/autoclip/slow_rates.py --parts think choose
    python benchmarks/autoclip/slow_rates.py --parts --write docs/autoclip.md      # trains nothing, writes the tables

Every task of a part is trained with a constant rate, with each optimizer that it has a safe rate for, at 1/16 and 1/128
of that rate. The best of any rate is the best of no clipping at 1, 4 and 16 safe rates and of AutoClip at 16 and 64.
Regret is (loss - best) / (initial loss - best) in %. Runs that are in ``results.csv`` already are taken from there.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd
from arms import RAISING
from regret import common, interval, with_regret
from report import PARTS, read
from results import Case, done, mend, remaining
from run import cases, chosen, run_all
from tables import OWN, label, markdown, percent, said
from tasks import TASKS
from training import data_of
from workloads import safe_rates, workload

FOLDER = Path(__file__).parent
STORED, OTHERS = FOLDER / "slow_rates.csv", FOLDER / "results.csv"

OPTIMIZERS = ("momentum", "plain", "adamw")

SLOW = (1 / 16, 1 / 128)
"""Rates that are too small [safe rates]."""

FAIR = (1, 4)
"""Rates that are not too small [safe rates]: what does it cost to raise these?"""

BEST = {"none": (1, 4, 16), OWN: (16, 64)}
"""What the best of any rate is taken from: arms with their rates [safe rates]."""

ANY_RATE = ("workload", "seed", "steps")
"""Columns that must agree for runs to be compared with the best of any rate."""

LABELS = {
    "set_lr": "**`set_lr=True`**",
    "set_lr_half": "to half of that rate",
    "set_lr_line": "in a straight line to step 30",
    "set_lr_late": "at step 30",
}

BLOCK = re.compile(r"(<!-- begin: (\w+) by slow_rates\.py -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def names(parts: Sequence[str], optimizers: Sequence[str], tasks: Sequence[str]) -> list[str]:
    """Returns the workloads of these parts, or of these tasks of them."""
    kept = [task for task in TASKS.values() if task.part in parts and (not tasks or task.name in tasks)]
    return [f"{task.name}/{o}/constant" for task in kept for o in optimizers if f"{task.name}/{o}" in safe_rates()]


def wanted(of: Iterable[str], arms: Sequence[str], rates: Sequence[float]) -> Iterator[Case]:
    """Yields the runs: those that the best is taken from, and each arm at each of the rates."""
    for name in of:
        for arm, fair in BEST.items():
            yield from cases([(name, rate) for rate in fair], [arm], [0], 300)
        yield from cases([(name, rate) for rate in rates], arms, [0], 300)


def compared(paths: Iterable[Path]) -> pd.DataFrame:
    """Returns the runs with the regret behind the best of any rate, of workloads where all of ``BEST`` was run."""
    runs = pd.concat([read(path) for path in paths]).drop_duplicates(["workload", "lr", "seed", "arm"])
    runs = runs[(runs["schedule"] == "constant") & runs["optimizer"].isin(OPTIMIZERS) & (runs["seed"] == 0)]
    fair = [(arm, rate) for arm, rates in BEST.items() for rate in rates]
    is_fair = pd.Series([each in fair for each in zip(runs["arm"], runs["rate"], strict=True)], runs.index)
    is_whole = is_fair.groupby(runs["workload"]).transform("sum") == len(fair)
    found = with_regret(runs.assign(arm=runs["arm"].mask(is_fair, "fair"))[is_whole], {"fair"}, same=ANY_RATE)
    return found.assign(arm=runs["arm"][is_whole])


def tables(runs: pd.DataFrame) -> dict[str, str]:
    """Returns the Markdown tables by name: of each part at slow rates, of other ways to raise them, and of fair rates.

    Arms of a table are compared over the same cases.
    """
    slow, fair = runs[runs["rate"].isin(SLOW)], runs[runs["rate"].isin(FAIR)]
    found = {part: table(slow[slow["part"] == part], ("none", OWN, "set_lr")) for part in PARTS}
    if len(ways := [arm for arm in RAISING if arm in set(slow["arm"])]) > 1:
        found["ways"] = table(slow, ways)
    found["fair"] = table(fair, ("none", "set_lr"))
    return {name: shown for name, shown in found.items() if shown}


def table(runs: pd.DataFrame, arms: Sequence[str]) -> str:
    """Returns median, mean and worst regret by optimizer and arm, and the mean over tasks; nothing without cases."""
    runs = common(runs[runs["arm"].isin(arms)], arms)
    rows = []
    for optimizer in OPTIMIZERS:
        for arm in arms:
            own = runs[(runs["optimizer"] == optimizer) & (runs["arm"] == arm)]
            if not own.empty:
                means = own.groupby("task")["regret"].mean()
                shares = percent([own["regret"].median(), own["regret"].mean(), own["regret"].max()])
                shown = said(means.mean(), *interval(means))
                rows.append([optimizer, LABELS.get(arm, label(arm)), *shares, shown, len(own), len(means)])
    head = ["optimizer", "arm", "median", "mean", "worst", "mean over tasks (90%)", "cases", "tasks"]
    return markdown(head, rows) if rows else ""


def written(page: str, found: Mapping[str, str]) -> str:
    """Returns the page with these tables between their markers."""
    return BLOCK.sub(lambda m: f"{m[1]}{found[m[2]]}\n{m[4]}" if m[2] in found else m[0], page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="*", default=["think"], choices=PARTS, help="none: train nothing")
    parser.add_argument("--tasks", nargs="*", default=[], metavar="NAME", help="these tasks of the parts alone")
    parser.add_argument("--optimizers", nargs="+", default=OPTIMIZERS, choices=OPTIMIZERS)
    parser.add_argument("--arms", nargs="+", default=["set_lr", "none", OWN], metavar="NAME")
    parser.add_argument("--rates", nargs="+", type=float, default=SLOW, help="[safe rates]")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with one thread")
    parser.add_argument("--final", action="store_true", help="allow the part that is set aside")
    parser.add_argument("--out", type=Path, default=STORED, help="CSV that results are added to")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables between the markers of a page")
    args = parser.parse_args()
    of = names(args.parts, args.optimizers, args.tasks)
    try:
        chosen([], of, [1], final=args.final)
        for name in of:
            data_of(workload(name))
        mend(args.out)
        todo = remaining(dict.fromkeys(wanted(of, args.arms, args.rates)), done(args.out) | done(OTHERS))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    if todo and (failures := run_all(todo, args.out, args.jobs)):
        sys.exit(f"{failures} runs failed.")
    found = tables(compared([args.out, OTHERS]))
    for name, shown in found.items():
        print(f"{name}\n\n{shown}\n")
    if args.write is not None:
        args.write.write_text(written(args.write.read_text(encoding="utf-8"), found), encoding="utf-8")


if __name__ == "__main__":
    main()
