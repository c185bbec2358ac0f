"""Trains a network and keeps the curves of the run; published methods are compared by these."""

import itertools
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from experiment import Place
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(1, str(Path(__file__).parents[1] / "autoclip"))
sys.path.insert(2, str(Path(__file__).parents[1]))
from batching import Batch, Data

FEW = 2
"""Examples of a batch in a dry run."""

Rate = Callable[[float], float]
"""Maps the share of the run that is over to a factor on the learning rate."""

Curves = dict[str, list[float]]


@dataclass(frozen=True)
class Course:
    """What a run learns, and for how long.

    Attributes:
        model: Makes the network; initial weights come from torch's global generator.
        data: Batches.
        steps: Number of steps.
        every: Steps between two evaluations.
        rate: Schedule of the learning rate.
    """

    model: Callable[[], nn.Module]
    data: Callable[[], Data]
    steps: int
    every: int
    rate: Rate = lambda share: 1.0


def at(place: Place, course: Course) -> Course:
    """Returns the course; in a dry run two steps of it with few examples, so that networks of full size need no GPU."""
    if not place.dry:
        return course

    def few(batch: Batch) -> Batch:
        return tuple(part[:FEW] for part in batch)

    def data() -> Data:
        whole = course.data()
        return Data(lambda seed: map(few, whole.batches(seed)), few(whole.validation))

    steps = place.steps(course.steps)
    return replace(course, data=data, steps=steps, every=min(course.every, steps))


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy [nats] of classes or of next tokens."""
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def evaluate(model: nn.Module, batch: Batch) -> tuple[float, float]:
    """Returns mean cross-entropy [nats] and the share of right answers."""
    model.eval()
    with torch.no_grad():
        outputs, targets = model(batch[0]).flatten(0, -2), batch[1].flatten()
        loss, right = float(F.cross_entropy(outputs, targets)), float((outputs.argmax(-1) == targets).float().mean())
    model.train()
    return loss, right


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def to(device: torch.device, batch: Batch) -> Batch:
    return tuple(part.to(device) for part in batch)


def train(
    course: Course,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    seed: int,
    *,
    device: torch.device | None = None,
    max_norm: float = math.inf,
    observer: Callable[[nn.Module, torch.optim.Optimizer], Callable[[], float]] | None = None,
) -> Curves:
    """Trains from the initial weights and on the batches of a seed, the same for every optimizer.

    A run ends at the first training loss that is not finite; its curves hold NaN from there on.

    Args:
        course: What to learn.
        optimizer: Makes the optimizer.
        seed: Seed of initial weights and batches.
        device: Where to train; None: the CPU.
        max_norm: Threshold of ``clip_grad_norm_``.
        observer: Makes a function that is called after every step and returns a number.

    Returns:
        ``step``, ``train`` (mean loss since the last evaluation, before the steps), ``valid``, ``right`` (validation
        loss and share of right answers), and ``seen`` (mean of what the observer returned).
    """
    device = device or torch.device("cpu")
    torch.manual_seed(seed)
    model, data = course.model().to(device), course.data()
    held_out = to(device, data.validation)
    used = optimizer(model)
    observe = observer(model, used) if observer else lambda: math.nan
    peaks = [group["lr"] for group in used.param_groups]
    curves: Curves = {name: [] for name in ("step", "train", "valid", "right", "seen")}
    losses: list[float] = []
    seen: list[float] = []
    for k, batch in enumerate(itertools.islice(data.batches(seed + 1), course.steps)):
        for group, peak in zip(used.param_groups, peaks, strict=True):
            group["lr"] = peak * course.rate(k / course.steps)
        loss = loss_fn(model, to(device, batch))
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break
        used.zero_grad()
        torch.autograd.backward(loss)
        if math.isfinite(max_norm):
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        used.step()
        seen.append(observe())
        if (k + 1) % course.every == 0:
            valid, right = evaluate(model, held_out)
            for name, value in zip(curves, (k + 1, mean(losses), valid, right, mean(seen)), strict=True):
                curves[name].append(value)
            losses, seen = [], []
    for step in range(course.every * (len(curves["step"]) + 1), course.steps + 1, course.every):
        for name in curves:
            curves[name].append(step if name == "step" else math.nan)
    return curves


def reached(curves: Mapping[str, Any], goal: float, name: str = "valid") -> float:
    """Returns the step from which a curve lies at or below the goal for the first time; NaN if it never does.

    Steps between two evaluations are interpolated. The first point of the curve counts as a step of its own.
    """
    steps, values = curves["step"], curves[name]
    for i, value in enumerate(values):
        if value <= goal:
            if i == 0:
                return float(steps[0])
            share = (values[i - 1] - goal) / (values[i - 1] - value)
            return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))
    return math.nan


def smoothed(values: list[float], width: int = 3) -> list[float]:
    """Returns the running mean over the last points, fewer at the beginning."""
    return [mean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]
