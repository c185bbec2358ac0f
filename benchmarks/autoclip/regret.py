"""Computes regrets from runs, and the summary of each way of clipping from regrets; numbers only."""

from collections.abc import Collection, Sequence

import numpy as np
import pandas as pd

CASE = ["workload", "lr", "seed", "steps"]
"""Columns that must agree for runs to be compared with each other."""

NEAR = 1.05
"""A rate counts as good if its loss is within this factor of the best loss of the workload."""


def with_regret(runs: pd.DataFrame, oracle: Collection[str], loss: str = "final") -> pd.DataFrame:
    """Returns the runs with the columns ``reference``, ``regret`` and ``rescued``.

    The reference is the lowest loss of any run of the oracle (fixed thresholds and no clipping) in the same case.
    Regret is (loss - reference) / (initial - reference). It is at most 1, and 1 for runs that diverged; NaN if the
    whole oracle diverged, or was not run. ``rescued`` says whether some of the oracle survived.

    Args:
        runs: One row per run.
        oracle: Names of the arms that make the reference.
        loss: Column to compare: ``"final"``, ``"tail"`` or ``"best"``.
    """
    runs = runs.copy()
    # A run that ended above where it began may have been better on the way; that does not count.
    value = runs[loss].where(~runs["diverged"].astype(bool))
    runs["reference"] = value.where(runs["arm"].isin(oracle)).groupby([runs[name] for name in CASE]).transform("min")
    room = runs["initial"] - runs["reference"]
    runs["regret"] = ((value - runs["reference"]) / room).clip(upper=1.0).fillna(1.0).where(runs["reference"].notna())
    runs["rescued"] = runs["reference"].notna()
    return runs


def over_seeds(runs: pd.DataFrame, oracle: Collection[str], loss: str = "final") -> pd.DataFrame:
    """Returns the mean over all seeds of a case as one run, with regret to the threshold that is best on average.

    The best threshold of every single seed owes some of its lead to chance; the threshold that is best on average owes
    less. An arm that was not run from every seed is left out of the case. If an arm diverged from any seed, it counts
    as diverged.
    """
    same = ["workload", "lr", "steps"]
    arms = runs.groupby([*same, "arm"], sort=False)
    numbers = ["initial", loss, "clip_share", "probe_gradients", "train_gradients"]
    mean = arms[numbers].mean().assign(diverged=arms["diverged"].any(), seeds=arms["seed"].nunique()).reset_index()
    complete = mean["seeds"] == mean.groupby(same)["seeds"].transform("max")
    return with_regret(mean[complete].assign(seed="all"), oracle, loss)


def common(runs: pd.DataFrame, arms: Collection[str]) -> pd.DataFrame:
    """Returns the runs of cases in which all of the arms were run, so that like is compared with like."""
    had = runs[runs["arm"].isin(arms)].groupby([runs[name] for name in CASE])["arm"].nunique()
    complete = had[had == len(set(arms))].index
    return runs[pd.MultiIndex.from_frame(runs[CASE]).isin(complete)]


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns one row per arm, from runs with regret: median, mean and worst regret, divergence and cost of probing."""
    compared = runs[runs["rescued"]]
    arms = compared.groupby("arm", sort=False)
    return pd.DataFrame(
        {
            "runs": arms.size(),
            "median": arms["regret"].median(),
            "mean": arms["regret"].mean(),
            "worst": arms["regret"].max(),
            "diverged": arms["diverged"].sum(),
            "clipped": arms["clip_share"].mean(),
            "probing": arms["probe_gradients"].sum() / arms["train_gradients"].sum(),
        }
    )


def per_rate(runs: pd.DataFrame, loss: str = "final") -> pd.DataFrame:
    """Returns the mean loss over seeds: rows (workload, arm), one column per place in the list of rates.

    The mean is infinite if one of the seeds diverged.
    """
    value = runs[loss].where(~runs["diverged"].astype(bool), np.inf)
    place = runs.groupby("workload")["lr"].rank(method="dense").astype(int) - 1
    return value.groupby([runs["workload"], runs["arm"], place.rename("rate")]).mean().unstack("rate")


def widths(runs: pd.DataFrame, loss: str = "final", near: float = NEAR) -> pd.DataFrame:
    """Returns the factor by which learning rates may differ and end near the best loss: rows arms, columns workloads.

    The best loss is over all arms and rates. 1 means a single rate, 0 none; of several ranges the widest counts.
    """
    losses = per_rate(runs, loss)
    found = {}
    for workload, arms in losses.groupby("workload"):
        rates = np.sort(runs.loc[runs["workload"] == workload, "lr"].unique())
        good = arms <= near * float(np.nanmin(arms.to_numpy()))
        found[workload] = {arm: widest(rates, row.to_numpy()[: len(rates)]) for (_, arm), row in good.iterrows()}
    return pd.DataFrame(found)


def widest(rates: Sequence[float], good: Sequence[bool]) -> float:
    """Returns the largest factor between two rates such that all rates in between are good."""
    best, start = 0.0, None
    for rate, is_good in zip(rates, good, strict=True):
        start = (rate if start is None else start) if is_good else None
        if start is not None:
            best = max(best, rate / start)
    return best


def doses(runs: pd.DataFrame, prefix: str, unit: str) -> pd.DataFrame:
    """Returns the mean regret, one row per dose and one column per workload, over cases that have all doses.

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
    return dosed.groupby([multiple, "workload"])["regret"].mean().unstack("workload")


def harmless(runs: pd.DataFrame, arm: str, loss: str = "final", within: float = 0.01) -> pd.DataFrame:
    """Returns what an arm changes in cases where clipping does not matter, one row per workload and rate.

    Clipping does not matter if no clipping has a regret of at most ``within``, on average over seeds. Columns:
    ``change``, the mean of loss minus loss without clipping, and ``noise``, the standard deviation over seeds of the
    loss without clipping; both in units of the descent, initial minus best loss.
    """
    case = ["workload", "lr"]
    free = runs[runs["arm"] == "none"].set_index([*case, "seed"])
    calm = free.groupby(case)["regret"].mean() <= within
    losses = runs[runs["arm"] == arm].set_index([*case, "seed"])[loss]
    room = (free["initial"] - free["reference"]).groupby(case).mean()
    table = pd.DataFrame(
        {
            "change": (losses - free[loss]).groupby(case).mean() / room,
            "noise": free[loss].groupby(case).std() / room,
        }
    )
    return table[calm.reindex(table.index, fill_value=False)].dropna()


def at_edge(runs: pd.DataFrame, oracle: Sequence[str]) -> pd.Series:
    """Returns how often each member of the oracle was its best; a best at an end of the grid may lie beyond it."""
    members = runs[runs["arm"].isin(oracle) & runs["rescued"]]
    best = members[members["regret"] == 0].groupby(CASE)["arm"].first()
    return best.value_counts().reindex(list(oracle), fill_value=0)
