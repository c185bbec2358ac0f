"""Trains the workloads of a part of the pool under every way of clipping; skips runs that are in the results."""

import argparse
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, get_args

import torch
from arms import ARMS, CAPS, ORACLE, named
from results import Case, append, done, mend, remaining
from tasks import Part
from tqdm import tqdm
from training import data_of, train
from workloads import pool, workload

USUAL = (*ORACLE, *CAPS, "max_norm_1", "autoclip")
QUICK = {
    "parts": [],
    "workloads": ["gpt-shakespeare/momentum/constant"],
    "rates": [16],
    "arms": ("none", "fixed4", "max_norm_1", "relative_0.03", "autoclip"),
}


def cases(
    workloads: Iterable[tuple[str, float]], arms: Sequence[str], seeds: Sequence[int], steps: int
) -> Iterator[Case]:
    """Yields the runs of workloads at rates [safe rates], with all arms of one seed and rate close together."""
    for name, rate in workloads:
        found = workload(name)
        for seed in seeds:
            for arm in arms:
                if found.kind in ARMS[arm].kinds:
                    yield Case(name, rate * found.safe_rate, seed, arm, steps)


def work(case: Case) -> dict[str, Any]:
    of = workload(case.workload)
    found = train(of, case.lr, case.seed, ARMS[case.arm], case.steps)
    return {**case._asdict(), "kind": of.kind, **found}


def prepare() -> None:
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:  # a worker whose parent was killed would wait for work for ever
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def run_all(todo: Sequence[Case], out: Path, jobs: int) -> int:
    """Makes the runs, adds each to the file when it ends, and returns how many failed."""
    failures = 0
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"  # the workers load torch after this
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=prepare) as pool:
        waiting = {pool.submit(work, case): case for case in todo}
        for future in tqdm(as_completed(waiting), total=len(waiting), unit="run"):
            try:
                append(out, future.result())
            except Exception as error:  # one that fails should not keep the others from being run
                failures += 1
                tqdm.write(f"{waiting[future]} failed: {error!r}", file=sys.stderr)
    return failures


def chosen(parts: Sequence[str], names: Sequence[str], rates: Sequence[float], *, final: bool) -> list:
    """Returns workloads with their rates [safe rates]: those of the parts, and those that are named, at these rates.

    Raises:
        ValueError: If a name is unknown, or if a workload belongs to a part that is run once and ``final`` is false.
    """
    found = [each for part in parts for each in pool(part)]
    found += [(name, rate) for name in names for rate in rates]
    for name, _ in found:
        if workload(name).task.part in ("final", "further") and not final:
            raise ValueError(f"Workload `{name}` is set aside: run it once, with --final, when the rule is fixed.")
    return found


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__)
    result.add_argument("--parts", nargs="*", default=["think"], choices=get_args(Part))
    result.add_argument("--workloads", nargs="*", default=[], metavar="NAME", help="task/optimizer/schedule")
    result.add_argument("--rates", nargs="+", type=float, default=[16], help="of these workloads [safe rates]")
    result.add_argument("--arms", nargs="+", default=list(USUAL), metavar="NAME", help="arms, or groups of them")
    result.add_argument("--seeds", nargs="+", type=int, default=[0])
    result.add_argument("--steps", type=int, default=300)
    result.add_argument("--jobs", type=int, default=2, help="processes, each with one thread")
    result.add_argument("--quick", action="store_true", help="one workload, one rate, one seed, five arms")
    result.add_argument("--final", action="store_true", help="allow the parts that are set aside")
    result.add_argument("--out", type=Path, required=True, help="CSV that results are added to")
    return result


def main() -> None:
    args = parser().parse_args()
    if args.quick:
        vars(args).update(QUICK)
    try:
        workloads = chosen(args.parts, args.workloads, args.rates, final=args.final)
        arms = named(args.arms)
        for name, _ in workloads:
            data_of(workload(name))  # what is missing should be said before hours of work
        mend(args.out)
        todo = remaining(cases(workloads, arms, args.seeds, args.steps), done(args.out))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    sys.exit(f"{failures} runs failed." if (failures := run_all(todo, args.out, args.jobs)) else 0)


if __name__ == "__main__":
    main()
