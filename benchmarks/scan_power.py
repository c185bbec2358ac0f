"""How often the fit of a scan finds the law, on simulated scans that scatter like the scans of real nets.

python benchmarks/scan_power.py --json scan_power.json    # two to six minutes; prints the tables of docs/scan_power.md
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm
from tqdm import tqdm

from smoothdiag.fits import fit_smoothness
from smoothdiag.measure.scan import SPACING
from smoothdiag.measure.scan.search import LAST, TOLERANCE

COST = 13
"""Gradients of a point, the search for it and the ends of lines included: the median of 108 earlier scans of networks.

The 63 of docs/reproduce/which_law.md take 14.
"""

NUM_BOOT = 200


@dataclass(frozen=True)
class Law:
    """What smoothness follows: "norm", "loss" or "distance" raised to an exponent, or "lines", each with its own."""

    name: str
    of: str
    exponent: float


@dataclass(frozen=True)
class Design:
    """Lines of a scan.

    Attributes:
        lines: names of the lines.
        points: numbers of points of a line, equally likely.
        step: how far log ||g|| moves from one point to the next, give or take a quarter.
        between: deviation of log smoothness from line to line, away from the start.
        within: deviation of log smoothness from point to point.
        alike: correlation of random lines of one kind.
    """

    name: str
    lines: tuple[str, ...]
    points: tuple[int, ...]
    step: float = SPACING
    between: float = 0.35
    within: float = 0.15
    alike: float = 0.8


LAWS = (
    Law("constant", "norm", 0.0),
    Law("exponent .5", "norm", 0.5),
    Law("exponent 1", "norm", 1.0),
    Law("exponent 1.5", "norm", 1.5),
    Law("loss gap", "loss", 1.0),
    Law("null: distance", "distance", 1.0),
    Law("null: distance squared", "distance", 2.0),
    Law("null: a law for each line", "lines", 1.0),
)

RIGHT = {
    "constant": "CONSTANT",
    "exponent .5": "POWER",
    "exponent 1": "L0L1",
    "exponent 1.5": "POWER",
    "loss gap": "LOSS_GAP",
}


def named(kinds: int, random: int = 0, layers: int = 0) -> tuple[str, ...]:
    """Lines of as many kinds of their own, and random lines of the two kinds."""
    own = [f"to {number}" for number in range(kinds)]
    return (*own, *(f"random {k + 1}" for k in range(random)), *(f"layers {k + 1}" for k in range(layers)))


SHORT = (1, 1, 1, 2, 3)
"""Points of a line on real nets, roughly. The default follows fourteen lines at a time, but lines are short, and where
one ends the next takes its place: in the median 34 points on 23 lines, and 1.0 decades of gradient norms
(docs/reproduce/which_law.md)."""

DESIGNS = (
    Design("default: 23 lines, 1 to 3 points", named(23), SHORT),
    Design("default, lines go on: 14 lines, 2 to 4 points", named(14), (2, 3, 4)),
    Design("4 kinds: 2 along the gradient, 11 + 10 random, 1 to 3 points", named(2, 11, 10), SHORT),
    Design("few long lines: 8, 4 to 6 points", named(8), (4, 5, 6)),
    Design("14 lines, 2 to 4 points, steps of .4", named(14), (2, 3, 4), 0.4),
    Design("22 lines, 2 to 4 points: a larger budget", named(22), (2, 3, 4)),
    Design("default, quiet (.2 and .1)", named(23), SHORT, between=0.2, within=0.1),
    Design("default, loud (.5 and .2)", named(23), SHORT, between=0.5, within=0.2),
    Design("default, very loud (.8 and .3)", named(23), SHORT, between=0.8, within=0.3),
)
FOR_NULLS = (DESIGNS[0], DESIGNS[1], DESIGNS[2], DESIGNS[3], DESIGNS[5])


def simulated(law: Law, design: Design, seed: int) -> pd.DataFrame:
    """Points of one scan, in the format of `sd.scan`.

    At the start gradient norm and smoothness are 1 and the loss is 1 above its minimum. The gradient norm falls
    along the second line, which has one point, and rises along the others. The last point of a line may be nearer, as
    where a limit ends it. Smoothness is the law times a factor of the line, which sets in while the gradient norm
    changes by a factor of e^1.2, times a factor of the point. Distance and loss follow:
    d ||g|| = kappa * smoothness * d distance and d loss = cosine * ||g|| * d distance, where kappa and cosine differ
    from line to line.
    """
    rng = np.random.default_rng(seed)
    kinds = [re.sub(r"^(random|layers) .*", r"\1", name) for name in design.lines]
    shared = {kind: rng.standard_normal(4) for kind in dict.fromkeys(kinds)}
    start = np.exp(design.within * rng.standard_normal())
    rows = [{"scan": "start", "point": 0, "distance": 0.0, "grad_norm": 1.0, "loss": 2.0, "smoothness": start}]
    for number, (name, kind) in enumerate(zip(design.lines, kinds, strict=True)):
        own = np.sqrt(design.alike) * shared[kind] + np.sqrt(1 - design.alike) * rng.standard_normal(4)
        kappa, cosine = 0.2 + 0.7 * norm.cdf(own[1:3])
        exponent = 0.3 + 1.4 * norm.cdf(own[3]) if law.of == "lines" else law.exponent
        x, y, loss, distance = 1.0, start, 2.0, 0.0
        way = -1 if number == 1 else 1
        count = rng.choice(design.points) if way > 0 else 1
        for point in range(1, count + 1):
            least = (1 - TOLERANCE) * design.step if point < count else LAST
            new = x * np.exp(way * rng.uniform(least, (1 + TOLERANCE) * design.step))
            moved = abs(new - x) / (kappa * y)
            loss = 1 + max(loss - 1 + way * cosine * (x + new) / 2 * moved, 0.05)
            distance, x = distance + moved, new
            of = {"loss": loss - 1, "distance": 1 + distance}.get(law.of, x)
            height = (0.3 + 0.7 * of**exponent) if law.exponent else 1.0
            off = design.between * own[0] * min(1, abs(np.log(x)) / 1.2) + design.within * rng.standard_normal()
            y = height * np.exp(off)
            rows.append(
                {"scan": name, "point": point, "distance": distance, "grad_norm": x, "loss": loss, "smoothness": y}
            )
    return pd.DataFrame(rows).assign(estimator="hessian_norm", data="fixed", step=0, num_grads=COST)


def power(law: Law, design: Design, seeds: int, quantile: float) -> dict[str, Any]:
    """Verdicts over the seeds, with median range, gradients and ends of the exponent's interval."""
    fits = [fit_smoothness(simulated(law, design, seed), quantile=quantile, num_boot=NUM_BOOT) for seed in range(seeds)]
    ends = np.array([fit.exponent_interval for fit in fits])
    return {
        "law": law.name,
        "design": design.name,
        "verdicts": dict(Counter(fit.verdict.name for fit in fits)),
        "flags": dict(Counter(flag.name for fit in fits for flag in fit.flags if flag.blocking)),
        "decades": float(np.median([fit.decades for fit in fits])),
        "points": float(np.median([fit.num_points for fit in fits])),
        "gradients": float(np.median([COST * fit.num_points for fit in fits])),
        "factor": float(np.exp(np.median([fit.spread for fit in fits]))),
        "exponent": [float(end) for end in np.median(ends, axis=0)],
        "covered": float(np.mean((ends[:, 0] <= law.exponent) & (law.exponent <= ends[:, 1]))),
    }


def markdown(found: Sequence[dict[str, Any]], seeds: int) -> str:
    """Two tables with a row for each design: how often each law was found, and which verdicts the nulls got."""
    laws = [name for name in dict.fromkeys(row["law"] for row in found) if not name.startswith("null")]
    nulls = [name for name in dict.fromkeys(row["law"] for row in found) if name.startswith("null")]
    lines = [f"| of {seeds} scans: right verdicts (wrong ones) | points | gradients | decades | error factor | "]
    lines[0] += " | ".join(laws) + " |"
    lines += ["|---" * (len(laws) + 5) + "|"]
    for name in dict.fromkeys(row["design"] for row in found):
        of = {row["law"]: row for row in found if row["design"] == name}
        cells = []
        for law in laws:
            named = sum(count for verdict, count in of[law]["verdicts"].items() if verdict != "NOT_IDENTIFIED")
            right = of[law]["verdicts"].get(RIGHT[law], 0)
            cells.append(f"{right} ({named - right})")
        one = of["exponent 1"]
        facts = f"{one['points']:.0f} | {one['gradients']:.0f} | {one['decades']:.1f} | {one['factor']:.2f}"
        lines += [f"| {name} | {facts} | {' | '.join(cells)} |"]
    lines += [
        f"\n| of {seeds} scans: verdicts other than NOT_IDENTIFIED | " + " | ".join(nulls) + " |",
        "|---" * (len(nulls) + 1) + "|",
    ]
    for design in FOR_NULLS:
        of = {row["law"]: row["verdicts"] for row in found if row["design"] == design.name}
        named = [{verdict: n for verdict, n in of[null].items() if verdict != "NOT_IDENTIFIED"} for null in nulls]
        cells = [", ".join(f"{n} {verdict}" for verdict, n in one.items()) or "none" for one in named]
        lines += [f"| {design.name} | {' | '.join(cells)} |"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--quantile", type=float, default=0.95)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    cells = [(law, design) for law in LAWS for design in (FOR_NULLS if law.name.startswith("null") else DESIGNS)]
    found = [power(law, design, arguments.seeds, arguments.quantile) for law, design in tqdm(cells, leave=False)]
    if arguments.json is not None:
        designs = [asdict(design) for design in DESIGNS]
        arguments.json.write_text(json.dumps({"seeds": arguments.seeds, "designs": designs, "found": found}, indent=1))
    print(markdown(found, arguments.seeds))


if __name__ == "__main__":
    main()
