"""What is trained: a network, its batches, its loss, and learning rates from safe to 64 times as large."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import sources
import torch
from nets import GPT, Logistic, ResNet, WordLSTM
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]
Kind = Literal["sgd", "adamw"]

RATES = 4
"""Rates of a workload, each four times the one before: the last is 64 times the first."""


@dataclass(frozen=True)
class Data:
    """Batches to train on and to validate with.

    Attributes:
        batches: Endless batches for a seed; the same seed gives the same batches.
        validation: One batch that is never trained on.
    """

    batches: Callable[[int], Iterator[Batch]]
    validation: Batch


@dataclass(frozen=True)
class Workload:
    """One task with one optimizer.

    Attributes:
        name: Name in the results.
        model: Makes the network; initial weights come from torch's global generator.
        data: Reads the data.
        loss_fn: Mean loss of a batch.
        kind: ``"sgd"`` with momentum, or ``"adamw"``.
        safe_rate: The smallest learning rate: it trains without clipping.
        published_step: The longest step that MixClip was published with for this kind of network [x].
        momentum: Momentum of SGD.
        weight_decay: Weight decay of AdamW.
        shape: Rate over its peak, as a function of the share of the run that is done; None keeps the rate constant.
    """

    name: str
    model: Callable[[], nn.Module]
    data: Callable[[], Data]
    loss_fn: Callable[[nn.Module, Any], Tensor]
    kind: Kind
    safe_rate: float
    published_step: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 0.01
    shape: Callable[[float], float] | None = None

    @property
    def rates(self) -> tuple[float, ...]:
        return tuple(self.safe_rate * 4**i for i in range(RATES))

    @property
    def gain(self) -> float:
        """Length of a step under a constant gradient [steps of SGD without momentum]; 1 for AdamW, which averages."""
        return 1 / (1 - self.momentum) if self.kind == "sgd" else 1.0

    def optimizer(self, parameters: Any, lr: float) -> torch.optim.Optimizer:
        if self.kind == "sgd":
            return torch.optim.SGD(parameters, lr=lr, momentum=self.momentum)
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=self.weight_decay)


def class_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy [nats] of classes or of next tokens."""
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def binary_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean logistic loss [nats]."""
    return F.binary_cross_entropy_with_logits(model(batch[0]), batch[1])


def text(read: Callable[[], tuple[Tensor, Tensor]], length: int, size: int, held_out: int) -> Data:
    """Windows of a text at random places; evenly spaced windows for validation."""
    train, valid = read()
    places = torch.linspace(0, len(valid) - length - 1, held_out).long()

    def windows(codes: Tensor, starts: Tensor) -> Batch:
        cut = codes[starts[:, None] + torch.arange(length + 1)]
        return cut[:, :-1], cut[:, 1:]

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield windows(train, torch.randint(len(train) - length, (size,), generator=generator))

    return Data(batches, windows(valid, places))


def table(read: Callable[[], tuple[Batch, Batch]], size: int, held_out: int) -> Data:
    """Rows of a table in an order that is drawn anew for each pass; evenly spaced rows for validation."""
    (x, y), (x_valid, y_valid) = read()
    places = torch.linspace(0, len(y_valid) - 1, held_out).long()

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            for rows in torch.randperm(len(y), generator=generator).split(size)[: len(y) // size]:
                yield x[rows], y[rows]

    return Data(batches, (x_valid[places], y_valid[places]))


def warm_up_and_cosine(share: float) -> float:
    """Returns the rate over its peak: a straight line up for a tenth of the run, then half a cosine down to zero."""
    return share / 0.1 if share < 0.1 else 0.5 * (1 + math.cos(math.pi * (share - 0.1) / 0.9))


WORDS = 2000
"""Vocabulary of the word models; with a full vocabulary, the last layer would take most of the time."""

SHAKESPEARE = partial(text, sources.tiny_shakespeare, length=32, size=16, held_out=256)

PENN = partial(text, partial(sources.penn_treebank, WORDS), length=25, size=16, held_out=128)

WIKITEXT = partial(text, partial(sources.wikitext2, WORDS), length=32, size=16, held_out=128)

_CONSTANT = (
    Workload("lstm-ptb", lambda: WordLSTM(WORDS), PENN, class_loss, "sgd", safe_rate=0.5, published_step=5.0),
    Workload(
        "lstm-ptb-plain",
        model=lambda: WordLSTM(WORDS),
        data=PENN,
        loss_fn=class_loss,
        kind="sgd",
        safe_rate=5.0,
        published_step=5.0,
        momentum=0.0,
    ),
    Workload("lstm-ptb-adamw", lambda: WordLSTM(WORDS), PENN, class_loss, "adamw", safe_rate=0.002),
    Workload("gpt-shakespeare", lambda: GPT(65, 32), SHAKESPEARE, class_loss, "sgd", safe_rate=0.02),
    Workload("gpt-shakespeare-plain", lambda: GPT(65, 32), SHAKESPEARE, class_loss, "sgd", safe_rate=0.2, momentum=0.0),
    Workload("gpt-shakespeare-adamw", lambda: GPT(65, 32), SHAKESPEARE, class_loss, "adamw", safe_rate=0.002),
    Workload(
        "resnet-cifar",
        model=lambda: ResNet(8),
        data=lambda: table(sources.cifar10, size=32, held_out=500),
        loss_fn=class_loss,
        kind="sgd",
        safe_rate=0.02,
    ),
    Workload(
        "logistic-a9a",
        model=lambda: Logistic(123),
        data=lambda: table(sources.a9a, size=256, held_out=4000),
        loss_fn=binary_loss,
        kind="sgd",
        safe_rate=0.02,
    ),
    Workload("gpt-wikitext2", lambda: GPT(WORDS, 32), WIKITEXT, class_loss, "sgd", safe_rate=0.02),
    Workload("gpt-wikitext2-adamw", lambda: GPT(WORDS, 32), WIKITEXT, class_loss, "adamw", safe_rate=0.002),
)

_SCHEDULED = tuple(
    replace(workload, name=f"{workload.name}-cosine", shape=warm_up_and_cosine)
    for workload in _CONSTANT
    if workload.name in ("lstm-ptb", "gpt-shakespeare", "gpt-shakespeare-adamw")
)

SET_ASIDE = frozenset({"gpt-wikitext2", "gpt-wikitext2-adamw"})
"""Workloads that no rule is chosen on: they are run once, when the defaults are frozen."""

WORKLOADS = {workload.name: workload for workload in (*_CONSTANT, *_SCHEDULED)}
