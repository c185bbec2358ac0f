"""Runs of 2,000 steps in which nothing goes wrong: small tasks, six optimizers, five schedules."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import on_path  # noqa: F401
import sources
import torch
from batching import table, text
from images import Plain
from loops import Loop, Watcher
from nets import GPT, Recurrent
from tasks import TASKS, Task, binary_loss, class_loss, small
from texts import WORDS, TextGPT, TextLSTM
from torch import Tensor, nn
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

TEXT_TASKS = (
    Task(
        "small-gpt",
        kind="pre-norm",
        part="choose",
        model=lambda: TextGPT(65, 32, width=32),
        data=partial(text, sources.tiny_shakespeare, length=32, size=8, held_out=8),
        loss_fn=class_loss,
    ),
    Task(
        "small-lstm",
        kind="recurrent",
        part="choose",
        model=lambda: TextLSTM(WORDS, width=32),
        data=partial(text, partial(sources.penn_treebank, WORDS), length=20, size=8, held_out=8),
        loss_fn=class_loss,
    ),
)
"""Smaller than the planted ones, and with other rates."""


def beginning() -> tuple[Tensor, Tensor]:
    """4,000 characters, which a network learns by heart."""
    train, valid = sources.tiny_shakespeare()
    return train[:4000], valid


LATER_TASKS = (
    Task(
        "overfit-gpt",
        kind="pre-norm",
        part="final",
        model=lambda: GPT(65, 32),
        data=partial(
            text, lambda: [codes[:4000] for codes in sources.tiny_shakespeare()], length=32, size=16, held_out=8
        ),
        loss_fn=class_loss,
    ),
    Task(
        "overfit-lenet-cifar",
        kind="plain convolutions",
        part="final",
        model=lambda: Plain(3),
        data=partial(table, lambda: small(partial(sources.cifar10, 28), 500), size=32, held_out=100),
        loss_fn=class_loss,
    ),
    Task(
        "gru-wikitext",
        kind="recurrent",
        part="final",
        model=lambda: Recurrent(65, nn.GRU, 64),
        data=partial(text, sources.wikitext_characters, length=32, size=16, held_out=8),
        loss_fn=class_loss,
    ),
    Task(
        "perceptron-a9a",
        kind="perceptron",
        part="final",
        model=lambda: nn.Sequential(nn.Linear(123, 64), nn.GELU(), nn.Linear(64, 1), nn.Flatten(0)),
        data=partial(table, sources.a9a, size=64, held_out=100),
        loss_fn=binary_loss,
    ),
)
"""Written when the guard was fixed; two of them reach losses near zero."""

ALL_TASKS = TASKS | {task.name: task for task in (*TEXT_TASKS, *LATER_TASKS)}


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
        return f"{self.task}/{self.optimizer}/{self.schedule}{' x 2' if self.pool == 'fast' else ''}"

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
)
"""The runs that the guard was built with."""

UNSEEN = (
    usual("contrast-cifar", "adamw", "cosine", "unseen"),
    usual("denoiser-mnist", "plain", "steps", "unseen"),
    usual("finetune-shakespeare", "adamw .95", "trapezoid", "unseen"),
    usual("gpt-shakespeare", "adamw", "root", "unseen"),
    usual("groupnorm-cifar", "momentum", "constant", "unseen"),
    usual("lstm-ptb", "momentum", "steps", "unseen"),
    usual("masked-ptb", "adamw .95", "trapezoid", "unseen"),
    usual("mixer-cifar", "plain", "root", "unseen"),
    usual("outline-discs", "adamw", "constant", "unseen"),
    usual("poisson", "momentum", "cosine", "unseen"),
    usual("postnorm-shakespeare", "adamw", "steps", "unseen"),
    usual("resnet-cifar", "plain", "trapezoid", "unseen"),
    usual("rnn-shakespeare", "momentum", "root", "unseen"),
    usual("rope-wikitext2", "adamw .95", "constant", "unseen"),
    usual("statespace-shakespeare", "momentum", "cosine", "unseen"),
    usual("translator-words", "adamw", "steps", "unseen"),
    usual("vit-cifar", "adamw", "trapezoid", "unseen"),
    usual("gpt-shakespeare", "plain", "cosine", "unseen"),
    Clean("overfit-gpt", "adamw", "cosine", 1e-3, "unseen"),
    Clean("overfit-lenet-cifar", "momentum", "constant", 0.01, "unseen"),
    Clean("gru-wikitext", "adamw .95", "root", 2e-3, "unseen"),
    Clean("perceptron-a9a", "rmsprop", "steps", 1e-3, "unseen"),
)
"""Other tasks, to judge with when the guard was fixed."""

POOLS = {
    "clean": CLEAN,
    "unseen": UNSEEN,
    "fast": tuple(replace(run, lr=2 * run.lr, pool="fast") for run in CLEAN),
    "apart": (usual("heavy-tails", "adamw", "constant", "apart"),),
}
"""Runs to build with, to judge with, at twice the rate, and with outliers in the data."""

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
