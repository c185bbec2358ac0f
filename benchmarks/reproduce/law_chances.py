"""What scans would say by chance: simulated ones, with as many points and as much scatter as those of which_law.py.

python benchmarks/reproduce/law_chances.py            # 720 simulated scans, a minute or so; needs no data
python benchmarks/reproduce/law_chances.py --report   # the table of docs/reproduce/which_law.md
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from experiment import Experiment, Place, Size, main, markdown
from law_tables import CLEARLY, rises, short, span
from scipy.stats import binomtest

import smoothdiag as sd

sys.path.insert(1, str(Path(__file__).parents[1]))

from scan_power import DESIGNS, LAWS, Design, Law, simulated

TRUE = {law.name: law for law in LAWS if law.name in ("constant", "exponent .5", "exponent 1")}

STEP = 0.8
"""Length of a step in log ||g|| at which simulated scans span 1.0 decades in the median, as those of networks do."""

SCATTERS = (0.5, 0.65, 1.1)
"""Deviations from line to line; within a line it is .4 of that, as in scan_power.py.

At a constant law they make error factors near 1.48, 1.69 and 2.45: the medians of the lower, the middle and the upper
third of the scans of networks, so each stands for a third of them. They were chosen by these factors alone.
"""

SCANS = {"quick": 80, "full": 1000}
"""Simulated scans of each law and scatter."""

OF = 54
"""Scans of the six networks."""


@dataclass(frozen=True)
class Cell:
    """A law, how much the lines scatter, and the first of its seeds, which no other scatter has."""

    law: Law
    between: float
    first: int


def cases(size: Size) -> dict[str, Cell]:
    firsts = range(0, len(SCATTERS) * SCANS[size], SCANS[size])
    return {
        f"{law.name}/{between:g}": Cell(law, between, first)
        for law in TRUE.values()
        for between, first in zip(SCATTERS, firsts, strict=True)
    }


def design(between: float) -> Design:
    """The default lines of a scan, 23 with one to three points each."""
    return replace(DESIGNS[0], step=STEP, between=between, within=0.4 * between)


def run(cell: Cell, place: Place) -> dict[str, Any]:
    """Counts what the fits of the simulated scans say, by the rules of the scans of networks."""
    seeds = range(cell.first, cell.first + (2 if place.dry else SCANS[place.size]))
    fits = [sd.fit_smoothness(simulated(cell.law, design(cell.between), seed)) for seed in seeds]
    said = pd.DataFrame({"verdict": [fit.verdict.name for fit in fits], "reason": [fit.verdict_reason for fit in fits]})
    lowest = pd.Series([fit.exponent_interval[0] for fit in fits])
    return {
        "law": cell.law.name,
        "between": cell.between,
        "scans": len(fits),
        "factor": math.exp(pd.Series([fit.spread for fit in fits]).median()),
        "decades": pd.Series([fit.decades for fit in fits]).median(),
        "points": pd.Series([fit.num_points for fit in fits]).median(),
        "slope": sum(fit.L1_interval[0] > 0 for fit in fits),
        "rises": int(rises(said).sum()),
        "below": sum(fit.exponent_interval[1] < 1 for fit in fits),
        "above": int((lowest > 1).sum()),
        "clearly": int((lowest > CLEARLY).sum()),
    }


COUNTED = ("slope", "rises", "below", "above", "clearly")


def tables(rows: pd.DataFrame) -> dict[str, str]:
    """A line for each law and scatter, one for all of them, and one scaled to the scans of networks."""
    head = ["true law", "simulated scans", "points", "decades", "error factor", "L1 above zero", "‖H‖ rises for sure"]
    head += ["exponent below 1", "above 1", f"above {CLEARLY}"]
    laws = [name for name in TRUE if name in set(rows["law"])]
    found = [line for name in laws for line in lines(name, rows[rows["law"] == name])]
    return {"chances": markdown(head, found), "cost of chances": cost(rows)}


def lines(name: str, rows: pd.DataFrame) -> Iterator[list[object]]:
    for row in rows.sort_values("between").to_dict("records"):
        sizes = (short(row["points"], 0), short(row["decades"], 1), short(row["factor"]))
        yield [name, row["scans"], *sizes, *(row[column] for column in COUNTED)]
    every, sums = rows["scans"].sum(), rows[list(COUNTED)].sum()
    yield [f"{name}: all", every, "", "", "", *sums]
    yield [f"{name}: for {OF} scans", "", "", "", "", *(expected(int(count), int(every)) for count in sums)]


def expected(count: int, every: int) -> str:
    """How many of the scans of networks that would be, with a 90% interval for what the simulations leave open."""
    share = binomtest(count, every).proportion_ci(0.9, method="wilson")
    return f"{short(OF * count / every, 1)} ({span([OF * share.low, OF * share.high], 1)})"


def cost(rows: pd.DataFrame) -> str:
    return markdown(["what", "CPU minutes"], [["simulated scans", f"{rows['seconds'].sum() / 60:.1f}"]])


EXPERIMENT = Experiment(name="law_chances", cases=cases, run=run, tables=tables, page="docs/reproduce/which_law.md")


if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
