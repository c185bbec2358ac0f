"""Networks on real data at initialisation, early and late in training: where scans are tried."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(1, str(Path(__file__).parents[1] / "autoclip"))

import sources
from nets import Block
from workloads import WORKLOADS, Data, Workload, class_loss, table

STAGES = (0, 50, 400)
"""Steps of training after which a network is scanned."""


class Perceptron(nn.Sequential):
    """Two hidden layers with GELU."""

    def __init__(self, inputs: int, width: int = 64, classes: int = 10) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(inputs, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, classes),
        )


class VisionTransformer(nn.Module):
    """Patches of 4 x 4 pixels, two blocks of attention among all of them, and the mean over patches."""

    def __init__(self, pixels: int = 16, width: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.places = nn.Parameter(0.02 * torch.randn((pixels // 4) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, 4, causal=False) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.norm(self.blocks(patches)).mean(1))


def _cifar() -> Data:
    return table(sources.cifar10, size=64, held_out=500)


NETS = {
    "LSTM": WORKLOADS["lstm-ptb-plain"],
    "GPT": WORKLOADS["gpt-shakespeare"],
    "ResNet": WORKLOADS["resnet-cifar"],
    "ViT": Workload("vit-cifar", VisionTransformer, _cifar, class_loss, "sgd", safe_rate=0.01),
    "MLP": Workload("mlp-cifar", lambda: Perceptron(3 * 16 * 16), _cifar, class_loss, "sgd", safe_rate=0.01),
    "logistic": WORKLOADS["logistic-a9a"],
}
"""Recurrent and attending networks on text, networks on images with and without normalisation, and a convex loss."""


@dataclass(frozen=True)
class Checkpoint:
    """A network after some steps of training, and a batch to scan it on."""

    net: str
    stage: int
    seed: int
    batch: int


def cases(nets: list[str], stages: list[int], seeds: list[int], batches: list[int]) -> Iterator[Checkpoint]:
    for net in nets:
        for seed in seeds:
            for stage in stages:
                for batch in batches:
                    yield Checkpoint(net, stage, seed, batch)


@cache
def data_of(net: str) -> Data:
    return NETS[net].data()


def restored(checkpoint: Checkpoint) -> tuple[nn.Module, Any]:
    """Returns the network, trained from its seed, and a batch that no training step has seen."""
    workload, data = NETS[checkpoint.net], data_of(checkpoint.net)
    torch.manual_seed(checkpoint.seed)
    model = workload.model()
    optimizer = workload.optimizer(model.parameters(), workload.safe_rate)
    batches = data.batches(checkpoint.seed)
    for _ in range(checkpoint.stage):
        optimizer.zero_grad()
        workload.loss_fn(model, next(batches)).backward()
        optimizer.step()
    return model, next(data.batches(1000 + checkpoint.batch))
