"""Tables of what was found in the planted and the clean runs.

    python benchmarks/spikes/report.py
    python benchmarks/spikes/report.py --write docs/spikes.md

A page holds a table between the lines ``<!-- begin: final detection by benchmarks/spikes/report.py -->`` and
``<!-- end -->``. Tables are named ``PART detection``, ``PART causes`` for the parts think and final, ``alarms`` and
``rescue``; ``alarm runs`` has the runs behind ``alarms``.
"""

import argparse
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import rescue
from plants import RIGHT
from rules import GUARDS, RULES
from store import FLAG_COLUMNS, FLAGS, RUN_COLUMNS, RUNS, markdown, read

BEFORE, AFTER = 3, 5
"""A flag from so many steps before the first step of a spike to so many after it is a detection.

So is a flag at a later step of the spike, but none before the plant. Before, because a rule may see the update that
makes the loss spike a step later.
"""

PARTS = ("think", "final")
NAMES = {
    "guard": "**SpikeGuard**",
    "six sigma": "six sigma",
    "ZClip": "ZClip",
}
ANSWERS = ("data", "edge", "optimizer", "numerics", "unknown")

BLOCK = re.compile(r"(<!-- begin: ([\w ]+) by benchmarks/spikes/report\.py -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def joined() -> pd.DataFrame:
    """Returns the flags of every rule beside their runs, with lists in place of text."""
    flags, runs = read(FLAGS, FLAG_COLUMNS), read(RUNS, RUN_COLUMNS)
    found = flags.rename(columns={"steps": "flagged"}).merge(runs, on="run", how="left")
    found["flagged"] = [[int(step) for step in str(text).split()] for text in found["flagged"].fillna("")]
    found["answers"] = [str(text).split() for text in found["answers"].fillna("")]
    return found


def detecting(row: pd.Series) -> int | None:
    """Returns the place of the first flag that detects the spike of a run, or None."""
    early, late = max(row["start"], row["spike"] - BEFORE), max(row["last"], row["spike"] + AFTER)
    return next((i for i, step in enumerate(row["flagged"]) if early <= step <= late), None)


def spiking(found: pd.DataFrame, part: str, rule: str | None = None) -> pd.DataFrame:
    """Returns the planted runs of a part that do spike, with the place of the flag that detects the spike."""
    keep = (found["pool"] == "planted") & (found["part"] == part) & found["spike"].notna()
    if rule is not None:
        keep &= found["rule"] == rule
    own = found[keep]
    return own.assign(at=[detecting(row) for _, row in own.iterrows()])


def share(part: int, whole: int) -> str:
    return f"{part} of {whole}" if whole else "–"


def present(found: pd.DataFrame) -> list[str]:
    return [rule for rule in (*GUARDS.values(), *RULES) if rule in set(found["rule"])]


def detection_table(found: pd.DataFrame, part: str) -> str:
    """Returns how many spikes each rule sees, by model and cause."""
    rules = present(found)
    runs = spiking(found, part)
    rows = []
    for (model, cause), own in [*runs.groupby(["model", "cause"], sort=False), (("all", ""), runs)]:
        cells = []
        for rule in rules:
            mine = own[own["rule"] == rule]
            cells.append(share(int(mine["at"].notna().sum()), len(mine)))
        rows.append([model, cause, *cells])
    return markdown(["model", "cause", *(NAMES[rule] for rule in rules)], rows)


def causes_table(found: pd.DataFrame, part: str) -> str:
    """Returns what the guard answered for the spikes that it saw; the right answer of each cause in bold."""
    runs = spiking(found, part, "guard")
    seen = runs[runs["at"].notna()]
    answers = [row["answers"][int(row["at"])] for _, row in seen.iterrows()]
    counts = pd.crosstab(seen["cause"], pd.Series(answers, index=seen.index, dtype=object))
    rows, right = [], 0
    for cause in RIGHT:
        if cause in counts.index:
            cells = []
            for answer in ANSWERS:
                number = int(counts.loc[cause].get(answer, 0))
                is_right = RIGHT[cause] == answer
                right += number * is_right
                cells.append(f"**{number}**" if is_right else number)
            rows.append([cause, *cells])
    rows.append([f"right: {share(right, len(seen))}", *[""] * len(ANSWERS)])
    return markdown(["planted", *ANSWERS], rows)


POOLS = {
    "unseen": "tasks that the guard was not built with",
    "clean": "tasks that it was built with",
    "apart": "heavy tails",
    "planted": "planted runs, before the plant",
}
"""What a pool of runs is, in words."""


def alarms_table(found: pd.DataFrame) -> str:
    """Returns flags in runs without a plant, and in planted runs before the plant."""
    rules = present(found)
    planted, start = found["pool"] == "planted", found["start"]
    early = [sum(step < begin for step in steps) for steps, begin in zip(found["flagged"], start, strict=True)]
    alarms, over = np.where(planted, early, found["flagged"].map(len)), np.where(planted, start, found["steps"])
    counted = found.assign(alarms=alarms, over=over)
    rows = []
    for pool, text in POOLS.items():
        pooled = counted[counted["pool"] == pool]
        by_rule = {rule: pooled[pooled["rule"] == rule] for rule in rules}
        if all(len(own) for own in by_rule.values()):
            first = by_rule[rules[0]]
            sums = [own[["alarms", "over"]].sum() for own in by_rule.values()]
            cells = [f"{number:.0f} ({1e4 * number / steps:.2f})" for number, steps in sums]
            rows.append([text, len(first), f"{int(first['over'].sum()):,}", *cells])
    return markdown(["runs", "number", "steps", *(NAMES[rule] for rule in rules)], rows)


def alarm_runs_table(found: pd.DataFrame) -> str:
    """Returns the runs without a plant in which the guard fires, with what it answers."""
    own = found[(found["rule"] == "guard") & found["pool"].isin(POOLS) & (found["pool"] != "planted")]
    own = own[own["flagged"].map(len) > 0].sort_values(["part", "run"])
    rows = []
    for _, row in own.iterrows():
        answers = Counter(row["answers"])
        rows.append([f"`{row['run']}`", row["part"], len(row["flagged"]), *(answers[answer] for answer in ANSWERS)])
    return markdown(["run", "part", "flags", *ANSWERS], rows)


def rescue_table() -> str | None:
    """Returns what each arm leaves missing of the descent, by cause; None if nothing was run."""
    found = read(rescue.RESCUES, rescue.COLUMNS)
    if set(found["arm"]) <= {rescue.NOTHING}:
        return None
    found["missed"] = [rescue.missed(*row) for row in found[["initial", "final", "pair_final"]].itertuples(index=False)]
    found["cause"] = found["run"].str.split("/").str[1]
    worth = set(found["run"][(found["arm"] == rescue.NOTHING) & (found["missed"] > rescue.WORTH)])
    found = found[found["run"].isin(worth)]
    arms = [arm for arm in (rescue.NOTHING, *rescue.ARMS) if arm in set(found["arm"])]
    groups = [*found.groupby("cause", sort=False), ("all", found)]
    rows = []
    for cause, own in groups:
        means = own.groupby("arm")["missed"].agg(["mean", "max"])
        rows.append([cause, own["run"].nunique(), *(f"{100 * means.loc[a, 'mean']:.0f}" for a in arms)])
    lost = found.assign(lost=found["missed"] > rescue.WORTH).groupby("arm")["lost"].sum()
    rows.append(["still lost", len(worth), *(int(lost[arm]) for arm in arms)])
    return markdown(["planted", "runs", *arms], rows)


def tables(found: pd.DataFrame) -> dict[str, str]:
    result = {"alarms": alarms_table(found), "alarm runs": alarm_runs_table(found)}
    for part in PARTS:
        if not spiking(found, part).empty:
            result[f"{part} detection"] = detection_table(found, part)
        if not spiking(found, part, "guard").empty:
            result[f"{part} causes"] = causes_table(found, part)
    if (rescued := rescue_table()) is not None:
        result["rescue"] = rescued
    return result


def written(page: str, found: dict[str, str]) -> str:
    """Returns the page with these tables between their markers; other tables of the page stay as they are."""
    return BLOCK.sub(lambda m: f"{m[1]}\n{found[m[2]]}\n\n{m[4]}" if m[2] in found else m[0], page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables between the markers of a page")
    args = parser.parse_args()
    found = tables(joined())
    for name, table in found.items():
        print(f"{name}\n\n{table}\n")
    if args.write is not None:
        page = args.write.read_text(encoding="utf-8")
        args.write.write_text(written(page, found), encoding="utf-8")
        names = [name for _, name, _, _ in BLOCK.findall(page)]
        print(f"Tables of {args.write}: {names}; not in the results: {[name for name in names if name not in found]}")


if __name__ == "__main__":
    main()
