"""A GPT and an LSTM of 100,000 parameters on text, with one layer that may compute in a narrow dtype."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import on_path  # noqa: F401
import sources
import torch
from batching import Data, text
from nets import GPT, Block, Recurrent
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = -100
"""Target that counts in no loss; torch's own."""

WORDS = 1000


class Narrow(nn.Module):
    """A product with a matrix, in a narrow dtype if one is set.

    The input is multiplied by ``gain`` and the output is divided by it; ``shift`` is added to the product and taken
    away again. Neither changes anything in exact arithmetic.
    """

    gain: Tensor
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.dtype: torch.dtype | None = None
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.dtype is None:
            return F.linear(x, weight)
        with torch.autocast(x.device.type, self.dtype):
            y = F.linear(x * self.gain, weight) + self.shift
        return (y.float() - self.shift) / self.gain


class MaskedBlock(Block):
    """A block whose attention takes a mask (True: seen), and whose last product may be narrow."""

    mask: Tensor | None = None

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.narrow = Narrow()

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, is_causal=self.mask is None)
        return self.out(found.transpose(1, 2).flatten(2))

    def think(self, x: Tensor) -> Tensor:
        return self.narrow(F.gelu(self.up(x)), self.down.weight) + self.down.bias


class TextGPT(GPT):
    """The small GPT of the benchmark of AutoClip, with a mask as an argument."""

    def __init__(self, vocabulary: int, context: int, width: int = 64) -> None:
        super().__init__(vocabulary, context, width)
        blocks = [MaskedBlock(width, heads=4) for _ in self.blocks]
        for new, old in zip(blocks, self.blocks, strict=True):
            new.load_state_dict(old.state_dict(), strict=False)
        self.blocks = nn.Sequential(*blocks)
        self.last = Narrow()

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            block.mask = mask
            x = block(x)
        return self.last(self.norm(x), self.head.weight)

    @property
    def inner(self) -> Narrow:
        return self.blocks[-1].narrow


class TextLSTM(Recurrent):
    """The LSTM of the benchmark of AutoClip, with a matrix between cells and words."""

    def __init__(self, vocabulary: int, width: int = 64) -> None:
        super().__init__(vocabulary, width=width)
        self.between = nn.Linear(width, width)
        self.inner, self.last = Narrow(), Narrow()

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.inner(self.cells(self.embed(tokens))[0], self.between.weight) + self.between.bias
        return self.last(hidden, self.embed.weight) + self.bias


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    """Mean cross-entropy [nats] of the next tokens; a batch is inputs, targets and, for the GPT, perhaps a mask."""
    inputs, targets, *mask = batch
    return F.cross_entropy(model(inputs, *mask).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


@dataclass(frozen=True)
class Text:
    """A model with its data.

    Attributes:
        model: Makes the network; initial weights come from torch's global generator.
        data: Reads the data.
        vocabulary: Number of tokens.
        rates: Rate of each optimizer, near the largest that trains without spikes.
    """

    model: Callable[[], nn.Module]
    data: Callable[[], Data]
    vocabulary: int
    rates: dict[str, float]


TEXTS = {
    "gpt": Text(
        lambda: TextGPT(65, 32),
        cache(partial(text, sources.tiny_shakespeare, length=32, size=16, held_out=256)),
        vocabulary=65,
        rates={"adamw": 0.009, "momentum": 0.2},
    ),
    "lstm": Text(
        lambda: TextLSTM(WORDS),
        cache(partial(text, partial(sources.penn_treebank, WORDS), length=25, size=32, held_out=128)),
        vocabulary=WORDS,
        rates={"adamw": 0.06, "momentum": 1.0},
    ),
}
