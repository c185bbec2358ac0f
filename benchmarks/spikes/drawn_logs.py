"""Logs that are drawn: spikes that last, come back or grow, and far steps that are usual.

    python benchmarks/spikes/drawn_logs.py --write docs/spikes.md     # half a minute

A log has 2,500 steps of a loss that falls as a power and of gradient norms with log-normal noise. In the first table a
spike is seen if a rule flags one of the four steps from its first on. In the second, far steps are part of the run from
its beginning, and flags are counted from the 500th step on.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from rules import RULES
from store import markdown

import smoothdiag as sd

STEPS, SEEDS = 2500, 20

LATER = 500
"""Flags count from this step on: a rule has seen by then what is usual."""

BLOCK = re.compile(r"(<!-- begin: ([\w ]+) by benchmarks/spikes/drawn_logs\.py -->\n)(.*?)(<!-- end -->)", re.DOTALL)

Log = tuple[np.ndarray, np.ndarray]


def quiet(draw: np.random.Generator) -> Log:
    """Returns losses and norms in which nothing happens."""
    loss = 2.5 + 3 * (1 + np.arange(STEPS) / 100) ** -0.5 + 0.04 * draw.standard_normal(STEPS)
    return loss, np.exp(0.2 * draw.standard_normal(STEPS))


def leap(log: Log, at: int, height: float, steps: float) -> None:
    """Adds a spike of a language model: the loss rises by ``height`` [nats] and comes back within some ``steps``."""
    loss, norm = log
    fades = np.exp(-np.arange(STEPS - at) / steps)
    loss[at:] += height * fades
    norm[at:] *= 1 + 4 / 3 * height * fades


def bad(log: Log, at: int, steps: int) -> None:
    """Makes loss and norm of some steps five times as large."""
    for column in log:
        column[at : at + steps] *= 5


SPIKES: dict[str, tuple[tuple[int, ...], Callable[[Log, int], None]]] = {
    "one bad step": ((1000,), lambda log, at: bad(log, at, 1)),
    "the same 200 steps after six bad steps": ((1200,), lambda log, at: (bad(log, 1000, 6), bad(log, at, 1))[0]),
    "the same 200 steps after sixty bad steps": ((1200,), lambda log, at: (bad(log, 1000, 60), bad(log, at, 1))[0]),
    "leaps of 3 nats that fade in 10 steps, every 200 steps": (
        tuple(range(800, 2400, 200)),
        lambda log, at: leap(log, at, 3.0, 10),
    ),
    "the same every 100 steps": (tuple(range(800, 2400, 100)), lambda log, at: leap(log, at, 3.0, 10)),
    "leaps that grow from .5 to 4 nats, every 150 steps": (
        tuple(range(1000, 1900, 150)),
        lambda log, at: leap(log, at, 0.5 + 3.5 * (at - 1000) / 750, 5),
    ),
}


def share(of: float, factor: float) -> Callable[[Log, np.random.Generator], None]:
    def apply(log: Log, draw: np.random.Generator) -> None:
        is_hard = draw.random(STEPS) < of
        for column in log:
            column[is_hard] *= factor

    return apply


def every(steps: int) -> Callable[[Log, np.random.Generator], None]:
    def apply(log: Log, draw: np.random.Generator) -> None:
        for column in log:
            column[::steps] *= 3

    return apply


def solved(log: Log, draw: np.random.Generator) -> None:
    log[0][:] = np.exp(-9 + 0.6 * draw.standard_normal(STEPS))
    is_hard = draw.random(STEPS) < 0.04
    log[0][is_hard] = np.exp(-1 + 0.6 * draw.standard_normal(STEPS))[is_hard]
    log[1][is_hard] *= 50


USUAL: dict[str, Callable[[Log, np.random.Generator], None]] = {
    "nothing": lambda log, draw: None,
    "loss and norm three times as large, with probability .04": share(0.04, 3),
    "with probability .01": share(0.01, 3),
    "with probability .003": share(0.003, 3),
    "the same at every 20th step": every(20),
    "every 100th": every(100),
    "every 400th": every(400),
    "a loss near zero, in which one batch in 25 is hard": solved,
    "a norm with a Pareto tail of index 3": lambda log, draw: np.multiply(
        log[1], 1 + draw.pareto(3, STEPS), out=log[1]
    ),
}


def by_rule(rule: sd.SpikeRule) -> Callable[[pd.DataFrame], list[int]]:
    def steps(curve: pd.DataFrame) -> list[int]:
        flags = rule.find_together((curve["loss"], False), (curve["grad_norm"], True))
        return np.flatnonzero(np.any([is_spike for is_spike, _ in flags], axis=0)).tolist()

    return steps


ALL = {"**SpikeRule**": by_rule(sd.SpikeRule()), "without its memory": by_rule(sd.SpikeRule(memory=0)), **RULES}


def counted(make: Callable[[Log, np.random.Generator], None], wanted: tuple[int, ...]) -> list[float]:
    """Returns for each rule how many of the wanted spikes it sees over all seeds, or how many later steps it flags."""
    found = [0.0] * len(ALL)
    for seed in range(SEEDS):
        draw = np.random.default_rng(seed)
        log = quiet(draw)
        make(log, draw)
        curve = pd.DataFrame({"step": range(STEPS), "loss": log[0], "grad_norm": log[1]})
        for i, steps in enumerate(rule(curve) for rule in ALL.values()):
            seen = sum(any(at <= step < at + 4 for step in steps) for at in wanted)
            found[i] += seen if wanted else sum(step >= LATER for step in steps)
    return found


def tables() -> dict[str, str]:
    rows = []
    for name, (wanted, add) in SPIKES.items():
        seen = counted(lambda log, draw, wanted=wanted, add=add: [add(log, at) for at in wanted], wanted)
        rows.append([name, *(f"{100 * each / SEEDS / len(wanted):.0f}" for each in seen)])
    flags = [
        [name, *(f"{1e4 * n / (STEPS - LATER) / SEEDS:.1f}" for n in counted(make, ()))] for name, make in USUAL.items()
    ]
    return {
        "drawn spikes": markdown(["spikes, share that is seen [%]", *ALL], rows),
        "drawn usual": markdown(["usual steps, flags in 10,000 from the 500th on", *ALL], flags),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables between the markers of a page")
    args = parser.parse_args()
    found = tables()
    print("\n\n".join(found.values()))
    if args.write is not None:
        page = args.write.read_text(encoding="utf-8")
        args.write.write_text(BLOCK.sub(lambda m: f"{m[1]}\n{found[m[2]]}\n\n{m[4]}", page), encoding="utf-8")


if __name__ == "__main__":
    main()
