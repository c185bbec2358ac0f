"""Gradient norm against smoothness of an LSTM on Penn Treebank, after figures 1 and 2 of Zhang et al. 2019, four ways.

SMOOTHDIAG_DATA=DATA python benchmarks/reproduce/zhang2019_lstm.py             # the quick runs that are missing
SMOOTHDIAG_DATA=DATA python benchmarks/reproduce/zhang2019_lstm.py --report    # tables and figure of the page

Settings are those of the released code, github.com/JingzhaoZhang/why-clipping-accelerates at commit ee240ae, and of the
captions of figure 2: two layers, the same matrix at both ends, no dropout, penalties on the outputs of the last layer,
pieces of random length with a rate in proportion, two passes, a row at every step.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import others_path  # noqa: F401
import sources
import torch
from experiment import Experiment, Place, Size, main
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from zhang_figure import FIGURE, figure
from zhang_judged import judged, tables
from zhang_ways import Ways, trace_of

ACTIVATION, SLOWNESS = 2.0, 1.0
"""Weights of the penalties."""

VOCABULARY = 10_000

Piece = tuple[int, int]
"""First row and number of rows."""

State = tuple[Tensor, ...]


@dataclass(frozen=True)
class Scale:
    """Sizes: of the network, and of the text in rows and columns of words; ``length`` is the usual one of a piece."""

    vocabulary: int
    width: int
    hidden: int
    columns: int
    length: int
    rows: int
    seeds: int


SCALES: Mapping[Size, Scale] = {
    "quick": Scale(vocabulary=1000, width=50, hidden=128, columns=40, length=18, rows=908, seeds=2),
    "full": Scale(vocabulary=VOCABULARY, width=200, hidden=512, columns=256, length=70, rows=3631, seeds=5),
}
"""The released sizes; and a quarter of them, with a sixth of the columns and a tenth of the words. Both have some 53
steps in a pass over the text, and some 6 pieces in a tenth of it."""

RADIUS = 1e-3

HESSIAN_EVERY = 6
"""Rows from one Hessian norm to the next."""


@dataclass(frozen=True)
class Case:
    """A run.

    Attributes:
        name: Key of its results.
        lr: Rate for pieces of the usual length.
        max_norm: Threshold; infinite without clipping.
        passes: Passes over the text; the released command makes two.
        every: Steps from one row to the next.
    """

    name: str
    lr: float
    max_norm: float
    passes: int = 2
    every: int = 1


CASES = (
    Case("LSTM, lr 30, clipped at .25", 30.0, 0.25),
    Case("LSTM, lr 2, not clipped", 2.0, math.inf),
    Case("LSTM, lr 2, clipped at .25", 2.0, 0.25),
    Case("LSTM, lr 30, clipped at .25, 8 passes", 30.0, 0.25, passes=8, every=8),
)


class WordLSTM(nn.Module):
    """Two recurrent layers of which the second has the width of the words, with the same matrix at both ends."""

    def __init__(self, vocabulary: int, width: int, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.first, self.second = nn.LSTM(width, hidden), nn.LSTM(hidden, width)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        nn.init.uniform_(self.embed.weight, -0.1, 0.1)

    def fresh(self, columns: int) -> State:
        sizes = (self.first.hidden_size,) * 2 + (self.second.hidden_size,) * 2
        return tuple(self.bias.new_zeros(1, columns, size) for size in sizes)

    def forward(self, words: Tensor, state: State) -> tuple[Tensor, State]:
        """Returns the outputs of the last layer, shape (rows, columns, width), and the state after them."""
        found, first = self.first(self.embed(words), state[:2])
        found, second = self.second(found, state[2:])
        return found, (*first, *second)


def loss_and_state(model: WordLSTM, words: Tensor, next_words: Tensor, state: State) -> tuple[Tensor, State]:
    """Mean cross-entropy [nats] and penalties: on squares of the outputs, and of their changes from word to word."""
    found, state = model(words, state)
    loss = F.cross_entropy(F.linear(found, model.embed.weight, model.bias).flatten(0, 1), next_words.flatten())
    loss = loss + ACTIVATION * found.square().mean() + SLOWNESS * found.diff(dim=0).square().mean()
    return loss, tuple(part.detach() for part in state)


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    words, next_words, *state = batch
    assert isinstance(model, WordLSTM)
    return loss_and_state(model, words, next_words, tuple(state))[0]


def pieces(limit: float, rows: int, usual: int, random: np.random.Generator) -> list[Piece]:
    """Cuts a text from its begin until ``limit``, as the released code does: the last piece goes beyond.

    A piece has about the usual length, and one in twenty half of it; 70 rows scatter by 5 and are at least 5.
    """
    found, begin, scatter = list[Piece](), 0, usual / 14
    while begin < limit and begin < rows - 2:
        mean = usual if random.random() < 0.95 else usual / 2
        length = max(round(scatter), 2, int(random.normal(mean, scatter)))
        found.append((begin, min(length, rows - 1 - begin)))
        begin += length
    return found


def folded(codes: Tensor, vocabulary: int) -> Tensor:
    """Returns the codes of fewer words: one half keep theirs, and all rarer words share the other half.

    One code for all rare words would be a quarter of the text. The curvature along its bias would be several times that
    of the most frequent word, so that the published rate would overshoot.
    """
    half = vocabulary // 2
    return codes if vocabulary >= VOCABULARY else torch.where(codes < half, codes, half + codes % half)


def entropy(codes: Tensor) -> float:
    """Cross-entropy [nats] of a model that knows nothing but how frequent each word is."""
    shares = torch.bincount(codes).double() / len(codes)
    return float(-torch.xlogy(shares, shares).sum())


def in_columns(codes: Tensor, columns: int) -> Tensor:
    """Returns a text in columns of consecutive words, shape (rows, columns); what is left over is left out."""
    rows = len(codes) // columns
    return codes[: rows * columns].view(columns, rows).t().contiguous()


def batch_of(text: Tensor, piece: Piece, state: State) -> tuple[Tensor, ...]:
    begin, length = piece
    return text[begin : begin + length], text[begin + 1 : begin + 1 + length], *state


def texts(scale: Scale) -> tuple[Tensor, Tensor]:
    """Returns the texts to train on and to hold out; of the second, one piece."""
    train, valid = (folded(codes, scale.vocabulary) for codes in sources.penn_treebank(VOCABULARY))
    return train[: scale.rows * scale.columns], valid[: (scale.length + 1) * scale.columns]


def train(case: Case, scale: Scale, seed: int, place: Place, path: Path) -> None:
    """Trains and measures a run; writes its trace to the path, unless the run is dry."""
    torch.manual_seed(seed)
    random, measuring = np.random.default_rng(seed), np.random.default_rng(1000 + seed)
    train_codes, valid_codes = texts(scale)
    text = in_columns(train_codes, scale.columns).to(place.device)
    valid = in_columns(valid_codes, scale.columns).to(place.device)
    model = WordLSTM(scale.vocabulary, scale.width, scale.hidden).to(place.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=case.lr)
    fresh = model.fresh(scale.columns)

    def losses(cut: list[Piece]) -> Iterator[Tensor]:
        state = fresh
        for piece in cut:
            words, next_words, *_ = batch_of(text, piece, state)
            loss, state = loss_and_state(model, words, next_words, state)
            yield loss

    def cuts() -> tuple[list[Piece], list[Piece]]:
        first, second = (pieces(len(text) / 10, len(text), scale.length, measuring) for _ in range(2))
        return first, second

    ways = Ways(
        model,
        optimizer,
        loss_fn,
        [batch_of(valid, (0, scale.length), fresh)],
        losses,
        cuts,
        radius=RADIUS,
        every=case.every,
        hessian_every=HESSIAN_EVERY * case.every,
        path=None if place.dry else path,
    )
    for _ in range(1 if place.dry else case.passes):
        state, in_pass = fresh, pieces(len(text), len(text), scale.length, random)
        for piece in in_pass[: place.steps(len(in_pass))]:
            optimizer.param_groups[0]["lr"] = case.lr * piece[1] / scale.length
            batch = batch_of(text, piece, state)
            ways.observe(batch)
            optimizer.zero_grad()
            loss, state = loss_and_state(model, batch[0], batch[1], batch[2:])
            loss.backward()
            ways.before(loss.item())
            if case.max_norm < math.inf:
                clip_grad_norm_(model.parameters(), case.max_norm)
            optimizer.step()
            ways.after()
    ways.close()


def scale_of(place: Place) -> Scale:
    """Returns the sizes; a dry run has one seed and two columns of text."""
    scale = SCALES[place.size]
    return replace(scale, columns=2, seeds=1) if place.dry else scale


def run(case: Case, place: Place) -> Mapping[str, Any]:
    scale = scale_of(place)
    paths = [trace_of(place.traces, case.name, seed) for seed in range(scale.seeds)]
    for seed, path in enumerate(paths):
        train(case, scale, seed, place, path)
    return {} if place.dry else judged(paths) | {"entropy": entropy(texts(scale)[0])}


def cases(size: Size) -> Mapping[str, Case]:
    return {case.name: case for case in CASES}


EXPERIMENT = Experiment(
    name="zhang2019_lstm",
    cases=cases,
    run=run,
    tables=tables,
    page="docs/reproduce/zhang2019.md",
    draw={FIGURE: figure},
)

if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
