"""Batches to train on and to validate with, from texts, tables and what is drawn."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import further
import sources
import torch
from torch import Tensor

Batch = Any


@dataclass(frozen=True)
class Data:
    """Batches to train on and to validate with.

    Attributes:
        batches: Endless batches for a seed; the same seed gives the same batches.
        validation: One batch that is never trained on.
    """

    batches: Callable[[int], Iterator[Batch]]
    validation: Batch


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


def drawn(draw: Callable[[int, int], Any], size: int, held_out: int) -> Data:
    """Batches that are drawn anew each time: ``draw(number, seed)`` returns a tensor, or inputs and targets."""

    def batch(number: int, seed: int) -> Batch:
        found = draw(number, seed)
        return found if isinstance(found, tuple) else (found,)

    def batches(seed: int) -> Iterator[Batch]:
        return (batch(size, 1_000_003 * (seed + 1) + k) for k in itertools.count())

    return Data(batches, batch(held_out, 1))


def pairs(vocabulary: int, size: int = 256, held_out: int = 2048, negatives: int = 5) -> Data:
    """A word, another within two places of it, and drawn words."""
    train, valid = sources.penn_treebank(vocabulary)

    def draw(words: Tensor, number: int, generator: torch.Generator) -> Batch:
        places = torch.randint(2, len(words) - 2, (number,), generator=generator)
        offset = torch.randint(4, (number,), generator=generator)
        near = words[places + torch.tensor([-2, -1, 1, 2])[offset]]
        others = words[torch.randint(len(words), (number, negatives), generator=generator)]
        return (torch.cat([words[places][:, None], near[:, None], others], dim=1),)

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield draw(train, size, generator)

    return Data(batches, draw(valid, held_out, torch.Generator().manual_seed(0)))


def masked(vocabulary: int, length: int, size: int = 16, held_out: int = 128) -> Data:
    """Windows of a text in which words are hidden."""
    train, valid = sources.penn_treebank(vocabulary)

    def batches(seed: int) -> Iterator[Batch]:
        seeds = (1_000_003 * (seed + 1) + k for k in itertools.count())
        return ((further.hidden_words(train, size, each, vocabulary, length),) for each in seeds)

    return Data(batches, (further.hidden_words(valid, held_out, 0, vocabulary, length),))
