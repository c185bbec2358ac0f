"""What skipping and clipping save in runs that would diverge or lose more than a fifth of the descent.

    python benchmarks/spikes/rescue.py                               # adds to rescue.csv what is missing

The plants last thirty times as long as those that are to be detected, or do not end. A run's loss is the share of the
descent of its pair that it misses at the end: (final loss - the pair's) / (initial loss - the pair's); 1 if it
diverged. The pair has neither plant nor guard.
"""

import argparse
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import on_path  # noqa: F401
import torch
from clippers import ZClip
from loops import Loop, Watcher
from planted import Pair, Planted, cohorts, final_loss, train_watched
from rivals import SkipStep
from store import append, read
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import smoothdiag as sd

RESCUES = Path(__file__).with_name("rescue.csv")
COLUMNS = ("run", "arm", "kind", "initial", "final", "pair_final")

WORTH = 0.2
"""Runs that miss less of the descent have nothing to be saved."""

SEEDS = (0, 1, 2)
CAUSES = ("corrupted batch", "wrong mask", "rate x 8", "edge", "numerics")


class MaxNorm(Watcher):
    def __init__(self, loop: Loop) -> None:
        self.loop = loop

    def before_step(self, loss: Tensor, grad_norm: Tensor) -> None:
        clip_grad_norm_(self.loop.model.parameters(), 1.0)


class Guarding(Watcher):
    """The guard, when it acts."""

    def __init__(self, loop: Loop, action: str) -> None:
        self.guard = sd.SpikeGuard(loop.optimizer, action=action)

    def before_step(self, loss: Tensor, grad_norm: Tensor) -> None:
        self.guard.observe(loss)


class AutoClip(Watcher):
    """AutoClip with its defaults."""

    def __init__(self, loop: Loop) -> None:
        warnings.simplefilter("ignore", sd.SmoothdiagWarning)
        self.probe = sd.Probe(loop.model, loop.optimizer, loop.loss_fn)
        self.clip = sd.AutoClip(loop.optimizer, self.probe)

    def before_forward(self, step: int, batch: Any) -> None:
        self.probe.observe(batch)


class OfOthers(Watcher):
    """A rule of others, written for the benchmark of AutoClip."""

    def __init__(self, loop: Loop, rule: Callable[[Any], Any]) -> None:
        self.loop = loop
        self.seen = SimpleNamespace(parameters=list(loop.model.parameters()), optimizers=[loop.optimizer])
        self.rule = rule(self.seen)

    def before_step(self, loss: Tensor, grad_norm: Tensor) -> None:
        self.seen.gradients = [p.grad for p in self.seen.parameters if p.grad is not None]
        self.seen.loss = float(loss)
        self.rule.before()

    def after_step(self, step: int) -> None:
        self.rule.after()


ARMS: dict[str, Callable[[Loop], Watcher]] = {
    "guard, skip": lambda loop: Guarding(loop, "skip"),
    "guard, clip": lambda loop: Guarding(loop, "clip"),
    "AutoClip": AutoClip,
    "max_norm = 1": MaxNorm,
    "skip-step": lambda loop: OfOthers(loop, SkipStep),
    "ZClip": lambda loop: OfOthers(loop, ZClip),
}
NOTHING = "nothing"


def missed(initial: float, final: float, pair_final: float) -> float:
    """Returns the share of the descent that a run misses; 1 if it diverged."""
    return min(1.0, (final - pair_final) / (initial - pair_final)) if math.isfinite(final) else 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["gpt", "lstm"])
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = [Planted(model, cause, seed, True) for model in args.models for cause in CAUSES for seed in SEEDS]
    done = set(read(RESCUES, COLUMNS)["run"])
    for setting, own in tqdm(cohorts([run for run in runs if run.name not in done]).items(), unit="pair"):
        pair = Pair(setting, own)
        for run in own:
            note(run, NOTHING, pair.planted(run), final_loss(pair.loop))
    found = read(RESCUES, COLUMNS)
    plain = found[found["arm"] == NOTHING].set_index("run")
    done = set(zip(found["run"], found["arm"], strict=True))
    todo = []
    for run in runs:
        row = plain.loc[run.name]
        if missed(row["initial"], row["final"], row["pair_final"]) > WORTH:
            todo += [(run, arm) for arm in args.arms if (run.name, arm) not in done]
    for run, arm in tqdm(todo, unit="run"):
        note(run, arm, train_watched(run, ARMS[arm]), float(plain.loc[run.name, "pair_final"]))


def note(run: Planted, arm: str, loop: Loop, pair_final: float) -> None:
    row = {"run": run.name, "arm": arm, "kind": loop.plant.kind, "initial": f"{loop.validated[0]:.5g}"}
    append(RESCUES, COLUMNS, row | {"final": f"{final_loss(loop):.5g}", "pair_final": f"{pair_final:.5g}"})


if __name__ == "__main__":
    main()
