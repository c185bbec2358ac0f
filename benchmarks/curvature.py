"""Products and time until the largest-magnitude eigenvalue of the Hessian is known to a relative 1e-3.

Each model is trained by 150 steps of SGD on synthetic data that can be learned, so that its spectrum is not that of the
initialisation, and then measured in eval mode, because PyHessian switches to it and curvlinops refuses batch
statistics. The truth is SciPy's eigsh on a float64 copy that is differentiated twice.

- ``cold``: smoothdiag from nothing: objective, graph, gradient, Lanczos from gradient and noise, its own stop.
- ``warm``: one step of SGD later on the same batch, starting from the earlier result; ``next batch``: on another batch.
- ``own stop``: another library as its users call it, with a tolerance of 1e-3. ``ideal``: the same library, told
  beforehand after how many products its value is first within 1e-3 of the truth. Fused attention and recurrence, which
  cannot be differentiated twice, are switched off for other libraries from outside.

The variants take turns in one process, each on a copy of the model that is made before its clock starts. On a GPU the
script measures wall time after synchronising. On a CPU, which other programs may be using, it measures the time of the
process; set OMP_NUM_THREADS=1 so that SciPy has one thread too.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import pandas as pd
import torch
from curvature_cases import Case, Cases, eigenvalue, forget, prepared, products_needed, timed
from curvature_peers import PEERS, TOLERANCE, Peer, Recorder, twice_differentiable
from models import LARGE, LEARNABLE, TINY, Task
from overhead.clock import clock_of, seconds
from overhead.counting import peak
from tqdm import tqdm

from smoothdiag.measure.curvature import Choice, Spectrum, choose, hvp


@dataclass(frozen=True)
class Variant:
    """One way to find the eigenvalue of a case; ``run`` returns the value and the number of products."""

    name: str
    stop: str
    case: Case
    truth: float
    run: Callable[[Case], tuple[float, int]]

    def measured(self, device: torch.device) -> dict[str, float]:
        """Returns seconds, products and relative error of one run."""
        case, found = self.case.copied(), list[tuple[float, int]]()
        spent = seconds(lambda: found.append(self.run(case)), device, clock_of(device))
        forget(case)
        value, products = found[0]
        return {"products": products, "seconds": spent, "error": abs(abs(value / self.truth) - 1)}

    def memory(self, device: torch.device) -> float:
        case = self.case.copied()
        used = peak(lambda: self.run(case), device)
        forget(case)
        return used


def ours(
    case: Case, seed: int, choice: Choice, before: Spectrum | None = None, limit: int | None = None
) -> tuple[float, int]:
    found = eigenvalue(case, seed, choice, before, limit)
    return found.norm, found.num_products


def theirs(case: Case, peer: Peer, seed: int, limit: int | None) -> tuple[float, int]:
    record = Recorder()
    with twice_differentiable(case.model, peer.fused):
        value = peer.solve(case.model, case.batch, seed, limit, record)
    return value, record.num_products


def variants(cases: Cases, seed: int, choice: Choice, stops: Sequence[str], notes: set[str]) -> list[Variant]:
    """Returns all variants; packages that are missing or fail are named in ``notes``."""
    truth = cases.here.truth(seed)
    before = eigenvalue(cases.here, seed, choice)
    searches = {"cold": (cases.here, None), "warm": (cases.later, before), "warm, next batch": (cases.other, before)}
    found = []
    for stop, (case, known) in searches.items():
        right = truth if case is cases.here else case.truth(seed)
        run = partial(ours, seed=seed, choice=choice, before=known)
        limited = partial(run, limit=products_needed(case, seed, choice, known, right))
        found += [
            Variant("smoothdiag", stop, case, right, run),
            Variant("smoothdiag", f"{stop}, ideal", case, right, limited),
        ]
    for name, peer in PEERS.items():
        if peer.missing:
            notes.add(f"{name}: not installed")
            continue
        case = cases.here.copied()
        try:
            with twice_differentiable(case.model, peer.fused):
                fewest = peer.fewest(case.model, case.batch, seed, truth)
        except Exception as problem:
            notes.add(f"{name}: fails, {str(problem).strip().splitlines()[0]}")
            continue
        finally:
            forget(case)
        if fewest is None:
            notes.add(f"{name}: never within {TOLERANCE:g} (seed {seed})")
        for stop, limit in (("own stop", None), ("ideal", fewest)):
            if stop in stops and (stop == "own stop" or limit):
                found.append(Variant(name, stop, cases.here, truth, partial(theirs, peer=peer, seed=seed, limit=limit)))
    return found


def measured(
    name: str, task: Task, args: argparse.Namespace, notes: set[str], bar: tqdm
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Returns one row per run, and the memory of each variant with the first seed."""
    rows, memory = list[dict](), list[dict]()
    for seed in range(args.seeds):
        cases = prepared(task, seed, args.device)
        objective, found = cases.here.copied().objective(), list[Choice]()
        check = partial(choose, objective, objective.point(), autocast=False)
        checking = seconds(lambda: found.append(check()), args.device, clock_of(args.device))  # noqa: B023
        notes.add(f"smoothdiag takes {found[0].backend}: {found[0].reason} (seed {seed})")
        ways = variants(cases, seed, found[0], args.stops, notes)
        for repetition in range(args.repetitions):
            gradient = timed(cases.here.gradient, args.device)
            turn = repetition % len(ways)
            for way in ways[turn:] + ways[:turn]:
                bar.set_description(f"{name}, seed {seed}, {way.name}, {way.stop}")
                key = {"variant": way.name, "stop": way.stop, "seed": seed, "repetition": repetition}
                rows.append(key | {"gradient": gradient, "checking": checking} | way.measured(args.device))
                bar.update()
                if args.rows:
                    pd.DataFrame(rows).assign(model=name).to_csv(args.rows.format(name), index=False)
        if seed == 0:
            unit = peak(cases.here.gradient, args.device)
            # Under its own stop power iteration may take a hundred products, whose memory is that of a few.
            brief = [w for w in ways if w.stop != "own stop"]
            memory = [{"variant": w.name, "stop": w.stop, "memory": w.memory(args.device) / unit} for w in brief]
    return pd.DataFrame(rows), pd.DataFrame(memory)


def summary(runs: pd.DataFrame, memory: pd.DataFrame) -> pd.DataFrame:
    """Returns medians over seeds and repetitions; each ratio compares runs of the same round."""
    rounds = runs[runs["stop"] == "cold"].set_index(["seed", "repetition"])["seconds"]
    same = pd.MultiIndex.from_frame(runs[["seed", "repetition"]])
    runs = runs.assign(
        ratio=runs["seconds"].to_numpy() / rounds.loc[same].to_numpy(), gradients=runs["seconds"] / runs["gradient"]
    )
    groups = runs.groupby(["variant", "stop"], sort=False)
    table = groups[["products", "seconds", "gradients", "ratio", "error"]].median()
    table["worst"] = groups["error"].max()
    table["within"] = groups["error"].apply(lambda e: f"{(e <= TOLERANCE).sum()}/{len(e)}")
    table["memory"] = memory.set_index(["variant", "stop"])["memory"]
    return table.rename_axis(index=[None, None])


def headline(table: pd.DataFrame) -> pd.Series:
    """Returns for each other library the ratio with its own stop, or with the ideal stop if its own is not accurate."""
    usable = table[table["error"] <= TOLERANCE].drop("smoothdiag", level=0)
    return usable.groupby(level=0, sort=False)["ratio"].first()


def large(task: Task, args: argparse.Namespace) -> pd.DataFrame:
    """Returns the cost of each way of multiplying on a model that only a large device holds."""
    cases = prepared(task, 0, args.device, steps=10)
    gradient = timed(cases.here.gradient, args.device)
    unit, rows = peak(cases.here.gradient, args.device), {}
    for backend in ("retained", "central", "one_sided"):
        for autocast in (False, True):
            run = partial(eigenvalue, seed=0, choice=backend, autocast=autocast)
            try:
                with hvp(cases.here.objective(), backend=backend, autocast=autocast) as hessian:
                    product = timed(partial(hessian, hessian.gradient), args.device)
                del hessian
                cold = run(cases.here)
                warm = run(cases.later, before=cold)
                used = peak(partial(run, cases.here), args.device) / unit
            except torch.OutOfMemoryError:
                rows[backend, autocast] = {"eigenvalue": float("nan")}
                continue
            rows[backend, autocast] = {
                "eigenvalue": cold.pairs[0].value,
                "product [gradients]": product / gradient,
                "products, cold": cold.num_products,
                "products, warm": warm.num_products,
                "converged": cold.converged and warm.converged,
                "memory [gradients]": used,
            }
    return pd.DataFrame(rows).T.rename_axis(["backend", "autocast kept"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=1, help="more threads than idle cores blur every ratio")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=LEARNABLE, default=list(LEARNABLE))
    parser.add_argument("--stops", nargs="*", choices=("own stop", "ideal"), default=("own stop", "ideal"))
    parser.add_argument("--rows", help="where every run goes as a CSV file; {} stands for the model")
    parser.add_argument("--quick", action="store_true", help="one seed, one repetition")
    parser.add_argument("--large", action="store_true", help="ResNet-50 and a GPT of 124M, by smoothdiag alone")
    parser.add_argument("--tiny", action="store_true", help="with --large: dwarfs of both, to try the script out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.device}, {args.threads} threads")
    if args.large:
        for name, task in tqdm((TINY if args.tiny else LARGE).items(), file=sys.stderr):
            print(f"\n{name}\n{large(task, args).to_string(float_format='{:.4g}'.format)}", flush=True)
        return
    if args.quick:
        args.seeds = args.repetitions = 1
    print(", ".join(sorted({f"{peer.package} {peer.version}" for peer in PEERS.values() if not peer.missing})))
    ratios = {}
    with tqdm(file=sys.stderr) as bar:
        for name in args.models:
            notes = set[str]()
            runs, memory = measured(name, LEARNABLE[name], args, notes, bar)
            table = summary(runs, memory)
            ratios[name] = headline(table)
            print(f"\n{name}: gradient {runs['gradient'].median():.3g} s, ", end="")
            print(f"self-check {(runs['checking'] / runs['gradient']).median():.3g} gradients, once a run")
            print(table.to_string(float_format="{:.3g}".format), *sorted(notes), sep="\n", flush=True)
    print(f"\nTime over that of smoothdiag cold, to an error of {TOLERANCE:g}: by its own stop where that gets there")
    print(pd.DataFrame(ratios).to_string(float_format="{:.3g}".format))


if __name__ == "__main__":
    main()
