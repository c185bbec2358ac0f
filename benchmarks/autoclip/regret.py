"""Computes regrets from runs, and means over tasks with bootstrap intervals from regrets; numbers only."""

import math
from collections.abc import Collection, Sequence

import numpy as np
import pandas as pd

CASE = ("workload", "lr", "seed", "steps")
"""Columns that must agree for runs to be compared with each other."""

ANY_RATE = ("task", "seed", "steps")
"""Columns that must agree where the best of all rates, optimizers and schedules is the reference."""

LEVEL, DRAWS = 0.9, 10_000


def keys(runs: pd.DataFrame, same: Sequence[str]) -> list[pd.Series]:
    return [runs[name] for name in same]


def with_regret(
    runs: pd.DataFrame, oracle: Collection[str], loss: str = "tail", same: Sequence[str] = CASE
) -> pd.DataFrame:
    """Returns the runs with the columns ``reference``, ``regret`` and ``rescued``.

    The reference is the lowest loss of any run of the oracle (fixed thresholds and no clipping) in the same case.
    Regret is (loss - reference) / (initial - reference). It is at most 1, and 1 for runs that diverged; NaN if the
    whole oracle diverged, or was not run. ``rescued`` says whether some of the oracle survived.

    Args:
        runs: One row per run.
        oracle: Names of the arms that make the reference.
        loss: Column to compare: ``"final"``, ``"tail"`` or ``"best"``.
        same: Columns that must agree for runs to be in the same case.
    """
    runs = runs.copy()
    # A run that ended above where it began may have been better on the way; that does not count.
    value = runs[loss].where(~runs["diverged"].astype(bool))
    runs["reference"] = value.where(runs["arm"].isin(oracle)).groupby(keys(runs, same)).transform("min")
    room = runs["initial"] - runs["reference"]
    runs["regret"] = ((value - runs["reference"]) / room).clip(upper=1.0).fillna(1.0).where(runs["reference"].notna())
    runs["rescued"] = runs["reference"].notna()
    return runs


def common(runs: pd.DataFrame, arms: Collection[str], same: Sequence[str] = CASE) -> pd.DataFrame:
    """Returns the runs of cases in which all of the arms were run, so that like is compared with like."""
    kept = runs["arm"].where(runs["arm"].isin(arms))
    return runs[kept.groupby(keys(runs, same)).transform("nunique") == len(set(arms))]


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns one row per arm, from runs with regret: regret over cases and over tasks, divergence, cost of probing.

    ``mean_task`` is the mean over tasks of the mean over the cases of a task; ``low`` and ``high`` bound it.
    """
    compared = runs[runs["rescued"]]
    arms = compared.groupby("arm", sort=False)
    by_task = task_means(compared)
    bounds = {arm: interval(by_task[arm].dropna()) for arm in by_task}
    return pd.DataFrame(
        {
            "cases": arms.size(),
            "tasks": by_task.notna().sum(),
            "median": arms["regret"].median(),
            "mean": arms["regret"].mean(),
            "worst": arms["regret"].max(),
            "diverged": arms["diverged"].sum(),
            "mean_task": by_task.mean(),
            "low": {arm: low for arm, (low, _) in bounds.items()},
            "high": {arm: high for arm, (_, high) in bounds.items()},
            "clipped": arms["clip_share"].mean(),
            "probing": arms["probe_gradients"].sum() / arms["train_gradients"].sum(),
        }
    ).reindex(compared["arm"].unique())


def task_means(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns the mean regret over the cases of a task: rows tasks, columns arms, both in the order of the runs."""
    table = runs[runs["rescued"]].pivot_table(index="task", columns="arm", values="regret", sort=False)
    return table.reindex(columns=runs.loc[runs["rescued"], "arm"].unique())


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns a bootstrap interval that contains the mean of the tasks 9 times in 10; NaN with fewer than two tasks.

    Source: the percentile interval, Efron 1979 (Annals of Statistics 7), from 10,000 draws with a fixed seed.
    """
    found = np.asarray(values, dtype=float)
    if len(found) < 2:
        return math.nan, math.nan
    means = found[np.random.default_rng(0).integers(len(found), size=(DRAWS, len(found)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def paired(runs: pd.DataFrame, arm: str, rival: str, same: Sequence[str] = CASE) -> pd.Series:
    """Returns regret of the arm minus regret of the rival by task, over the cases that both were run in."""
    both = common(runs[runs["arm"].isin([arm, rival]) & runs["rescued"]], [arm, rival], same)
    if both.empty:
        return pd.Series(dtype=float)
    means = task_means(both)
    return means[arm] - means[rival]


def doses(runs: pd.DataFrame, prefix: str, unit: str) -> pd.DataFrame:
    """Returns the mean regret, one row per dose and one column per task, over cases that have all doses.

    The table is empty if there is no arm except the arm of dose 1.

    Args:
        runs: Runs with regret.
        prefix: Arms named prefix + number have that dose.
        unit: The arm whose dose is 1.
    """
    has_dose = runs["arm"].str.startswith(prefix)
    if not has_dose.any():
        return pd.DataFrame()
    dosed = runs[(has_dose | (runs["arm"] == unit)) & runs["rescued"]]
    dosed = common(dosed, dosed["arm"].unique())
    multiple = dosed["arm"].replace(unit, f"{prefix}1").str.removeprefix(prefix).astype(float).rename("multiple")
    return dosed.groupby([multiple, "task"])["regret"].mean().unstack("task")


def at_edge(runs: pd.DataFrame, oracle: Sequence[str]) -> pd.Series:
    """Returns how often each member of the oracle was its best; a best at an end of the grid may lie beyond it."""
    members = runs[runs["arm"].isin(oracle) & runs["rescued"]]
    best = members[members["regret"] == 0].groupby(list(CASE))["arm"].first()
    return best.value_counts().reindex(list(oracle), fill_value=0)
