"""Measures again how clipped SGD, clipped momentum and their mixture compare with SGD, at published and at other rates.

    SMOOTHDIAG_DATA=... OMP_NUM_THREADS=1 python benchmarks/reproduce/zhang2020.py            # 16 minutes
    python benchmarks/reproduce/zhang2020.py --report

Source of the claim and of all settings: Zhang, Jin, Fang, Wang 2020 (NeurIPS, arXiv 2010.02519), "Improved analysis of
clipping algorithms for non-convex optimization", figure 2, and the code released with it
(github.com/zbh2047/clipping-algorithms). docs/reproduce/zhang2020.md says what was found.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import pandas as pd
import torch
from clipped_curves import draw, tables
from experiment import Experiment, Place, Size, main
from learning import Course, Curves, at, mean, train
from torch import Tensor, nn
from torch.nn import functional as F

import smoothdiag as sd

# isort: split
import sources
from batching import Batch, Data, table, text
from images import ResNet

Task = Literal["cifar", "ptb"]

FACTORS: dict[Task, tuple[float, ...]] = {"cifar": (1 / 27, 1 / 9, 1 / 3, 1.0, 3.0), "ptb": (1 / 3, 1.0, 3.0)}
"""Rates to try, in published ones; the longest step follows the rate, so the threshold stays."""

CHOSEN_BY, JUDGED_BY = 0, (1, 2)
"""The seed that chooses among the rates, and the seeds that then compare methods."""

DECAYS = (80 / 150, 120 / 150)
"""Shares of the CIFAR run after which the rate falls to a tenth: epochs 80 and 120 of 150."""


@dataclass(frozen=True)
class Setting:
    """Published setting of a method: learning rate [x^2/f], longest step gamma [x], momentum and weight nu of it."""

    lr: float
    longest_step: float
    momentum: float = 0.0
    nu: float = 0.0

    def optimizer(self, model: nn.Module, factor: float, weight_decay: float) -> sd.ClippedMomentum:
        """The released code clips softly where there is momentum, and adds the weight decay to the gradient."""
        return sd.ClippedMomentum(
            model.parameters(),
            self.lr * factor,
            threshold=self.longest_step / self.lr,
            momentum=self.momentum,
            nu=self.nu,
            clip="soft" if self.nu and math.isfinite(self.longest_step) else "hard",
            weight_decay=weight_decay,
            decoupled_weight_decay=False,
        )


SETTINGS: dict[Task, dict[str, Setting]] = {
    "cifar": {
        "SGD": Setting(1.0, math.inf, 0.9, 1.0),
        "SGDClip": Setting(1.0, 1.0),
        "MomClip": Setting(1.5, 0.25, 0.9, 1.0),
        "MixClip": Setting(1.0, 1.0, 0.999, 0.7),
        "MixClip, momentum 0.9": Setting(1.0, 1.0, 0.9, 0.7),
    },
    "ptb": {
        "SGD": Setting(5.0, math.inf),
        "SGDClip": Setting(30.0, 7.5),
        "MomClip": Setting(50.0, 2.5, 0.9, 1.0),
        "MixClip": Setting(30.0, 5.0, 0.999, 0.7),
        "MixClip, momentum 0.9": Setting(30.0, 5.0, 0.9, 0.7),
        "SGD, momentum 0.9": Setting(30.0, math.inf, 0.9, 1.0),
    },
}
"""The first four of each task are published, in the order of the paper's results, the worst first."""

METHODS = ("SGD", "SGDClip", "MomClip", "MixClip")

GRIDS: dict[Task, tuple[str, ...]] = {"cifar": METHODS, "ptb": (*METHODS, "SGD, momentum 0.9")}
"""Methods that get a grid of rates. On CIFAR-10 the published SGD has momentum, on Penn Treebank it has none."""


@dataclass(frozen=True)
class Run:
    """One run: a task, a method, its rate in published ones, and a seed."""

    task: Task
    method: str
    factor: float
    seed: int

    @property
    def key(self) -> str:
        return f"{self.task}/{self.method}/x{self.factor:.2g}/seed{self.seed}"


class Words(nn.Module):
    """LSTM layers with the same matrix at both ends, and dropout between the parts."""

    def __init__(self, vocabulary: int, widths: tuple[int, ...], dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, widths[0])
        self.cells = nn.ModuleList(
            nn.LSTM(a, b, batch_first=True) for a, b in zip(widths, (*widths[1:], widths[0]), strict=True)
        )
        self.bias, self.dropout = nn.Parameter(torch.zeros(vocabulary)), nn.Dropout(dropout)
        nn.init.uniform_(self.embed.weight, -0.1, 0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.dropout(self.embed(tokens))
        for cell in self.cells:
            x = self.dropout(cell(x)[0])
        return F.linear(x, self.embed.weight, self.bias)


def augmented(data: Data) -> Data:
    """Crops every training image at random out of a frame of four grey pixels, and flips half of the images."""

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed + 1_000_003)
        for x, y in data.batches(seed):
            padded, (height, width) = F.pad(x, (4, 4, 4, 4)), x.shape[-2:]
            corners = torch.randint(9, (len(x), 2), generator=generator).tolist()
            cut = [image[:, i : i + height, j : j + width] for image, (i, j) in zip(padded, corners, strict=True)]
            flipped = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
            yield torch.where(flipped, torch.stack(cut).flip(-1), torch.stack(cut)), y

    return Data(batches, data.validation)


def stairs(share: float) -> float:
    return 0.1 ** sum(share >= decay for decay in DECAYS)


def course(task: Task, size: Size) -> Course:
    full = size == "full"
    if task == "cifar":
        images = partial(
            table, partial(sources.cifar10, 32 if full else 8), size=128 if full else 64, held_out=2000 if full else 500
        )
        return Course(
            partial(ResNet, blocks=5),
            (lambda: augmented(images())) if full else images,
            steps=58_800 if full else 240,
            every=392 if full else 16,
            rate=stairs,
        )
    words = 10_000 if full else 2000
    return Course(
        partial(Words, words, (400, 1150, 1150), dropout=0.4) if full else partial(Words, words, (200, 200)),
        partial(
            text,
            partial(sources.penn_treebank, words),
            length=70 if full else 35,
            size=20 if full else 10,
            held_out=500 if full else 100,
        ),
        steps=166_000 if full else 280,
        every=664 if full else 20,
    )


DIVERGED = 20.0
"""Loss above which a run counts as diverged [nats]; chance is 2.3 and 7.6."""

WEIGHT_DECAY: dict[Task, float] = {"cifar": 5e-4, "ptb": 1.2e-6}


def cases(size: Size) -> dict[str, Run]:
    """The grid of rates on one seed, and the published rates on the others."""
    runs = [Run(task, m, factor, CHOSEN_BY) for task in SETTINGS for m in GRIDS[task] for factor in FACTORS[task]]
    runs += [Run(task, m, 1.0, seed) for task in SETTINGS for m in SETTINGS[task] for seed in JUDGED_BY]
    return {run.key: run for run in runs}


def best_factor(rows: pd.DataFrame, task: Task, method: str) -> float | None:
    """Returns the rate at which a method judged best on the choosing seed; None while the grid has gaps."""
    if rows.empty:
        return None
    grid = rows[(rows["task"] == task) & (rows["method"] == method) & (rows["seed"] == CHOSEN_BY)]
    if len(grid) < len(FACTORS[task]) or grid["judged"].isna().all():
        return None
    return float(grid.sort_values("judged")["factor"].iloc[0])


def then(size: Size, rows: pd.DataFrame) -> dict[str, Run]:
    """The best rate of every method on the seeds that did not choose it."""
    runs = [
        Run(task, m, factor, seed)
        for task in SETTINGS
        for m in GRIDS[task]
        for seed in JUDGED_BY
        if (factor := best_factor(rows, task, m)) is not None
    ]
    return {run.key: run for run in runs}


def norm_seen(model: nn.Module, optimizer: torch.optim.Optimizer, setting: Setting) -> float:
    """Returns the norm that is compared with the threshold [f/x]: of the average where it has the larger weight."""
    averages = [state["momentum_buffer"] for state in optimizer.state.values() if "momentum_buffer" in state]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return float(nn.utils.get_total_norm(averages if setting.nu > 0.5 and averages else gradients))


def judged(task: str, curves: Curves, steps: int) -> float:
    """Returns what the paper's figure compares [nats], the smaller the better; NaN for a run that diverged.

    CIFAR-10: mean training loss over the last eighth of the run before the rate first falls, in whole evaluations. Penn
    Treebank: mean validation loss of the last three evaluations.
    """
    last = DECAYS[0] * steps
    window = [x for k, x in zip(curves["step"], curves["train"], strict=True) if last - steps / 8 < k <= last]
    found = mean(curves["valid"][-3:]) if task == "ptb" else mean(window)
    return found if found < DIVERGED else math.nan


def run(case: Run, place: Place) -> Mapping[str, Any]:
    found = at(place, course(case.task, place.size))
    setting = SETTINGS[case.task][case.method]

    def observer(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        return lambda: norm_seen(model, optimizer, setting)

    curves = train(
        found,
        lambda model: setting.optimizer(model, case.factor, WEIGHT_DECAY[case.task]),
        case.seed,
        device=place.device,
        observer=observer,
    )
    return {
        "task": case.task,
        "method": case.method,
        "factor": case.factor,
        "seed": case.seed,
        "steps": found.steps,
        "threshold": setting.longest_step / setting.lr if math.isfinite(setting.longest_step) else None,
        "judged": judged(case.task, curves, found.steps),
        "right": mean(curves["right"][-3:]),
        "curves": curves,
    }


EXPERIMENT = Experiment(
    name="zhang2020",
    cases=cases,
    run=run,
    tables=partial(tables, settings=SETTINGS, grids=GRIDS, best_factor=best_factor),
    page="docs/reproduce/zhang2020.md",
    draw={"reproduce_zhang2020.png": partial(draw, methods=METHODS)},
    then=then,
)

if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
