"""Small networks without biases on fixed data sets, for runs at the edge of stability, and a quadratic as a control."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from experiment import ROOT
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(1, str(ROOT / "benchmarks"))
sys.path.insert(1, str(ROOT / "benchmarks" / "autoclip"))

import sources
from nets import GPT
from stability import squared_error

Batch = tuple[Tensor, Tensor]

QUADRATIC = (4.0, 2.0, 1.0, 0.5, 0.25, 0.1)
"""Eigenvalues of both matrices of the quadratic."""


@dataclass(frozen=True)
class Net:
    """What is trained.

    Attributes:
        name: Its name in tables.
        model: Makes the network; its weights come from torch's global generator.
        data: Reads all examples that it is trained on.
        loss_fn: Mean loss of a batch.
    """

    name: str
    model: Callable[[], nn.Module]
    data: Callable[[], Batch]
    loss_fn: Callable[[nn.Module, Batch], Tensor]


class Bowl(nn.Module):
    """f(W) = <W, A W A> / 2 for a square matrix W and a diagonal A: curvature that training cannot change."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(len(QUADRATIC), len(QUADRATIC)))
        self.scales: Tensor
        self.register_buffer("scales", torch.tensor(QUADRATIC))

    def forward(self) -> Tensor:
        return (self.scales[:, None] * self.weight.square() * self.scales).sum() / 2


def perceptron(width: int) -> nn.Module:
    """Two hidden layers of tanh units on images of 8 x 8 pixels in three colours."""
    layers = (nn.Linear(192, width, bias=False), nn.Linear(width, width, bias=False), nn.Linear(width, 10, bias=False))
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


def transformer(width: int, context: int) -> nn.Module:
    """A GPT of one block whose gains and biases stay as they are, so that only matrices are trained."""
    model = GPT(65, context, width=width, layers=1, heads=2)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() == 2)
    return model


def images(number: int) -> Batch:
    """Returns images of CIFAR-10, evenly spaced over the classes, and one-hot classes."""
    (x, y), _ = sources.cifar10(8)
    chosen = torch.linspace(0, len(y) - 1, number).long()
    return x[chosen].flatten(1), F.one_hot(y[chosen], 10).float()


def passages(number: int, length: int) -> Batch:
    """Returns evenly spaced windows of Tiny Shakespeare, and the characters that follow."""
    train, _ = sources.tiny_shakespeare()
    starts = torch.linspace(0, len(train) - length - 1, number).long()
    cut = train[starts[:, None] + torch.arange(length + 1)]
    return cut[:, :-1], cut[:, 1:]


def next_character(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy [nats]."""
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def own_value(model: nn.Module, batch: Any) -> Tensor:
    """The value of a landscape, whatever the batch."""
    value: Tensor = model()
    return value


NETS = {
    "quick": {
        "MLP": Net("MLP, CIFAR-10", lambda: perceptron(32), lambda: images(500), squared_error),
        "GPT": Net("GPT, Shakespeare", lambda: transformer(32, 16), lambda: passages(32, 16), next_character),
    },
    "full": {
        "MLP": Net("MLP, CIFAR-10", lambda: perceptron(200), lambda: images(5000), squared_error),
        "GPT": Net("GPT, Shakespeare", lambda: transformer(128, 64), lambda: passages(512, 64), next_character),
    },
}
BOWL = Net("quadratic", Bowl, lambda: (torch.zeros(1), torch.zeros(1)), own_value)
