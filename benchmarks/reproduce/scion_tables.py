"""Tables of the runs of scion.py."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from experiment import markdown
from learning import mean, reached, smoothed

Best = Callable[[pd.DataFrame, str, str, str], "pd.Series[Any] | None"]
Seeds = Mapping[Any, Sequence[int]]
Rates = Callable[[str, str], Sequence[float]]

CLIPPED, PLAIN, ADAMW = "ClippedScion", "Scion", "AdamW, clipped at 1"
SHORT, FRANK_WOLFE = "ClippedScion, short step", "Scion, weight decay"
HIGHER, HIGHEST = "ClippedScion, threshold x 4", "ClippedScion, threshold x 16"
CLIPS = {CLIPPED: 1.0, HIGHER: 4.0, HIGHEST: 16.0}
"""Methods that shorten steps, and their thresholds in those that the first gradient sets."""

EQUAL, PUBLISHED_RATE = "equal length", "published rate"
"""Reasons for runs that are no entries of the comparison."""

TITLES = {"gpt": "GPT, Tiny Shakespeare", "cnn": "ResNet-8, CIFAR-10"}
SCHEDULES = ("fixed", "decayed")


def tables(
    rows: pd.DataFrame, *, best: Best, judged_by: Seeds, rates: Rates, published: Mapping[Any, float]
) -> dict[str, str]:
    runs = rows[rows["task"] != "norms"]
    found = {"cost": cost(rows), "thresholds": thresholds(runs, published)}
    for task in TITLES:
        found |= {
            f"{task} final": final(runs, task, best, judged_by),
            f"{task} speed": speed(runs, task, best, judged_by),
            f"{task} rates": grid(runs, task, rates),
            f"{task} length": lengths(runs, task, best, judged_by),
            f"{task} published": at_published(runs, task, judged_by),
        }
    measured = rows[rows["task"] == "norms"]
    found["norms"] = norms(measured, "local_steepest_own")
    found["euclidean"] = norms(measured, "local")
    found["scan"] = scans(measured)
    return found


def judged(
    rows: pd.DataFrame, task: str, method: str, schedule: str, best: Best, judged_by: Seeds, why: str = ""
) -> pd.DataFrame:
    """Returns the runs of a method at its best rate, or runs for another reason, on the judging seeds."""
    own = rows[(rows["task"] == task) & (rows["method"] == method) & (rows["schedule"] == schedule)]
    chosen = best(rows, task, method, schedule)
    kept = own[own["seed"].isin(list(judged_by[task])) & (own["why"] == why)]
    if not why:
        kept = kept[kept["rate"] == (None if chosen is None else chosen["rate"])]
    return kept.sort_values("seed").set_index("seed")


def each(series: Iterable[float], digits: int = 3) -> str:
    return ", ".join("diverged" if math.isnan(x) else f"{x:.{digits}f}" for x in series)


def combinations(rows: pd.DataFrame, task: str) -> list[tuple[str, str]]:
    own = rows[(rows["task"] == task) & (rows["why"] == "")]
    return list(dict.fromkeys(zip(own["method"], own["schedule"], strict=True)))


def final(rows: pd.DataFrame, task: str, best: Best, judged_by: Seeds) -> str:
    lines = []
    for method, schedule in sorted(combinations(rows, task), key=lambda pair: SCHEDULES.index(pair[1])):
        own = judged(rows, task, method, schedule, best, judged_by)
        if own.empty:
            continue
        share = mean([mean(curves["seen"]) for curves in own["curves"]])
        lines.append(
            [
                schedule,
                method,
                f"{own['rate'].iloc[0]:g}",
                each(own["final"]),
                f"**{own['final'].mean():.3f}**",
                f"{own['final'].max() - own['final'].min():.3f}",
                f"{100 * own['right'].mean():.1f}%",
                "" if math.isnan(share) else f"{100 * share:.0f}%",
            ]
        )
    head = [
        "rate",
        "method",
        "its best rate",
        "final validation loss, by seed",
        "mean",
        "range",
        "right answers",
        "mean step / longest",
    ]
    return markdown(head, lines)


def share_to(curves: Mapping[str, Any], goal: float) -> float:
    """Returns the share of the steps after which the smoothed validation loss is at the goal; NaN if never."""
    steps: list[float] = curves["step"]
    return reached({"step": steps, "valid": smoothed(curves["valid"])}, goal) / steps[-1]


def percent(share: float) -> str:
    return "not reached" if math.isnan(share) else f"{100 * share:.0f}%"


def speed(rows: pd.DataFrame, task: str, best: Best, judged_by: Seeds) -> str:
    """Shares of the steps to Scion's final loss: of clipped runs, Scion itself, Scion on other seeds, and AdamW."""
    lines = []
    for schedule in SCHEDULES:
        runs = {m: judged(rows, task, m, schedule, best, judged_by) for m in (PLAIN, *CLIPS, ADAMW)}
        curves = {m: dict(zip(own.index, own["curves"], strict=True)) for m, own in runs.items()}
        finals = {m: dict(zip(own.index, own["final"], strict=True)) for m, own in runs.items()}
        for seed, goal in finals[PLAIN].items():
            others = [share_to(curve, goal) for s, curve in curves[PLAIN].items() if s != seed]
            own = [percent(share_to(curves[m][seed], goal)) if seed in curves[m] else "" for m in (*CLIPS, PLAIN)]
            lines.append(
                [
                    schedule,
                    int(seed),
                    *own,
                    ", ".join(percent(share) for share in others),
                    percent(share_to(curves[PLAIN][seed], finals[CLIPPED][seed])),
                    percent(share_to(curves[ADAMW][seed], goal)),
                ]
            )
    head = ["rate", "seed", *CLIPS, "Scion itself", "Scion, other seeds", "Scion to ClippedScion's", "AdamW"]
    return markdown(head, lines)


def grid(rows: pd.DataFrame, task: str, rates: Rates) -> str:
    """Final losses at every rate on the choosing seed, and the clipped runs' shares of the steps at equal rates."""
    own = rows[(rows["task"] == task) & (rows["seed"] == rows["seed"].min()) & (rows["why"] == "")]
    at = {
        pair: own[(own["method"] == pair[0]) & (own["schedule"] == pair[1])].set_index("rate")
        for pair in combinations(rows, task)
    }
    lines = []
    for method, schedule in sorted(at, key=lambda pair: SCHEDULES.index(pair[1])):
        runs = at[method, schedule]
        least = runs["final"].min()
        texts = []
        for rate in rates(task, method):
            if rate in runs.index:
                run = runs.loc[rate]
                share = f" ({100 * mean(run['curves']['seen']):.0f}%)" if method in CLIPS else ""
                text = f"{rate:g}: {each([run['final']])}{share}"
                texts.append(f"**{text}**" if run["final"] == least else text)
        lines.append([schedule, method, *texts])
    for method, schedule in at:
        if method in (*CLIPS, PLAIN):
            goals, found = at[PLAIN, schedule]["final"], at[method, schedule]["curves"]
            shares = [percent(share_to(found[r], goals[r])) for r in rates(task, PLAIN) if r in found and r in goals]
            lines.append([schedule, f"steps of {method} to Scion's loss at this rate", *shares])
    return markdown(["rate", "method", *map(str, range(1, len(rates(task, PLAIN)) + 1))], lines)


def at_published(rows: pd.DataFrame, task: str, judged_by: Seeds) -> str:
    """Both methods at the published fixed rate on the judging seeds, and how soon Scion is at its own final loss."""
    own = rows[(rows["task"] == task) & (rows["why"] == PUBLISHED_RATE) & rows["seed"].isin(list(judged_by[task]))]
    clipped, plain = (own[own["method"] == m].sort_values("seed").set_index("seed") for m in (CLIPPED, PLAIN))
    lines = [
        [m, each(part["final"]), f"{part['final'].mean():.3f}"] for m, part in ((CLIPPED, clipped), (PLAIN, plain))
    ]
    gaps = clipped["final"] - plain["final"]
    goals = dict(plain["final"])
    shares = [
        ", ".join(percent(share_to(curves[seed], goal)) for seed, goal in goals.items())
        for curves in (dict(clipped["curves"]), dict(plain["curves"]))
    ]
    others = [
        ", ".join(percent(share_to(curves, goal)) for other, curves in plain["curves"].items() if other != seed)
        for seed, goal in goals.items()
    ]
    lines += [
        ["difference", each(gaps), f"{gaps.mean():+.3f}"],
        ["steps of ClippedScion to Scion's loss", shares[0], ""],
        ["steps of Scion itself to it", shares[1], ""],
        ["steps of Scion on the other seeds to it", ", ".join(f"({found})" for found in others), ""],
        ["threshold of ClippedScion", each(clipped["threshold"], 0), ""],
    ]
    return markdown(["method, published fixed rate", "by seed", "mean"], lines)


def thresholds(rows: pd.DataFrame, published: Mapping[Any, float]) -> str:
    """Thresholds that were used, beside the published ones."""
    lines = []
    for task, value in published.items():
        for method in CLIPS:
            used = rows[(rows["task"] == task) & (rows["method"] == method)].groupby("seed")["threshold"].first()
            lines.append([TITLES[task], method, f"{value:g}", each(used, 0), f"{used.min():.0f} to {used.max():.0f}"])
    return markdown(["task", "method", "published threshold", "here, by seed from 0", "range"], lines)


def lengths(rows: pd.DataFrame, task: str, best: Best, judged_by: Seeds) -> str:
    """Clipped runs at their best fixed rate against Scion whose steps are as long as the mean of those."""
    clipped = judged(rows, task, HIGHER, "fixed", best, judged_by)
    equal = judged(rows, task, PLAIN, "fixed", best, judged_by, EQUAL)
    plain = judged(rows, task, PLAIN, "fixed", best, judged_by)
    lines = []
    for name, own in ((HIGHER, clipped), ("Scion, steps of the same mean length", equal), ("Scion, best rate", plain)):
        longest = own["rate"].iloc[0] if len(own) else math.nan
        lines.append([name, f"{longest:.3g}", each(own["final"]), f"{own['final'].mean():.3f}"])
    gaps = (clipped["final"] - equal["final"]).dropna()
    lines.append(["difference of the first two", "", each(gaps), f"{gaps.mean():+.3f}"])
    return markdown(["method, fixed rate", "longest step", "final validation loss, by seed", "mean"], lines)


def number(x: float) -> str:
    return "" if x is None or math.isnan(x) else f"{x:.2f}"


def norms(measured: pd.DataFrame, estimator: str) -> str:
    lines = []
    for _, run in measured.iterrows():
        for fit in run["fits"]:
            if fit["estimator"] != estimator:
                continue
            if fit["verdict"] == "no fit":
                lines.append([run["data"], fit["group"], "", "", "", "", "", "no fit", "", ""])
                continue
            lines.append(
                [
                    run["data"],
                    fit["group"],
                    number(fit["decades"]),
                    number(fit["slope"]),
                    number(fit["rank"]),
                    number(fit["partial"]),
                    number(fit["chance"]),
                    f"`{fit['verdict']}`",
                    f"`{fit['shuffled_verdict']}`",
                    ", ".join(fit["flags"]),
                ]
            )
    head = [
        "data",
        "layer",
        "decades",
        "log-log slope",
        "rank",
        "rank, time out",
        "rank by chance",
        "verdict",
        "shuffled",
        "flags",
    ]
    return markdown(head, lines)


def scans(measured: pd.DataFrame) -> str:
    lines = [
        [scan["points"], number(scan["decades"]), number(scan["slope"]), number(scan["rank"]), f"`{scan['verdict']}`",
         ", ".join(scan["flags"])]
        for scan in measured["scan"].dropna()
    ]  # fmt: skip
    return markdown(["points", "decades", "log-log slope", "rank correlation", "verdict", "flags"], lines)


def cost(rows: pd.DataFrame) -> str:
    names = {**TITLES, "norms": "smoothness of the GPT"}
    lines = [
        [names[str(task)], len(own), int(own["steps"].max()), f"{own['seconds'].sum() / 60:.1f}"]
        for task, own in rows.groupby("task")
    ]
    lines.append(["all", len(rows), "", f"{rows['seconds'].sum() / 60:.1f}"])
    return markdown(["task", "runs", "steps of a run", "CPU minutes"], lines)
