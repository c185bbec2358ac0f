"""Networks that the benchmarks train, each with a loss and a batch.

Costs do not depend on data, so the data of ``TASKS`` are noise. Curvature depends on data, so the data of ``LEARNABLE``
and ``LARGE`` contain something to learn.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smoothdiag.demo import BATCH_SIZE, WINDOW, CharacterLSTM, next_character_loss

VOCABULARY = 65
CLASSES = 10


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for _ in range(2))
        self.stride, self.added = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[1](self.second(F.relu(self.norms[0](self.first(x)))))
        # The shortcut without parameters: every other pixel, and channels of zeros.
        return F.relu(y + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added)))


class ResNet20(nn.Sequential):
    """The residual network for 32 x 32 images of He, Zhang, Ren, Sun 2016, with 20 layers and 0.27 million weights."""

    def __init__(self, blocks: int = 3) -> None:
        widths = [16] * (blocks + 1) + [32] * blocks + [64] * blocks
        pairs = itertools.pairwise(widths)
        super().__init__(
            nn.Conv2d(3, 16, 3, 1, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            *(Residual(a, b, 1 if a == b else 2) for a, b in pairs),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, CLASSES),
        )


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(inputs, width, 1, bias=False), nn.Conv2d(width, 4 * width, 1, bias=False)
        self.middle = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (width, width, 4 * width))
        self.shortcut = nn.Sequential()
        if inputs != 4 * width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[1](self.middle(F.relu(self.norms[0](self.first(x))))))
        return F.relu(self.norms[2](self.last(y)) + self.shortcut(x))


class ResNet50(nn.Sequential):
    """The residual network for photographs of He, Zhang, Ren, Sun 2016, strides in the middle; 25.6 million weights."""

    def __init__(self, width: int = 64, blocks: tuple[int, ...] = (3, 4, 6, 3), classes: int = 1000) -> None:
        layers, inputs = list[nn.Module](), width
        for stage, number in enumerate(blocks):
            for i in range(number):
                layers.append(Bottleneck(inputs, width << stage, 2 if stage and not i else 1))
                inputs = 4 * width << stage
        super().__init__(
            nn.Conv2d(3, width, 7, 2, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
            *layers,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(inputs, classes),
        )


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    """A decoder with normalisation before each part and one matrix for both ends; a small one by default."""

    def __init__(
        self, layers: int = 4, width: int = 128, heads: int = 4, length: int = 128, vocabulary: int = VOCABULARY
    ) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(x) + self.places)))


class LSTM(nn.Module):
    """Two recurrent layers of 200 units, the size of the small model of Zaremba, Sutskever, Vinyals 2014."""

    def __init__(self, width: int = 200) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(x))[0])


def labelled_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def autocast_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    with torch.autocast(batch[0].device.type, torch.bfloat16):
        return labelled_loss(model, batch)


@dataclass(frozen=True)
class Task:
    build: Callable[[], nn.Module]
    loss_fn: Callable[[nn.Module, Any], Tensor]
    batch: Callable[[torch.device], Any]
    lr: float


def _tokens(batch: int, length: int) -> Callable[[torch.device], Tensor]:
    return lambda device: torch.randint(VOCABULARY, (batch, length + 1)).to(device)


def _images(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.randn(64, 3, 32, 32).to(device), torch.randint(CLASSES, (64,)).to(device)


TASKS = {
    "LSTM of the demo": Task(
        lambda: CharacterLSTM(VOCABULARY), next_character_loss, _tokens(BATCH_SIZE, WINDOW), lr=1.0
    ),
    "ResNet-20": Task(ResNet20, labelled_loss, _images, lr=0.1),
    "GPT": Task(GPT, next_character_loss, _tokens(8, 128), lr=0.1),
}


def _learnable_images(batch: int = 64, size: int = 32) -> Callable[[torch.device], Any]:
    """Images of ten classes: one pattern each, the same for all seeds, under noise."""
    patterns = torch.randn(CLASSES, 3, size, size, generator=torch.Generator().manual_seed(0))

    def draw(device: torch.device) -> tuple[Tensor, Tensor]:
        labels = torch.randint(CLASSES, (batch,))
        return (patterns[labels] + 2 * torch.randn(batch, 3, size, size)).to(device), labels.to(device)

    return draw


def _learnable_tokens(batch: int, length: int, vocabulary: int = VOCABULARY) -> Callable[[torch.device], Any]:
    """Tokens as frequent as words (Zipf); half of them follow from the token before; labels are flat."""
    frequencies = 1 / torch.arange(1.0, vocabulary + 1)

    def draw(device: torch.device) -> tuple[Tensor, Tensor]:
        tokens = torch.multinomial(frequencies.expand(batch, -1), length + 1, replacement=True)
        follows = torch.rand(batch, length) < 0.5
        for t in range(length):
            tokens[:, t + 1] = torch.where(follows[:, t], (5 * tokens[:, t] + 3) % vocabulary, tokens[:, t + 1])
        return tokens[:, :-1].to(device), tokens[:, 1:].flatten().to(device)

    return draw


def _flat(model: nn.Module) -> nn.Module:
    """Returns the model with one row of logits per token, as losses of other libraries expect."""
    return nn.Sequential(model, nn.Flatten(0, 1))


LEARNABLE = {  # at rates well below 2 over the sharpness: at the edge of stability eigenvectors turn with every step
    "ResNet-20": Task(ResNet20, labelled_loss, _learnable_images(), lr=0.03),
    "GPT": Task(lambda: _flat(GPT()), labelled_loss, _learnable_tokens(8, 128), lr=0.01),
    "LSTM": Task(lambda: _flat(LSTM()), labelled_loss, _learnable_tokens(20, 35), lr=0.3),
}
LARGE = {
    "ResNet-50": Task(ResNet50, labelled_loss, _learnable_images(32, 224), lr=0.1),
    "GPT of 124M": Task(
        lambda: _flat(GPT(12, 768, 12, 1024, 50304)), autocast_loss, _learnable_tokens(4, 1024, 50304), lr=0.1
    ),
}
TINY = {
    "ResNet-50": Task(lambda: ResNet50(4, (1, 1, 1, 1)), labelled_loss, _learnable_images(4, 32), lr=0.1),
    "GPT of 124M": Task(lambda: _flat(GPT(1, 16, 2, 16, 50)), autocast_loss, _learnable_tokens(2, 16, 50), lr=0.1),
}
