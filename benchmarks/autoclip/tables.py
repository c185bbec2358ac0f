"""Markdown tables of runs with regret; regrets are in %."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from arms import ARMS, BASELINES, FREE, LAW, ORACLE
from regret import ANY_RATE, CASE, common, interval, keys, paired, summary, task_means, with_regret
from workloads import OPTIMIZERS, RATES, SCHEDULES

OWN = "autoclip"

SHOWN_RIVALS = 3
"""So many rivals, the best by the mean over tasks, stand beside AutoClip in tables by task and by cell."""

LABELS = {
    "autoclip": "**AutoClip**",
    "autoclip_set": '**AutoClip**, `"set"`',
    "as_judged": "AutoClip as it was judged",
    "law_scan": "the law, from a scan",
    "law_run": "the law, from the run",
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

DONE = {
    "threshold": "threshold",
    "rate at most": "rate of 1/L0 at most",
    "rate by the norm": "rate by the norm",
    "AutoClip": "AutoClip",
}
"""What the arms of the law did, by the words after the verdict in their reasons."""


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


def law_table(runs: pd.DataFrame) -> str:
    """Returns regret by the verdict that an arm of the law had and by what it did, beside other arms in the same cases.

    A cell has the mean and the worst over cases.
    """
    others = [arm for arm in (OWN, "autoclip_set", "none") if arm in set(runs["arm"])]
    words = rf"^(\w+): ({'|'.join(DONE)})"
    rows = []
    for arm in LAW:
        own = common(runs[runs["arm"].isin([arm, *others])], [arm, *others])
        said = own["reason"].where(own["arm"] == arm).astype(object).str.extract(words)
        said = said.groupby(keys(own, CASE)).transform("first")
        for (verdict, does), cases in own.groupby([said[0], said[1]]):
            regret = cases.groupby("arm")["regret"]
            cells = [" / ".join(percent([regret.mean()[each], regret.max()[each]])) for each in (arm, *others)]
            counts = (cases["arm"] == arm).sum(), cases["task"].nunique()
            rows.append([label(arm), f"`{verdict}`", DONE[str(does)], *cells, *counts])
    return markdown(["", "verdict", "what was done", "the law", *map(label, others), "cases", "tasks"], rows)


def free_table(runs: pd.DataFrame, loss: str) -> str:
    """Returns how far runs end above the best of all arms, rates, optimizers and schedules on the same task.

    Optimizers without a rate stand beside AutoClip, max_norm = 1 and no clipping at all rates of the pool.
    """
    free = [name for name in FREE if name in set(runs["arm"])]
    runs = with_regret(common(runs, free, ANY_RATE), set(ARMS), loss, ANY_RATE)
    return arms_table(runs[runs["arm"].isin({*free, OWN, "max_norm_1", "none"})])
