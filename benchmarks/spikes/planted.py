"""The planted runs: which there are, what is drawn for them, and how they are trained beside their pairs."""

import itertools
import math
import random
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from loops import Loop, Watcher
from plants import PLANTS, Drawn, Plant
from texts import TEXTS, loss_fn

STEPS, WARM_UP = 300, 20
NUM_SEEDS = 12

ATTEMPTS = 6
"""So many plants are drawn at most until a run spikes."""

EVALUATIONS = (280, 290, 300)
"""Steps after which the validation loss is read; the final loss is the mean."""

Part = Literal["think", "final"]


@dataclass(frozen=True)
class Setting:
    """Everything that a run and its pair without the plant have in common.

    Attributes:
        model: Key of ``TEXTS``.
        seed: Seed of initial weights and batches.
        optimizer: ``"adamw"`` or ``"momentum"``.
        schedule: ``"constant"`` or ``"cosine"``, which falls to half, both after a straight line up.
        narrow: Dtype of one layer, if not that of the parameters.
        inner: Whether that layer lies in the middle instead of at the end.
    """

    model: str
    seed: int
    optimizer: str = "adamw"
    schedule: str = "constant"
    narrow: torch.dtype | None = None
    inner: bool = False

    def rate(self, step: int) -> float:
        cosine = 0.75 + 0.25 * math.cos(math.pi * (step + 1) / STEPS) if self.schedule == "cosine" else 1.0
        return TEXTS[self.model].rates[self.optimizer] * min(1.0, (step + 1) / WARM_UP) * cosine


@dataclass(frozen=True)
class Planted:
    """A planted run.

    Attributes:
        model: Key of ``TEXTS``.
        cause: Key of ``PLANTS``.
        seed: Seed of initial weights, batches and plant.
        severe: Whether the plant lasts longer.
        attempt: The number of plants that were drawn before, and after which the run did not spike.
    """

    model: str
    cause: str
    seed: int
    severe: bool = False
    attempt: int = 0

    @property
    def name(self) -> str:
        return f"{self.model}/{self.cause}{'/severe' if self.severe else ''}/{self.seed}"

    @property
    def part(self) -> Part:
        """Half of the seeds of one model are there to think with; the guard sees all else once, at the end."""
        return "think" if self.model == "gpt" and self.seed < NUM_SEEDS // 2 else "final"

    @property
    def plant(self) -> Drawn:
        return PLANTS[self.cause](self.model, self.cause, self.seed, self.attempt, severe=self.severe)

    @property
    def attempts(self) -> "list[Planted]":
        return [replace(self, attempt=attempt) for attempt in range(ATTEMPTS)]

    @property
    def setting(self) -> Setting:
        """Every third run is one of SGD, but for stale moments; every fourth has a layer in bfloat16 in any case."""
        draw = random.Random(f"{self.model}/{self.seed}")
        schedule, lies_inside = draw.choice(["constant", "cosine"]), draw.random() < 0.5
        optimizer = "momentum" if self.seed % 3 == 2 and self.cause != "stale moment" else "adamw"
        plant = self.plant
        narrow, inner = plant.narrow, plant.inner
        if narrow is None and self.seed % 4 == 3:
            narrow, inner = torch.bfloat16, lies_inside
        return Setting(self.model, self.seed, optimizer, schedule, narrow, inner)


def pool(models: Iterable[str], seeds: Iterable[int] = range(NUM_SEEDS)) -> list[Planted]:
    """Returns the planted runs, seed by seed, so that a table of the first of them has all causes."""
    return [Planted(model, cause, seed) for model, seed, cause in itertools.product(models, seeds, PLANTS)]


def cohorts(runs: list[Planted]) -> dict[Setting, list[Planted]]:
    """Returns the runs by their settings; those of one setting share their pair."""
    found: dict[Setting, list[Planted]] = {}
    for run in runs:
        found.setdefault(run.setting, []).append(run)
    return found


def set_up(setting: Setting) -> Loop:
    torch.manual_seed(setting.seed)
    model = TEXTS[setting.model].model()
    if setting.narrow is not None:
        (model.inner if setting.inner else model.last).dtype = setting.narrow
    lr = setting.rate(0)
    if setting.optimizer == "adamw":
        return Loop(model, torch.optim.AdamW(model.parameters(), lr=lr), loss_fn, setting.rate)
    return Loop(model, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), loss_fn, setting.rate)


def batches(setting: Setting) -> Iterator[tuple[int, tuple[torch.Tensor, torch.Tensor]]]:
    return enumerate(itertools.islice(TEXTS[setting.model].data().batches(setting.seed + 1), STEPS))


def finish(loop: Loop, setting: Setting, taken: int) -> None:
    """Validates where that is due."""
    if taken in (0, *EVALUATIONS) and not loop.given_up:
        loop.validate(taken, TEXTS[setting.model].data().validation)


def go_on(loop: Loop, setting: Setting, keep: Collection[int] = (), until: int = STEPS) -> dict[int, Loop]:
    """Takes the steps that are left of a run; returns what it was before those steps that are to be kept."""
    kept: dict[int, Loop] = {}
    taken = len(loop.rows)
    finish(loop, setting, taken)
    for step, batch in itertools.islice(batches(setting), taken, until):
        if step in keep:
            kept[step] = loop.fork(Plant())
        if not loop.given_up:
            loop.step(step, batch)
        finish(loop, setting, step + 1)
    return kept


class Pair:
    """A run without a plant, from which planted runs fork where they begin to differ."""

    def __init__(self, setting: Setting, runs: list[Planted]) -> None:
        self.setting, self.loop = setting, set_up(setting)
        self.kept = go_on(self.loop, setting, {each.plant.begins for run in runs for each in run.attempts})

    def planted(self, run: Planted) -> Loop:
        """Returns the run with the plant."""
        plant = run.plant
        loop = self.kept[plant.begins].fork(plant)
        go_on(loop, self.setting)
        return loop


def train_watched(run: Planted, watch: Callable[[Loop], Watcher], until: int = STEPS) -> Loop:
    """Trains a planted run alone, from its first step on, under a watcher."""
    loop = set_up(run.setting)
    loop.plant, loop.watcher = run.plant, watch(loop)
    go_on(loop, run.setting, until=until)
    return loop


def final_loss(loop: Loop) -> float:
    """Returns the validation loss at the end; NaN if the run was given up."""
    return sum(loop.validated.get(step, math.nan) for step in EVALUATIONS) / len(EVALUATIONS)
