"""The power of the verdict: how often rows of a run are called L0L1, by range, noise and number of rows.

    python benchmarks/verdicts/power.py --out benchmarks/verdicts/power.json       # a quarter of an hour

The rows are independent; a run whose rows resemble their neighbours counts as its effective number of rows. The laws
are the line 1 + 2 ||g||, which should be L0L1, and 3 ||g||^rho for rho = .5 and 1.5, which should be POWER.
"""

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import norm
from tally import digest, read, write
from tqdm import tqdm
from true_laws import line, power, run_rows

import smoothdiag as sd

LAWS = {"line": line, "exponent .5": power(0.5), "exponent 1.5": power(1.5)}

LEAST_DECADES, LEAST_BEYOND, LEAST_SKILL = 1.0, 4, 0.2  # Below these docs/verdicts.md promises no L0L1.


class Cell(NamedTuple):
    law: str
    decades: float
    noise: float
    rows: int


def measure(cell: Cell, seeds: int, quantile: float, num_boot: int) -> dict[str, Any]:
    """Returns counts of verdicts in a cell, the spread of the exponent, and the skill of the line."""
    verdicts, flags = Counter[str](), Counter[str]()
    exponents, skills = [], []
    for seed in range(seeds):
        rng = np.random.default_rng([seed, cell.rows, round(100 * cell.decades), round(100 * cell.noise)])
        rows = run_rows(rng, cell.decades, cell.noise, cell.rows, LAWS[cell.law], memory=0)
        fit = sd.fit_smoothness(rows, quantile=quantile, num_boot=num_boot, seed=seed)
        scores = {score.name: score for score in fit.comparison}
        verdicts[fit.verdict.name] += 1
        flags.update(flag.name for flag in fit.flags)
        if "power" in scores:
            exponents.append(scores["power"].exponent)
            skills.append(scores["affine"].skill)
    return {
        **cell._asdict(),
        "verdicts": dict(verdicts),
        "flags": dict(flags),
        "exponent": [float(value) for value in (np.mean(exponents), np.std(exponents, ddof=1))] if skills else None,
        "skill": [float(value) for value in (np.mean(skills), np.std(skills, ddof=1))] if skills else None,
    }


def expected(cell: Cell, quantile: float) -> dict[str, float]:
    """Returns a formula's skill of the line, share of L0L1, and deviation of the exponent over runs.

    The ratio of signal to noise is slope * deviation of log ||g|| / noise, with the log-log slope of the law. The
    powers and factors of the formula are read off the cells at the quantile .95; `report` prints its errors.
    """
    logs = cell.decades * np.log(10) / (2 * norm.ppf(0.975)) * norm.ppf((np.arange(999) + 1) / 1000)
    slope = np.polyfit(logs, np.log(LAWS[cell.law](np.exp(logs))), 1)[0]
    ratio = slope * logs.std() / cell.noise
    skill = 1 - (1 + ratio**2) ** -0.75
    beyond = cell.rows * (1 - quantile)
    counted = (
        min(0.5 + (beyond - LEAST_BEYOND) / 8, 1.0) if beyond >= LEAST_BEYOND else 0.0
    )  # The fit counts them, too.
    answers = counted * (cell.decades >= LEAST_DECADES)
    return {
        "skill": float(skill),
        "share": float(answers * norm.cdf(np.sqrt(cell.rows) * (skill - LEAST_SKILL) / 1.4)),
        "exponent": float(5.5 * cell.noise / (logs.std() * np.sqrt(cell.rows))),
    }


def report(cells: dict[Cell, dict[str, Any]], quantile: float) -> Iterator[str]:
    """Yields how far the formula is from the cells of the line."""
    lines = {cell: found for cell, found in cells.items() if cell.law == "line"}
    pairs = [(found, expected(cell, quantile)) for cell, found in lines.items()]
    share = np.array([found["verdicts"].get("L0L1", 0) / sum(found["verdicts"].values()) for found, _ in pairs])
    if len(share):
        error = np.abs(share - [formula["share"] for _, formula in pairs])
        yield f"\nFormula: share of L0L1 off by {error.mean():.2f} on average, {error.max():.2f} at most"
    scored = [(found, formula) for found, formula in pairs if found["skill"] is not None]
    if scored:
        error = np.abs([found["skill"][0] - formula["skill"] for found, formula in scored])
        yield f"Formula: skill off by {error.mean():.2f} on average, {error.max():.2f} at most"
        factor = np.quantile([found["exponent"][1] / formula["exponent"] for found, formula in scored], [0.1, 0.5, 0.9])
        yield "Deviation of the exponent over the formula's: {:.2f}, {:.2f}, {:.2f} (10%, 50%, 90%)".format(*factor)


def shares(found: dict[str, Any], *names: str) -> str:
    total = sum(found["verdicts"].values())
    return "/".join(f"{found['verdicts'].get(name, 0) / total:.2f}".lstrip("0") for name in names)


def tables(cells: dict[Cell, dict[str, Any]]) -> Iterator[str]:
    """Yields a Markdown table for each law: L0L1 for the line, L0L1/POWER for the others."""
    for law in dict.fromkeys(cell.law for cell in cells):
        names = ("L0L1",) if law == "line" else ("L0L1", "POWER")
        numbers = sorted({cell.rows for cell in cells if cell.law == law})
        yield f"\n{law}: share of {'/'.join(names)}\n"
        yield "| decades | noise | " + " | ".join(f"{number} rows" for number in numbers) + " |"
        yield "|---|---|" + "---|" * len(numbers)
        for decades, noise in sorted({(cell.decades, cell.noise) for cell in cells if cell.law == law}):
            found = (cells.get(Cell(law, decades, noise, number)) for number in numbers)
            row = " | ".join("" if one is None else shares(one, *names) for one in found)
            yield f"| {decades:g} | {noise:g} | {row} |"


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    result.add_argument("--laws", nargs="+", default=list(LAWS), choices=list(LAWS))
    result.add_argument("--decades", nargs="+", type=float, default=[0.5, 1.05, 1.2, 1.5, 2.0])
    result.add_argument("--noise", nargs="+", type=float, default=[0.2, 0.35, 0.56, 0.9])
    result.add_argument("--rows", nargs="+", type=int, default=[50, 100, 200, 400, 1000])
    result.add_argument("--seeds", type=int, default=10)
    result.add_argument("--quantile", type=float, default=0.95)
    result.add_argument("--num-boot", type=int, default=100)
    result.add_argument("--quick", action="store_true", help="the line alone, four cells of three seeds")
    result.add_argument("--out", type=Path, help="JSON file; one that exists is continued")
    return result


def main() -> None:
    args = parser().parse_args()
    if args.quick:
        args.laws, args.decades, args.noise, args.rows, args.seeds = ["line"], [1.2, 1.5], [0.35], [100, 200], 3
    settings = {name: getattr(args, name) for name in ("seeds", "quantile", "num_boot")} | {"source": digest()}
    try:
        kept = read(args.out, settings)
    except ValueError as error:
        sys.exit(f"error: {error}")
    names = Cell._fields
    cells = {} if kept is None else {Cell(*(one[name] for name in names)): one for one in kept["cells"]}
    wanted = itertools.starmap(Cell, itertools.product(args.laws, args.decades, args.noise, args.rows))
    for cell in tqdm([cell for cell in wanted if cell not in cells], unit="cell"):
        cells[cell] = measure(cell, args.seeds, args.quantile, args.num_boot)
        if args.out is not None:
            write(args.out, {"settings": settings, "cells": list(cells.values())})
    print("\n".join([*tables(cells), *report(cells, args.quantile)]))


if __name__ == "__main__":
    main()
