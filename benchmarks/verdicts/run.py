"""Counts verdicts of `fit_smoothness` over seeds: on runs without the law, on runs with it, on the two known errors.

    python benchmarks/verdicts/run.py --quick                                            # a few seconds
    python benchmarks/verdicts/run.py --out benchmarks/verdicts/results.json             # a quarter of an hour

Results go to the file after every fit, and a run that was stopped goes on where it stopped.
"""

import argparse
import fnmatch
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from null_runs import NULLS, Rows
from probed_runs import KNOWN, PROBED
from tally import Tally
from tqdm import tqdm
from true_laws import LAWS

import smoothdiag as sd

Case = tuple[Callable[[int], Rows], dict[str, Any]]
CASES: dict[str, Case] = {
    **{name: (rows, {"kind": "null"}) for name, rows in {**NULLS, **PROBED}.items()},
    **{name: (rows, {"kind": "known"}) for name, rows in KNOWN.items()},
    **{name: (law.rows, {"kind": "law", "right": law.verdict, "least": law.least}) for name, law in LAWS.items()},
}
TITLES = {"null": "Null cases: no L0L1 is right", "known": "Known errors: no L0L1 is right", "law": "Laws"}
QUICK = ["heavy_tails", "moving_targets", "quadratic", "exponential, trained"]


def chosen(patterns: list[str]) -> list[str]:
    """Returns the cases whose names fit; raises a ValueError for a pattern that fits none."""
    for pattern in patterns:
        if not fnmatch.filter(CASES, pattern):
            raise ValueError(f"Parameter `cases` should be among {'; '.join(CASES)}. Found `{pattern}`.")
    return [name for name in CASES if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def count(tally: Tally, cases: list[str], seeds: int, quantiles: list[float], num_boot: int) -> None:
    """Fits what the tally lacks; rows are made once for all quantiles."""
    for seed in tqdm(range(seeds), unit="seed", desc="verdicts"):
        for case in tqdm(cases, unit="case", leave=False, desc=f"seed {seed}"):
            rows, facts = CASES[case]
            missing = tally.lacks(case, quantiles, seed)
            data = rows(seed) if missing else None
            for quantile in missing:
                tally.add(
                    case,
                    facts,
                    quantile,
                    seed,
                    sd.fit_smoothness(data, quantile=quantile, num_boot=num_boot, seed=seed),
                )


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    result.add_argument(
        "--cases", nargs="+", default=["*"], metavar="NAME", help="; ".join(CASES) + "; * stands for any"
    )
    result.add_argument("--seeds", type=int, default=20, help="how many, from 0")
    result.add_argument("--quantiles", nargs="+", type=float, default=[0.8, 0.95])
    result.add_argument("--num-boot", type=int, default=150)
    result.add_argument("--quick", action="store_true", help="four cases, two seeds, the quantile .8")
    result.add_argument("--out", type=Path, help="JSON file; one that exists is continued")
    return result


def main() -> None:
    args = parser().parse_args()
    if args.quick:
        args.cases, args.seeds, args.quantiles = QUICK, 2, [0.8]
    torch.set_num_threads(1)
    try:
        cases = chosen(args.cases)
        tally = Tally(args.out, num_boot=args.num_boot)
    except ValueError as error:
        sys.exit(f"error: {error}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sd.SmoothdiagWarning)
        count(tally, cases, args.seeds, args.quantiles, args.num_boot)
    for kind, title in TITLES.items():
        if list(tally.of(kind)):
            print(f"\n{title}\n\n" + "\n".join(tally.table(kind)))
    print("\n" + "\n".join([*tally.false_laws(), *tally.true_laws()]))


if __name__ == "__main__":
    main()
