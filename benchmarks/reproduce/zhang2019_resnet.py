"""Gradient norm against smoothness of a ResNet-20 on CIFAR-10, after figure 3 of Zhang et al. 2019, four ways.

SMOOTHDIAG_DATA=DATA python benchmarks/reproduce/zhang2019_resnet.py             # the quick runs that are missing
SMOOTHDIAG_DATA=DATA python benchmarks/reproduce/zhang2019_resnet.py --report    # tables and figure of the page

Rates and thresholds are those of the captions of figures 3 and 4; rate and momentum of the first run are the usual
ones. No code of the image runs was released. The way "as released" is that of the language model with fixed images in
place of the first tenth of the text: the same batches at both points, the midpoint of the step, gradients added up.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import others_path  # noqa: F401
import sources
import torch
from batching import Batch, table
from experiment import Experiment, Place, Size, main
from models import ResNet20, labelled_loss
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from zhang_figure import FIGURE, figure
from zhang_judged import judged, tables
from zhang_ways import Ways, trace_of

RADIUS = 1e-3


@dataclass(frozen=True)
class Scale:
    """Sizes: of images and batches, of the fixed images in batches, and of the run in steps."""

    pixels: int
    batch: int
    fixed: int
    steps: int
    every: int
    seeds: int


SCALES: Mapping[Size, Scale] = {
    "quick": Scale(pixels=16, batch=64, fixed=2, steps=150, every=4, seeds=2),
    "full": Scale(pixels=32, batch=128, fixed=8, steps=200 * 78, every=39, seeds=5),
}
"""Both on 10,000 images: a quick run takes nearly one pass over them, a full one 200 passes."""


@dataclass(frozen=True)
class Case:
    """Settings of SGD; ``max_norm`` is infinite without clipping."""

    name: str
    lr: float
    momentum: float
    max_norm: float


CASES = (
    Case("ResNet, lr .1, momentum .9", 0.1, 0.9, math.inf),
    Case("ResNet, lr 1, not clipped", 1.0, 0.0, math.inf),
    Case("ResNet, lr 5, clipped at .25", 5.0, 0.0, 0.25),
)


def fixed_images(pixels: int, number: int, size: int) -> list[Batch]:
    """Returns batches of training images that no seed changes."""
    (x, y), _ = sources.cifar10(pixels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[: number * size]
    return [(x[rows], y[rows]) for rows in order.view(number, size)]


def train(case: Case, scale: Scale, seed: int, place: Place, path: Path) -> None:
    """Trains and measures a run; writes its trace to the path, unless the run is dry."""
    torch.manual_seed(seed)
    data = table(lambda: sources.cifar10(scale.pixels), scale.batch, scale.batch)
    model = ResNet20().to(place.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=case.lr, momentum=case.momentum)
    fixed = [moved(batch, place.device) for batch in fixed_images(scale.pixels, scale.fixed, scale.batch)]

    def losses(cut: Sequence[Batch]) -> Iterator[Tensor]:
        return (labelled_loss(model, batch) for batch in cut)

    ways = Ways(
        model,
        optimizer,
        labelled_loss,
        [moved(data.validation, place.device)],
        losses,
        lambda: (fixed, fixed),
        radius=RADIUS,
        every=scale.every,
        hessian_every=None if place.size == "quick" else 10 * scale.every,
        path=None if place.dry else path,
    )
    for _, drawn in zip(range(place.steps(scale.steps)), data.batches(seed + 1), strict=False):
        batch = moved(drawn, place.device)
        ways.observe(batch)
        optimizer.zero_grad()
        loss = labelled_loss(model, batch)
        loss.backward()
        ways.before(loss.item())
        if case.max_norm < math.inf:
            clip_grad_norm_(model.parameters(), case.max_norm)
        optimizer.step()
        ways.after()
    ways.close()


def moved(batch: Batch, device: torch.device) -> Batch:
    x, y = batch
    return x.to(device), y.to(device)


def scale_of(place: Place) -> Scale:
    """Returns the sizes; a dry run has one seed and batches of 8."""
    scale = SCALES[place.size]
    return replace(scale, batch=8, seeds=1) if place.dry else scale


def run(case: Case, place: Place) -> Mapping[str, Any]:
    scale = scale_of(place)
    paths = [trace_of(place.traces, case.name, seed) for seed in range(scale.seeds)]
    for seed, path in enumerate(paths):
        train(case, scale, seed, place, path)
    return {} if place.dry else judged(paths)


def cases(size: Size) -> Mapping[str, Case]:
    return {case.name: case for case in CASES}


EXPERIMENT = Experiment(
    name="zhang2019_resnet",
    cases=cases,
    run=run,
    tables=tables,
    page="docs/reproduce/zhang2019.md",
    draw={FIGURE: figure},
)

if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
