"""Runs of 2,000 steps in which nothing goes wrong: small tasks, six optimizers, five schedules."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import on_path  # noqa: F401
import torch
from loops import Loop, Watcher
from more_tasks import LATER_TASKS, NEW_TASKS, TEXT_TASKS
from tasks import TASKS
from torch import nn
from workloads import safe_rates

STEPS, WARM_UP = 2000, 0.05

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "steps": lambda done: 0.1 ** (2 * done // 0.8),
    "trapezoid": lambda done: min(1.0, (1 - done) / 0.2),
    "root": lambda done: (max(done, WARM_UP) / WARM_UP) ** -0.5,
}
"""Factor of the rate by the share of the run that is done, after a straight line up."""

Parameters = Iterator[nn.Parameter]

OPTIMIZERS: dict[str, Callable[[Parameters, float], torch.optim.Optimizer]] = {
    "plain": lambda p, lr: torch.optim.SGD(p, lr),
    "momentum": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr),
    "adamw .95": lambda p, lr: torch.optim.AdamW(p, lr, betas=(0.9, 0.95), weight_decay=0.1),
    "rmsprop": lambda p, lr: torch.optim.RMSprop(p, lr),
    "adagrad": lambda p, lr: torch.optim.Adagrad(p, lr),
}

ALL_TASKS = TASKS | {task.name: task for task in (*TEXT_TASKS, *LATER_TASKS, *NEW_TASKS)}


@dataclass(frozen=True)
class Clean:
    """A run without a plant.

    Attributes:
        task: Key of ``ALL_TASKS``.
        optimizer: Key of ``OPTIMIZERS``.
        schedule: Key of ``SCHEDULES``.
        lr: Peak of the rate.
        pool: Key of ``POOLS``.
    """

    task: str
    optimizer: str
    schedule: str
    lr: float
    pool: str = "clean"

    @property
    def name(self) -> str:
        return f"{self.task}/{self.optimizer}/{self.schedule}"

    @property
    def part(self) -> str:
        return "final" if self.pool == "unseen" else "think"

    def rate(self, step: int) -> float:
        done = (step + 1) / STEPS
        return self.lr * min(1.0, done / WARM_UP) * SCHEDULES[self.schedule](done)


def usual(task: str, optimizer: str, schedule: str, pool: str = "clean") -> Clean:
    """A run at the safe rate that the benchmark of AutoClip found: a quarter of the best constant one."""
    key = {"adamw .95": "adamw"}.get(optimizer, optimizer)
    return Clean(task, optimizer, schedule, safe_rates()[f"{task}/{key}"], pool)


CLEAN = (
    usual("logistic-a9a", "plain", "constant"),
    usual("logistic-a9a", "adamw", "trapezoid"),
    usual("overfit-mlp-mnist", "momentum", "steps"),
    usual("overfit-mlp-mnist", "adamw .95", "cosine"),
    usual("autoencoder-mnist", "adamw", "cosine"),
    usual("autoencoder-mnist", "momentum", "trapezoid"),
    usual("vae-mnist", "adamw .95", "root"),
    usual("factors-ratings", "momentum", "cosine"),
    usual("skipgram-ptb", "adamw", "root"),
    usual("skipgram-ptb", "plain", "steps"),
    usual("field-photograph", "adamw", "steps"),
    usual("graph-communities", "adamw", "constant"),
    usual("flow-moons", "momentum", "cosine"),
    usual("policy-games", "adamw", "trapezoid"),
    Clean("overfit-mlp-mnist", "rmsprop", "constant", 1.5e-4),
    Clean("factors-ratings", "adagrad", "constant", 0.01),
    Clean("small-gpt", "adamw .95", "cosine", 1e-3),
    Clean("small-gpt", "momentum", "constant", 0.015),
    Clean("small-lstm", "adamw", "steps", 2.5e-3),
    Clean("small-lstm", "rmsprop", "trapezoid", 1e-3),
    usual("authors-characters", "momentum", "constant"),
    usual("lenet-mnist", "adamw", "cosine"),
    usual("contrast-cifar", "adamw", "cosine"),
    usual("denoiser-mnist", "plain", "steps"),
    usual("finetune-shakespeare", "adamw .95", "trapezoid"),
    usual("gpt-shakespeare", "adamw", "root"),
    usual("groupnorm-cifar", "momentum", "constant"),
    usual("lstm-ptb", "momentum", "steps"),
    usual("masked-ptb", "adamw .95", "trapezoid"),
    usual("mixer-cifar", "plain", "root"),
    usual("outline-discs", "adamw", "constant"),
    usual("poisson", "momentum", "cosine"),
    usual("postnorm-shakespeare", "adamw", "steps"),
    usual("resnet-cifar", "plain", "trapezoid"),
    usual("rnn-shakespeare", "momentum", "root"),
    usual("rope-wikitext2", "adamw .95", "constant"),
    usual("statespace-shakespeare", "momentum", "cosine"),
    usual("translator-words", "adamw", "steps"),
    usual("vit-cifar", "adamw", "trapezoid"),
    usual("gpt-shakespeare", "plain", "cosine"),
    Clean("overfit-gpt", "adamw", "cosine", 1e-3),
    Clean("overfit-lenet-cifar", "momentum", "constant", 0.01),
    Clean("gru-wikitext", "adamw .95", "root", 2e-3),
    Clean("perceptron-a9a", "rmsprop", "steps", 1e-3),
)
"""The runs that the guard was built with."""

UNSEEN = tuple(
    Clean(task, optimizer, schedule, lr, "unseen")
    for task, optimizer, schedule, lr in (
        ("sort-gpt", "adamw", "cosine", 1e-3),
        ("sort-gru", "adamw .95", "constant", 2e-3),
        ("sums-gpt", "adamw", "constant", 1e-3),
        ("mistakes-mnist", "momentum", "steps", 0.01),
        ("overfit-vit-cifar", "adamw", "root", 1e-3),
        ("overfit-lstm-ptb", "adamw", "trapezoid", 3e-3),
        ("unequal-a9a", "adamw .95", "constant", 1e-3),
        ("hinge-a9a", "plain", "trapezoid", 0.05),
        ("margin-mnist", "momentum", "constant", 0.01),
        ("dropout-mnist", "rmsprop", "root", 3e-4),
        ("student", "momentum", "constant", 0.02),
        ("counts", "adamw", "steps", 2e-3),
        ("variance-waves", "adamw", "cosine", 1e-3),
        ("gru-ptb", "adagrad", "constant", 0.02),
        ("postnorm-ptb", "adamw .95", "cosine", 1e-3),
        ("rms-wikitext", "adamw", "constant", 1e-3),
        ("deep-gpt-wikitext", "momentum", "root", 0.02),
        ("single-gpt", "adamw .95", "steps", 1e-3),
        ("deep-resnet-cifar", "momentum", "cosine", 0.02),
        ("lenet-cifar", "plain", "root", 0.05),
    )
)
"""Other tasks, to judge with when the guard was fixed; the rates are guesses."""

POOLS = {
    "clean": CLEAN,
    "unseen": UNSEEN,
    "apart": (usual("heavy-tails", "adamw", "constant", "apart"),),
}
"""Runs to build with, to judge with, and with outliers in the data."""

POOL = tuple(itertools.chain.from_iterable(POOLS.values()))


def train_clean(run: Clean, watch: Callable[[Loop], Watcher] | None = None) -> Loop:
    task = ALL_TASKS[run.task]
    torch.manual_seed(0)
    model = task.model()
    loop = Loop(model, OPTIMIZERS[run.optimizer](model.parameters(), run.rate(0)), task.loss_fn, run.rate)
    if watch:
        loop.watcher = watch(loop)
    batches: Iterator[Any] = itertools.islice(task.data().batches(1), STEPS)
    for step, batch in enumerate(batches):
        loop.step(step, batch)
    return loop
