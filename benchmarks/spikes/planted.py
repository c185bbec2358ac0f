"""The planted runs: which there are, what is drawn for them, and how they are trained beside their pairs."""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from loops import Loop, Watcher, together
from plants import PLANTS, Drawn
from texts import TEXTS, loss_fn

STEPS, WARM_UP = 300, 20
NUM_SEEDS = 12

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
    """A planted run, by model, cause and seed; a severe one lasts longer or is stronger."""

    model: str
    cause: str
    seed: int
    severe: bool = False

    @property
    def name(self) -> str:
        return f"{self.model}/{self.cause}{'/severe' if self.severe else ''}/{self.seed}"

    @property
    def part(self) -> Part:
        """Half of the seeds of one model are there to think with; the guard sees all else once, at the end."""
        return "think" if self.model == "gpt" and self.seed < NUM_SEEDS // 2 else "final"

    @property
    def plant(self) -> Drawn:
        return PLANTS[self.cause](self.model, self.cause, self.seed, severe=self.severe)

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


def pool(models: list[str]) -> list[Planted]:
    return [Planted(*each) for each in itertools.product(models, PLANTS, range(NUM_SEEDS))]


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


def finish(loops: Mapping[str, Loop], setting: Setting, taken: int) -> None:
    """Validates where that is due."""
    if taken in (0, *EVALUATIONS):
        for loop in loops.values():
            if not loop.given_up:
                loop.validate(taken, TEXTS[setting.model].data().validation)


def train_cohort(setting: Setting, runs: list[Planted]) -> dict[str, Loop]:
    """Trains the pair, named ``"pair"``, and every planted run, forked from it where it begins to differ."""
    loops = {"pair": set_up(setting)}
    finish(loops, setting, 0)
    plants = {run.name: run.plant for run in runs}
    for step, batch in batches(setting):
        loops |= {name: loops["pair"].fork(plant) for name, plant in plants.items() if plant.begins == step}
        together(loops, step, batch)
        finish(loops, setting, step + 1)
    return loops


def train_watched(run: Planted, watch: Callable[[Loop], Watcher]) -> Loop:
    """Trains a planted run alone, from its first step on, under a watcher."""
    loop = set_up(run.setting)
    loop.plant, loop.watcher = run.plant, watch(loop)
    loops = {run.name: loop}
    finish(loops, run.setting, 0)
    for step, batch in batches(run.setting):
        together(loops, step, batch)
        finish(loops, run.setting, step + 1)
    return loop


def final_loss(loop: Loop) -> float:
    """Returns the validation loss at the end; NaN if the run was given up."""
    return sum(loop.validated.get(step, math.nan) for step in EVALUATIONS) / len(EVALUATIONS)
