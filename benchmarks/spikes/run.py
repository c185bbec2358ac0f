"""Trains the planted and the clean runs, with and without the guard; skips what is in the tables.

python benchmarks/spikes/run.py record --curves CURVES           # every run and its pair, no guard; published rules
python benchmarks/spikes/run.py guard                            # the guard on half of the seeds of the GPT
python benchmarks/spikes/run.py guard --final                    # on everything: once, when the guard is fixed
python benchmarks/spikes/report.py --write docs/spikes.md
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import clean
import pandas as pd
import planted
import torch
from clean import Clean
from loops import Loop
from pairs import Spike, first_spike
from planted import Pair, Planted, Setting, final_loss
from rules import GUARDS, RULES
from store import FLAG_COLUMNS, FLAGS, RUN_COLUMNS, RUNS, append, read, said, write_curve
from texts import TEXTS
from tqdm import tqdm
from watched import Guarded

LONGER = 20
"""The guard watches a planted run until so many steps after its spike."""


def described(setting: Setting) -> dict[str, Any]:
    narrow = str(setting.narrow).removeprefix("torch.") if setting.narrow else ""
    return {"optimizer": setting.optimizer, "schedule": setting.schedule, "narrow": narrow}


def score(run: str, loop: Loop) -> None:
    for name, rule in RULES.items():
        began = time.process_time()
        steps = rule(loop.curve)
        seconds = round(time.process_time() - began, 4)
        append(FLAGS, FLAG_COLUMNS, {"run": run, "rule": name, "steps": said(steps), "seconds": seconds})


def spiking(run: Planted, pair: Pair) -> tuple[Planted, Loop, Spike | None]:
    """Returns the first attempt that spikes, or the last one."""
    for each in run.attempts:
        loop = pair.planted(each)
        spike = first_spike(loop.curve, pair.loop.curve, loop.plant.start or 0)
        if spike:
            break
    return each, loop, spike


def note(run: Planted, loop: Loop, spike: Spike | None, pair: Loop) -> None:
    """Adds a planted run to the table, with where it spikes by its pair."""
    row = {"run": run.name, "pool": "planted", "part": run.part, "model": run.model, "cause": run.cause}
    row |= {"seed": run.seed, "kind": loop.plant.kind, "attempt": run.attempt, "start": loop.plant.start}
    row |= {"steps": len(loop.rows), **described(run.setting)}
    if spike:
        row |= {"spike": spike.step, "last": spike.last, "column": spike.column, "size": f"{spike.size:.3g}"}
    losses = {"initial": loop.validated[0], "final": final_loss(loop), "pair_final": final_loss(pair)}
    append(RUNS, RUN_COLUMNS, row | {name: f"{loss:.5g}" for name, loss in losses.items()})


def record_planted(pool: list[Planted], curves: Path) -> None:
    done = set(read(RUNS, RUN_COLUMNS)["run"])
    todo = [run for run in pool if run.name not in done]
    with tqdm(total=len(todo), unit="run") as bar:
        for setting, runs in planted.cohorts(todo).items():
            pair = Pair(setting, runs)
            kinds = "/".join(map(str, described(setting).values()))
            write_curve(curves, f"pair/{setting.model}/{setting.seed}/{kinds}/{setting.inner}", pair.loop.curve)
            for run in runs:
                found, loop, spike = spiking(run, pair)
                write_curve(curves, run.name, loop.curve)
                score(run.name, loop)
                note(found, loop, spike, pair.loop)
                bar.update()


def note_clean(run: Clean, loop: Loop) -> None:
    row = {"run": run.name, "pool": run.pool, "part": run.part, "model": run.task}
    row |= {"optimizer": run.optimizer, "schedule": run.schedule, "steps": len(loop.rows)}
    initial, final = loop.curve["loss"][:20].mean(), loop.curve["loss"][-100:].mean()
    append(RUNS, RUN_COLUMNS, row | {"initial": f"{initial:.5g}", "final": f"{final:.5g}"})


def record_clean(curves: Path) -> None:
    done = set(read(RUNS, RUN_COLUMNS)["run"])
    for run in tqdm([run for run in clean.POOL if run.name not in done], unit="run"):
        loop = clean.train_clean(run)
        write_curve(curves, run.name, loop.curve)
        score(run.name, loop)
        note_clean(run, loop)


def watch_all(pool: list[Planted], keep: str, *, final: bool, no_clean: bool) -> None:
    """Trains the runs again under the guard."""
    flags, runs = read(FLAGS, FLAG_COLUMNS), read(RUNS, RUN_COLUMNS).set_index("run")
    rule = GUARDS[keep]
    done = set(flags["run"][flags["rule"] == rule])
    todo: list[tuple[str, Callable[..., Loop]]] = []
    for run in pool:
        if run.name in runs.index and (final or run.part == "think"):
            row = runs.loc[run.name]
            until = planted.STEPS if pd.isna(row["spike"]) else min(planted.STEPS, int(row["last"]) + LONGER)
            found = replace(run, attempt=int(row["attempt"]))
            todo.append((run.name, partial(planted.train_watched, found, until=until)))
    unplanted = {} if no_clean else {run.name: run for run in clean.POOL if final or run.part == "think"}
    todo += [(name, partial(clean.train_clean, run)) for name, run in unplanted.items()]
    for name, train in tqdm([each for each in todo if each[0] not in done], unit="run"):
        began = time.process_time()
        guard = Guarded(keep)
        loop = train(watch=guard.attach)
        events = guard.found()
        row = {"run": name, "rule": rule, "steps": said([step for step, _ in events])}
        row |= {"answers": " ".join(answer for _, answer in events), "seconds": round(time.process_time() - began, 2)}
        append(FLAGS, FLAG_COLUMNS, row)
        if name in unplanted and name not in runs.index:  # a guard that logs changes no bit of a run
            score(name, loop)
            note_clean(unplanted[name], loop)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("record", "guard"))
    parser.add_argument("--models", nargs="*", choices=TEXTS, default=list(TEXTS), help="of the planted runs")
    parser.add_argument("--seeds", nargs="+", type=int, default=range(planted.NUM_SEEDS), help="of the planted runs")
    parser.add_argument("--no-clean", action="store_true", help="leave out the runs without a plant")
    parser.add_argument("--curves", type=Path, help="folder for the curves of the runs")
    parser.add_argument("--final", action="store_true", help="allow the runs that are set aside")
    parser.add_argument("--keep", choices=GUARDS, default="parameters", help="what the guard keeps to answer with")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pool = planted.pool(args.models, args.seeds)
    if args.what == "guard":
        watch_all(pool, args.keep, final=args.final, no_clean=args.no_clean)
        return
    if args.curves is None:
        parser.error("record needs --curves")
    record_planted(pool, args.curves)
    if not args.no_clean:
        record_clean(args.curves)


if __name__ == "__main__":
    main()
