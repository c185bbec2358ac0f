"""The small language model of the demo, its loss and its text: source files of Python's standard library."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WINDOW = 64
BATCH_SIZE = 32
MAX_CHARACTERS = 2_000_000
MAX_VOCABULARY = 128


class CharacterLSTM(nn.Module):
    """Predicts the next character from the characters before it.

    Args:
        vocabulary: Number of different characters.
        width: Hidden size of the LSTM.
        dropout: Share of hidden units dropped before the last layer.
    """

    def __init__(self, vocabulary: int, width: int = 128, dropout: float = 0.1) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 64)
        self.lstm = nn.LSTM(64, width, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, vocabulary)
        nn.init.uniform_(self.embed.weight, -0.1, 0.1)

    def forward(self, characters: Tensor) -> Tensor:
        """Returns logits, shape (batch, length, vocabulary), for characters of shape (batch, length)."""
        logits: Tensor = self.head(self.dropout(self.lstm(self.embed(characters))[0]))
        return logits


def next_character_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Returns the mean cross-entropy [nats per character] over windows of shape (batch, length + 1)."""
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


@dataclass(frozen=True)
class Corpus:
    """Text as character codes; the last tenth is held out."""

    codes: Tensor
    vocabulary: int

    @classmethod
    def from_text(cls, text: str) -> "Corpus":
        """Encodes a text; characters beyond the 127 most frequent ones share one code.

        Raises:
            ValueError: If the text is too short to cut windows from both parts.
        """
        if len(text) < 20 * WINDOW:
            raise ValueError(f"The text should have at least {20 * WINDOW} characters. Found {len(text)}.")
        frequent = [c for c, _ in Counter(text).most_common(MAX_VOCABULARY - 1)]
        code = {c: i for i, c in enumerate(sorted(frequent), start=1)}
        return cls(torch.tensor([code.get(c, 0) for c in text]), len(code) + 1)

    def batches(self, num: int, seed: int, device: torch.device) -> Iterator[Tensor]:
        """Yields random training windows, shape (batch, length + 1); the same seed yields the same windows."""
        train = self.codes[: len(self.codes) * 9 // 10]
        generator = torch.Generator().manual_seed(seed)
        for _ in range(num):
            starts = torch.randint(len(train) - WINDOW, (BATCH_SIZE,), generator=generator)
            yield torch.stack([train[i : i + WINDOW + 1] for i in starts]).to(device)

    def held_out(self, device: torch.device) -> Tensor:
        """Returns up to 512 windows of the last tenth, shape (windows, length + 1)."""
        rest = self.codes[len(self.codes) * 9 // 10 :]
        return rest.unfold(0, WINDOW + 1, WINDOW)[:512].to(device)


def standard_library_text() -> str:
    """Returns source files of the running Python's standard library, in alphabetical order.

    Raises:
        FileNotFoundError: If the library is not installed as source files.
    """
    folder = Path(os.__file__).parent
    files = sorted(folder.glob("*.py"))
    if not files:
        raise FileNotFoundError(f"There are no Python sources in `{folder}`. Pass a text of your own with --text FILE.")
    return "".join(file.read_text(encoding="utf-8", errors="replace") for file in files)[:MAX_CHARACTERS]
