"""Measures again whether clipping makes Scion faster at a fixed rate, and whether a decaying rate leaves an advantage.

    SMOOTHDIAG_DATA=... OMP_NUM_THREADS=1 python benchmarks/reproduce/scion.py            # 16 minutes
    python benchmarks/reproduce/scion.py --report

Source of the claim and of all settings: Pethick, Xie, Erdogan, Antonakopoulos, Silveti-Falls, Cevher 2025 (NeurIPS,
arXiv 2506.01913), "Generalized gradient norm clipping & non-Euclidean (L0,L1)-smoothness".
docs/reproduce/scion.md says what was found.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import pandas as pd
import torch
from experiment import Experiment, Place, Size, main
from learning import Course, at, loss_fn, mean, smoothed, to, train
from scion_figure import draw, draw_norms
from scion_norms import Norms, measure
from scion_tables import ADAMW, CLIPPED, CLIPS, EQUAL, FRANK_WOLFE, HIGHER, PLAIN, PUBLISHED_RATE, SHORT, tables
from torch import nn

import smoothdiag as sd
from smoothdiag.optim import scion_groups

# isort: split
import sources
from batching import table, text
from images import ResNet
from models import GPT

Task = Literal["gpt", "cnn"]
Schedule = Literal["fixed", "decayed"]

PUBLISHED = {"gpt": 0.00036, "cnn": 0.05}
"""Published lengths of the steps of Scion."""

PUBLISHED_THRESHOLDS = {"gpt": 600.0, "cnn": 1600.0}
"""Published thresholds of ClippedScion [f]; the runs here have others."""

RATES = {
    "gpt": (0.000013, 0.00004, 0.00012, PUBLISHED["gpt"], 0.00108),
    "cnn": (0.0005, 0.0016, 0.005, 0.016, PUBLISHED["cnn"]),
}
"""Rates to try. Those of Scion are lengths of its steps."""

ADAMW_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)

CHOSEN_BY, JUDGED_BY = 0, {"gpt": (1, 2, 3), "cnn": (1, 2)}
"""The seed that chooses among the rates, and the seeds that then compare methods."""

TINY = 1e-9
"""A threshold that every gradient exceeds: then all steps are equally long, which is Scion."""


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        task: Key of ``SETTINGS``.
        method: ``CLIPPED`` and so on.
        schedule: ``"fixed"``, or ``"decayed"`` along a straight line to zero.
        rate: Length of the longest step of Scion, or AdamW's rate.
        seed: Seed.
        why: Part of the key, for runs that are no entries of the comparison.
    """

    task: Task
    method: str
    schedule: Schedule
    rate: float
    seed: int
    why: str = ""

    @property
    def key(self) -> str:
        parts = [self.task, self.method, self.schedule, f"{self.rate:.3g}", f"seed{self.seed}", self.why]
        return "/".join(part for part in parts if part)


@dataclass(frozen=True)
class Setting:
    """Published radii and momentum."""

    radii: dict[Any, float]
    radius: float
    momentum: float


SETTINGS: dict[Task, Setting] = {
    "gpt": Setting({"hidden": 50.0, "tied": 3000.0}, 1.0, 0.9),
    "cnn": Setting({"head": 128.0}, 8.0, 0.4),
}


def groups_of(model: nn.Module, task: Task) -> list[dict[str, Any]]:
    setting = SETTINGS[task]
    kinds = {name: "embedding" for name, _ in model.named_parameters() if name == "places"}
    groups = scion_groups(model, radii=setting.radii, kinds=kinds)  # type: ignore[arg-type]
    return [{"radius": setting.radius, **group} for group in groups]


def first_norm(model: nn.Module, task: Task, batch: Any) -> float:
    """Returns the dual norm that the optimizer sees at its first step [f]: of 1 - momentum times the first gradient."""
    model = copy.deepcopy(model)
    torch.autograd.backward(loss_fn(model, batch))
    products: list[float] = [
        group["radius"] * float(product)
        for group in groups_of(model, task)
        for product in group["geometry"].minimize([p.grad for p in group["params"]])[1]
    ]
    return (1 - SETTINGS[task].momentum) * sum(products)


def optimizer_of(case: Run, threshold: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Returns a function that makes the optimizer; the short step of the released code counts a quarter here."""
    if case.method == ADAMW:
        return lambda model: torch.optim.AdamW(model.parameters(), case.rate, betas=(0.9, 0.95), weight_decay=0.1)
    decay = case.method in (SHORT, FRANK_WOLFE)
    threshold = TINY if case.method in (PLAIN, FRANK_WOLFE) else threshold / 4 if decay else threshold
    setting = SETTINGS[case.task]
    return lambda model: sd.ClippedScion(
        groups_of(model, case.task),
        lr=case.rate / threshold,
        threshold=threshold,
        radius=setting.radius,
        momentum=setting.momentum,
        weight_decay=float(decay),
    )


def length_observer(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], float]:
    """Returns a function that tells how long a step was, as a share of the longest: the head shows it.

    All entries of a head with the geometry `Sign` move by equal lengths, so its norm is that of the whole step.
    """
    head = next((g for g in optimizer.param_groups if g.get("kind") in ("head", "tied")), None)
    if head is None or head["weight_decay"]:
        return lambda: math.nan
    weight = head["params"][0]
    before = weight.detach().clone()

    def observe() -> float:
        moved = weight.detach() - before
        before.copy_(weight.detach())
        longest = head["lr"] * head["threshold"] * head["radius"]
        return float(head["geometry"].norm(moved)) / longest if longest else math.nan

    return observe


def course(task: Task, size: Size, schedule: Schedule = "fixed") -> Course:
    full = size == "full"
    rate = (lambda share: 1.0 - share) if schedule == "decayed" else (lambda share: 1.0)
    if task == "gpt":
        layers, width, heads, length, words = (12, 768, 12, 256, 10_000) if full else (2, 64, 4, 32, 65)
        return Course(
            partial(GPT, layers, width, heads, length, words),
            partial(
                text,
                partial(sources.wikitext2, words) if full else sources.tiny_shakespeare,
                length=length,
                size=64 if full else 16,
                held_out=256 if full else 64,
            ),
            steps=5000 if full else 300,
            every=50 if full else 10,
            rate=rate,
        )
    return Course(
        partial(ResNet, 64 if full else 16),
        partial(
            table,
            partial(sources.cifar10, 32 if full else 12),
            size=256 if full else 64,
            held_out=2000 if full else 300,
        ),
        steps=4000 if full else 160,
        every=40 if full else 10,
        rate=rate,
    )


def rates(task: str, method: str) -> tuple[float, ...]:
    return ADAMW_RATES if method == ADAMW else RATES[task]


def compared() -> Iterator[tuple[Task, str, Schedule]]:
    """Yields tasks, methods and schedules that get a grid of rates each."""
    for task in SETTINGS:
        for method in (CLIPPED, PLAIN, ADAMW):
            yield task, method, "fixed"
            yield task, method, "decayed"
        for method in CLIPS:
            if method != CLIPPED:
                yield task, method, "fixed"
    yield "gpt", SHORT, "fixed"
    yield "gpt", FRANK_WOLFE, "fixed"


def cases(size: Size) -> dict[str, Run | Norms]:
    runs: list[Run | Norms] = [Run(t, m, s, rate, CHOSEN_BY) for t, m, s in compared() for rate in rates(t, m)]
    runs += [Norms("held-out", (1, 2)), Norms("step", (1,))]
    return {case.key: case for case in runs}


def best(rows: pd.DataFrame, task: str, method: str, schedule: str) -> "pd.Series[Any] | None":
    """Returns the run with the rate that ended lowest on the choosing seed; None while the grid has gaps."""
    if rows.empty:
        return None
    own = rows[(rows["task"] == task) & (rows["method"] == method) & (rows["schedule"] == schedule)]
    grid = own[(own["seed"] == CHOSEN_BY) & (own["why"] == "")]
    if len(grid) < len(rates(task, method)) or grid["final"].isna().all():
        return None
    return grid.sort_values("final").iloc[0]


def then(size: Size, rows: pd.DataFrame) -> dict[str, Run | Norms]:
    """The best rates on other seeds, the published rates there, and Scion with the mean step of clipped runs."""
    runs: list[Run | Norms] = []
    for task, method, schedule in compared():
        found = best(rows, task, method, schedule)
        if found is None:
            continue
        runs += [Run(task, method, schedule, float(found["rate"]), seed) for seed in JUDGED_BY[task]]
        if method == HIGHER:
            shorter = float(found["rate"]) * mean(found["curves"]["seen"])
            runs += [Run(task, PLAIN, schedule, shorter, seed, why=EQUAL) for seed in JUDGED_BY[task]]
        if method in (CLIPPED, PLAIN) and schedule == "fixed":
            runs += [Run(task, method, schedule, PUBLISHED[task], seed, why=PUBLISHED_RATE) for seed in JUDGED_BY[task]]
    return {run.key: run for run in runs}


def run(case: Run | Norms, place: Place) -> Mapping[str, Any]:
    if isinstance(case, Norms):
        return measure(case, place, at(place, course("gpt", place.size)), norm_optimizer)
    found = at(place, course(case.task, place.size, case.schedule))
    threshold = CLIPS.get(case.method, 1.0) * threshold_of(found, case.task, case.seed, place.device)
    curves = train(
        found,
        optimizer_of(case, threshold),
        case.seed,
        device=place.device,
        max_norm=1.0 if case.method == ADAMW else math.inf,
        observer=length_observer,
    )
    return {
        "task": case.task,
        "method": case.method,
        "schedule": case.schedule,
        "rate": case.rate,
        "seed": case.seed,
        "why": case.why,
        "steps": found.steps,
        "threshold": threshold,
        "final": smoothed(curves["valid"])[-1],
        "right": curves["right"][-1],
        "curves": curves,
    }


def threshold_of(found: Course, task: Task, seed: int, device: torch.device) -> float:
    """Returns the threshold that the first gradient of a seed sets: the first step is just not clipped."""
    torch.manual_seed(seed)
    model = found.model().to(device)
    return first_norm(model, task, to(device, next(iter(found.data().batches(seed + 1)))))


def norm_optimizer(found: Course, seed: int, device: torch.device) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Returns a function that makes ClippedScion at the published rate."""
    case = Run("gpt", CLIPPED, "fixed", PUBLISHED["gpt"], seed)
    return optimizer_of(case, threshold_of(found, "gpt", seed, device))


EXPERIMENT = Experiment(
    name="scion",
    cases=cases,
    run=run,
    tables=partial(tables, best=best, judged_by=JUDGED_BY, rates=rates, published=PUBLISHED_THRESHOLDS),
    page="docs/reproduce/scion.md",
    draw={
        "reproduce_scion.png": partial(draw, best=best, judged_by=JUDGED_BY),
        "reproduce_scion_norms.png": draw_norms,
    },
    then=then,
)

if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
