"""What is scanned: networks at initialisation, early and late in training, and landscapes whose law is known."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import smoothdiag as sd

sys.path.insert(1, str(Path(__file__).parents[1] / "autoclip"))

from batching import Data
from images import layers
from tasks import CIFAR, TASKS, class_loss
from workloads import safe_rates

STAGES = (0, 50, 400)
"""Steps of training after which a network is scanned."""

MOMENTUM = 0.9


@dataclass(frozen=True)
class Subject:
    """What is trained and scanned.

    Attributes:
        model: Makes the model; initial weights come from torch's global generator.
        loss_fn: Mean loss of a batch.
        data: Batches to train on, and held-out examples.
        rate: Learning rate of SGD with momentum .9.
        law: Verdict that a scan should have, where the law is known.
    """

    model: Callable[[], nn.Module]
    loss_fn: Callable[[nn.Module, Any], Tensor]
    data: Callable[[], Data]
    rate: float
    law: str = ""


def task(name: str) -> Subject:
    """Returns a task of benchmarks/autoclip at its safe rate: a quarter of the rate that ends best unclipped."""
    of = TASKS[name]
    return Subject(of.model, of.loss_fn, of.data, safe_rates()[f"{name}/momentum"])


def perceptron(activation: type[nn.Module]) -> nn.Module:
    """Two hidden layers of 64 units for images of 16 x 16 pixels."""
    return nn.Sequential(nn.Flatten(), *layers(3 * 16 * 16, 64, 64, 10, activation=activation))


class Landscape(nn.Module):
    """A function of known smoothness; its 20 coordinates are spread over five tensors, so that lines can move one."""

    def __init__(self, problem: sd.problems.Problem, radius: float) -> None:
        super().__init__()
        start = torch.randn(4, 5, dtype=torch.float64)
        start *= radius / start.norm()
        self.problem, self.parts = problem, nn.ParameterList(start.unbind(1))

    def forward(self) -> Tensor:
        value: Tensor = self.problem.value(torch.stack(list(self.parts), dim=1).flatten())
        return value


class Regression(nn.Module):
    """Linear regression on features of unequal size, in five tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(4, 1, bias=False, dtype=torch.float64) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        values: list[Tensor] = [part(each) for part, each in zip(self.parts, x.chunk(5, 1), strict=True)]
        return torch.stack(values).sum(0)


def _landscape(problem: sd.problems.Problem, radius: float, rate: float, law: str) -> Subject:
    return Subject(lambda: Landscape(problem, radius), lambda model, _: model(), lambda: _single(None), rate, law=law)


def _single(batch: Any) -> Data:
    def batches(seed: int) -> Iterator[Any]:
        while True:
            yield batch

    return Data(batches, batch)


def _regression() -> Data:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 20, generator=generator, dtype=torch.float64) * torch.logspace(-1, 0.5, 20)
    return _single((x, torch.randn(64, 1, generator=generator, dtype=torch.float64)))


def _squared(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    loss: Tensor = (model(batch[0]) - batch[1]).square().mean()
    return loss


_SPECTRUM = torch.logspace(-3, 0, 20).tolist()

NETS = {
    "LSTM": task("lstm-ptb"),
    "GPT": task("gpt-shakespeare"),
    "ViT": task("vit-cifar"),
    "ResNet": task("resnet-cifar"),
    "MLP, ReLU": Subject(partial(perceptron, nn.ReLU), class_loss, CIFAR, 0.01),
    "MLP, GELU": Subject(partial(perceptron, nn.GELU), class_loss, CIFAR, 0.01),
    "logistic": task("logistic-a9a"),
}
"""Recurrent and attending networks on text, networks on images with and without normalisation, and a convex loss."""

KNOWN = {
    "quadratic": _landscape(sd.problems.quadratic(_SPECTRUM), 3.0, 0.1, "CONSTANT"),
    "regression": Subject(Regression, _squared, _regression, 0.005, law="CONSTANT"),
    "exponential": _landscape(sd.problems.exponential(0.7, 2.0, 20), 3.0, 1e-4, "L0L1"),
    "cubic": _landscape(sd.problems.power(3.0, dim=20), 3.0, 1e-4, "POWER"),
}
"""Landscapes whose law is known: what the instrument says where the answer is certain."""

SUBJECTS = NETS | KNOWN


@dataclass(frozen=True)
class Checkpoint:
    """A network or landscape after some steps of training from a seed, scanned on ``times`` as many examples."""

    subject: str
    stage: int
    seed: int
    times: int = 1


@cache
def data_of(subject: str) -> Data:
    return SUBJECTS[subject].data()


def moved(batch: Any, device: torch.device) -> Any:
    return batch if batch is None else tuple(part.to(device) for part in batch)


def trained(checkpoint: Checkpoint, steps: int, device: torch.device) -> nn.Module:
    """Returns the model after some steps of SGD with momentum; batches and weights come from the seed alone."""
    subject, data = SUBJECTS[checkpoint.subject], data_of(checkpoint.subject)
    torch.manual_seed(checkpoint.seed)
    model = subject.model().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=subject.rate, momentum=MOMENTUM)
    batches = data.batches(checkpoint.seed)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(subject.loss_fn(model, moved(next(batches), device)))
        optimizer.step()
    return model


def held_out(checkpoint: Checkpoint, device: torch.device) -> Any:
    """Returns as many held-out examples as a training batch has, or more; landscapes have one batch for everything."""
    data = data_of(checkpoint.subject)
    if checkpoint.subject in KNOWN:
        return moved(data.validation, device)
    number = checkpoint.times * len(next(data.batches(0))[0])
    drawn = torch.randperm(len(data.validation[0]), generator=torch.Generator().manual_seed(1000 + checkpoint.seed))
    return moved(tuple(part[drawn[:number]] for part in data.validation), device)
