"""Trains every workload at every rate under every way of clipping; skips runs that are in the results already."""

import argparse
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from arms import ARMS, CAPS, ORACLE, named
from results import Case, append, done, mend, remaining
from tqdm import tqdm
from training import data_of, train
from workloads import SET_ASIDE, WORKLOADS

FIRST_LOOK = (*ORACLE, *CAPS, "max_norm_1", "percentile_10", "autoclip")
QUICK = {"workloads": ["gpt-shakespeare"], "arms": ["none", "fixed4", "max_norm_1", "relative_0.03", "autoclip"]}


def cases(
    workloads: Sequence[str], arms: Sequence[str], seeds: Sequence[int], steps: int, rates: Sequence[int]
) -> Iterator[Case]:
    """Yields the runs, with all arms of one seed and rate close together."""
    for name in workloads:
        workload = WORKLOADS[name]
        for seed in seeds:
            for i in rates:
                for arm in arms:
                    if workload.kind in ARMS[arm].kinds:
                        yield Case(name, workload.rates[i], seed, arm, steps)


def work(case: Case) -> dict[str, Any]:
    workload = WORKLOADS[case.workload]
    found = train(workload, case.lr, case.seed, ARMS[case.arm], case.steps)
    return {**case._asdict(), "kind": workload.kind, **found}


def prepare() -> None:
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:  # a worker whose parent was killed would wait for work for ever
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def check_workloads(names: Sequence[str], *, final: bool) -> None:
    """Raises a ValueError for a workload that does not exist or is set aside."""
    for name in names:
        if name not in WORKLOADS:
            raise ValueError(f"Parameter `workloads` should be among {', '.join(WORKLOADS)}. Found `{name}`.")
        if name in SET_ASIDE and not final:
            raise ValueError(
                f"Workload `{name}` is set aside: run it once, with --final, when the defaults are frozen."
            )


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__)
    usual = [name for name in WORKLOADS if name not in SET_ASIDE and WORKLOADS[name].shape is None]
    result.add_argument("--workloads", nargs="+", default=usual, metavar="NAME", help=", ".join(WORKLOADS))
    result.add_argument("--arms", nargs="+", default=list(FIRST_LOOK), metavar="NAME", help="arms, or groups of them")
    result.add_argument("--seeds", nargs="+", type=int, default=[0])
    result.add_argument("--rates", nargs="+", type=int, default=[0, 1, 2, 3], help="0: safe; 3: 64 times as large")
    result.add_argument("--steps", type=int, default=300)
    result.add_argument("--jobs", type=int, default=2, help="processes, each with one thread")
    result.add_argument("--quick", action="store_true", help="one workload, one rate, one seed, five arms")
    result.add_argument("--final", action="store_true", help="allow the workload that is set aside")
    result.add_argument("--out", type=Path, required=True, help="CSV that results are added to")
    return result


def main() -> None:
    args = parser().parse_args()
    if args.quick:
        args.workloads, args.arms, args.seeds, args.rates = QUICK["workloads"], QUICK["arms"], [0], [2]
    try:
        check_workloads(args.workloads, final=args.final)
        arms = named(args.arms)
        for name in args.workloads:
            data_of(WORKLOADS[name])  # what is missing should be said before hours of work
        mend(args.out)
        todo = remaining(cases(args.workloads, arms, args.seeds, args.steps, args.rates), done(args.out))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    failures = 0
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"  # the workers load torch after this
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=context, initializer=prepare) as pool:
        waiting = {pool.submit(work, case): case for case in todo}
        for future in tqdm(as_completed(waiting), total=len(waiting), unit="run"):
            try:
                append(args.out, future.result())
            except Exception as error:  # one that fails should not keep the others from being run
                failures += 1
                tqdm.write(f"{waiting[future]} failed: {error!r}", file=sys.stderr)
    sys.exit(f"{failures} runs failed." if failures else 0)


if __name__ == "__main__":
    main()
