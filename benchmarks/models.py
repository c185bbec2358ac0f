"""Networks that the benchmarks train, each with a loss and a batch; data are random, costs do not depend on them."""

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
    """A small decoder with normalisation before each part and one matrix for both ends."""

    def __init__(self, layers: int = 4, width: int = 128, heads: int = 4, length: int = 128) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, width), nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(x) + self.places)))


def image_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


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
    "ResNet-20": Task(ResNet20, image_loss, _images, lr=0.1),
    "GPT": Task(GPT, next_character_loss, _tokens(8, 128), lr=0.1),
}
