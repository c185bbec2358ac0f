"""Muon on matrices and AdamW on the rest: AutoClip with one length for both, or one for each, against caps by hand.

    SMOOTHDIAG_DATA=... OMP_NUM_THREADS=1 python benchmarks/autoclip/several.py --out benchmarks/autoclip/several.json
    python benchmarks/autoclip/several.py --read benchmarks/autoclip/several.json      # prints the table

A small GPT learns Tiny Shakespeare. Both rates are multiplied by the same factor. A cap by hand moves the parameters of
both optimizers back after their step, so that the step of both together is no longer than a fixed length; eight caps
are spaced evenly in the logarithm. Regret is the loss behind the best of the eight caps in % of the descent. The loss
is the mean over the last tenth of the steps.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from nets import GPT
from tasks import SHAKESPEARE, class_loss
from torch import nn
from tqdm import tqdm

import smoothdiag as sd

MUON_RATE, ADAMW_RATE = 0.01, 0.002
"""Rates at which the network trains well without clipping."""

FACTORS = (1.0, 16.0, 64.0)
CAPS = tuple(0.03 * 2.0**k for k in range(8))
"""Lengths of the longest step by hand [x]; the weights have a length of about 20."""

MAX_NORMS = (0.1, 1.0)
"""Thresholds of `clip_grad_norm_`, for comparison: Muon does not see how long a gradient is."""

STEPS, SEEDS = 300, (0, 1, 2)


@contextmanager
def capped(optimizers: list[torch.optim.Optimizer], cap: float) -> Iterator[None]:
    """Keeps the step that all optimizers take within the block no longer than a length."""
    held = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    start = [p.detach().clone() for p in held]
    yield
    with torch.no_grad():
        moved = math.sqrt(sum(float((p - x).double().square().sum()) for p, x in zip(held, start, strict=True)))
        if not moved <= cap:
            for p, x in zip(held, start, strict=True):
                p.copy_(x + (p - x) * (cap / moved))


def train(arm: str, factor: float, seed: int) -> dict[str, float | str | bool]:
    """Trains once, and returns how it went."""
    torch.manual_seed(seed)
    model = GPT(65, 32)
    inner = {id(p) for p in model.blocks.parameters() if p.ndim == 2}
    matrices = [p for p in model.parameters() if id(p) in inner]
    others = [p for p in model.parameters() if id(p) not in inner]
    optimizers = [
        torch.optim.Muon(matrices, lr=MUON_RATE * factor, weight_decay=0.0),
        torch.optim.AdamW(others, lr=ADAMW_RATE * factor),
    ]
    data = SHAKESPEARE()
    batches = data.batches(seed)
    kind, _, value = arm.partition(" ")
    together = {"one length": [optimizers], "one for each": [[o] for o in optimizers]}.get(arm, [])
    probes = [sd.Probe(model, several, class_loss, estimators=()) for several in together]
    clippers = [sd.AutoClip(several, probe) for several, probe in zip(together, probes, strict=True)]
    losses: list[float] = []
    for _ in range(STEPS):
        batch = next(batches)
        for probe in probes:
            probe.observe(batch)
        loss = class_loss(model, batch)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        if kind == "max_norm":
            nn.utils.clip_grad_norm_(model.parameters(), float(value))
        with capped(optimizers, float(value) if kind == "cap" else math.inf):
            for optimizer in optimizers:
                optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    finished = len(losses) == STEPS and math.isfinite(losses[-1])
    tail = statistics.fmean(losses[-STEPS // 10 :]) if finished else math.inf
    lengths = {f"longest step {k}": clipper.longest_step for k, clipper in enumerate(clippers)}
    return {"arm": arm, "factor": factor, "seed": seed, "initial": losses[0], "tail": tail, **lengths}


ARMS = [
    "none",
    "one length",
    "one for each",
    *(f"cap {c:.3g}" for c in CAPS),
    *(f"max_norm {m:.3g}" for m in MAX_NORMS),
]


def table(runs: list[dict]) -> str:
    """Returns the table of the page, in Markdown."""
    lines = [
        "| rates times | none | AutoClip, one length | one for each | best of `max_norm` | best cap |",
        "|---|---|---|---|---|---|",
    ]
    for factor in sorted({run["factor"] for run in runs}):
        cells: dict[str, list[float]] = {}
        for seed in sorted({run["seed"] for run in runs}):
            found = {run["arm"]: run for run in runs if run["factor"] == factor and run["seed"] == seed}
            best = min((run["tail"], arm) for arm, run in found.items() if arm.startswith("cap"))
            room = found["none"]["initial"] - best[0]
            regret = {arm: min((run["tail"] - best[0]) / room, 1.0) for arm, run in found.items()}
            for arm in ("none", "one length", "one for each"):
                cells.setdefault(arm, []).append(100 * regret[arm])
            cells.setdefault("max_norm", []).append(100 * min(r for arm, r in regret.items() if arm.startswith("max")))
            cells.setdefault("cap", []).append(best[0])
            cells.setdefault("at", []).append(float(best[1].split()[1]))
        shown = [
            " / ".join(f"{value:.1f}" for value in cells[name])
            for name in ("none", "one length", "one for each", "max_norm")
        ]
        caps = ", ".join(f"{loss:.3f} at {cap:.3g}" for loss, cap in zip(cells["cap"], cells["at"], strict=True))
        lines.append(f"| {factor:g} | {' | '.join(shown)} | {caps} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="file for the raw results; goes on with one that exists")
    parser.add_argument("--read", type=Path, nargs="+", help="print the table of these files, and train nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="seeds of weights and batches")
    parser.add_argument("--quick", action="store_true", help="one seed, two factors")
    options = parser.parse_args()
    if options.read:
        print(table([run for path in options.read for run in json.loads(path.read_text())["runs"]]))
        return
    torch.set_num_threads(1)
    factors, seeds = ((1.0, 64.0), (0,)) if options.quick else (FACTORS, options.seeds)
    cases = [(arm, factor, seed) for seed in seeds for factor in factors for arm in ARMS]
    runs = json.loads(options.out.read_text())["runs"] if options.out and options.out.exists() else []
    done = {(run["arm"], run["factor"], run["seed"]) for run in runs}
    for case in tqdm([case for case in cases if case not in done]):
        runs.append(train(*case))
        if options.out:
            options.out.write_text(json.dumps({"torch": torch.__version__, "steps": STEPS, "runs": runs}, indent=1))
    print(table(runs))


if __name__ == "__main__":
    main()
