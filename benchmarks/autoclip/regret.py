"""From runs to regrets, and from regrets to what is said of a way of clipping. Numbers only."""

from collections.abc import Collection, Sequence

import numpy as np
import pandas as pd

CASE = ["workload", "lr", "seed", "steps"]
"""What runs have in common that are compared with each other."""

NEAR = 1.05
"""Rates whose loss is within this factor of the best loss of the workload count as good ones."""


def with_regret(runs: pd.DataFrame, oracle: Collection[str], loss: str = "final") -> pd.DataFrame:
    """Returns the runs with the columns ``reference``, ``regret`` and ``rescued``.

    The reference is the lowest loss of any run of the oracle in the same case: fixed thresholds and none. Regret is
    (loss - reference) / (initial - reference), 1 at most and for runs that diverged; NaN where the whole oracle
    diverged, or was not run. ``rescued`` says whether some of the oracle survived.

    Args:
        runs: One row a run.
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
    """Returns the mean over all seeds of a case as one run, with regret to the threshold that is best for all of them.

    The best threshold of every single seed owes some of its lead to chance; this one owes less. An arm that was not
    run from every seed is left out of the case, and one that diverged from any has diverged.
    """
    same = ["workload", "lr", "steps"]
    arms = runs.groupby([*same, "arm"], sort=False)
    numbers = ["initial", loss, "clip_share", "probe_gradients", "train_gradients"]
    mean = arms[numbers].mean().assign(diverged=arms["diverged"].any(), seeds=arms["seed"].nunique()).reset_index()
    complete = mean["seeds"] == mean.groupby(same)["seeds"].transform("max")
    return with_regret(mean[complete].assign(seed="all"), oracle, loss)


def common(runs: pd.DataFrame, arms: Collection[str]) -> pd.DataFrame:
    """Returns the runs of cases in which every one of the arms was run: others would compare unlike with unlike."""
    had = runs[runs["arm"].isin(arms)].groupby([runs[name] for name in CASE])["arm"].nunique()
    complete = had[had == len(set(arms))].index
    return runs[pd.MultiIndex.from_frame(runs[CASE]).isin(complete)]


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns one row an arm, of runs with regret: median, mean and worst regret, divergence and cost of probing."""
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
    """Returns the mean loss over seeds, rows (workload, arm), one column a place in the list of rates.

    It is infinite where one of the seeds diverged.
    """
    value = runs[loss].where(~runs["diverged"].astype(bool), np.inf)
    place = runs.groupby("workload")["lr"].rank(method="dense").astype(int) - 1
    return value.groupby([runs["workload"], runs["arm"], place.rename("rate")]).mean().unstack("rate")


def widths(runs: pd.DataFrame, loss: str = "final", near: float = NEAR) -> pd.DataFrame:
    """Returns by which factor learning rates may differ and end near the best loss, rows arms, columns workloads.

    The best loss is that of any arm and rate. 1 is a single rate, 0 none; of several ranges the widest counts.
    """
    losses = per_rate(runs, loss)
    found = {}
    for workload, arms in losses.groupby("workload"):
        rates = np.sort(runs.loc[runs["workload"] == workload, "lr"].unique())
        good = arms <= near * float(np.nanmin(arms.to_numpy()))
        found[workload] = {arm: widest(rates, row.to_numpy()[: len(rates)]) for (_, arm), row in good.iterrows()}
    return pd.DataFrame(found)


def widest(rates: Sequence[float], good: Sequence[bool]) -> float:
    """Returns the largest factor between two rates with none but good ones from one to the other."""
    best, start = 0.0, None
    for rate, is_good in zip(rates, good, strict=True):
        start = (rate if start is None else start) if is_good else None
        if start is not None:
            best = max(best, rate / start)
    return best


def doses(runs: pd.DataFrame, prefix: str, unit: str) -> pd.DataFrame:
    """Returns the mean regret, one row a dose, one column a workload, of cases that have all the doses there are.

    Empty where there is no arm but the one of dose 1.

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
    """Returns what an arm changes where clipping does not matter, one row a workload and rate.

    It does not matter where no clipping at all, on average over seeds, has a regret of at most ``within``. Columns:
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
