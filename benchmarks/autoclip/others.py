"""Networks that are neither for text nor for images, and their data, which are drawn and not read."""

import math

import torch
from images import layers
from torch import Tensor, nn
from torch.nn import functional as F


class Logistic(nn.Linear):
    """Logistic regression: the logarithm of the odds of label 1."""

    def __init__(self, features: int) -> None:
        super().__init__(features, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze(-1)


class Sine(nn.Module):
    def __init__(self, speed: float) -> None:
        super().__init__()
        self.speed = speed

    def forward(self, x: Tensor) -> Tensor:
        return (self.speed * x).sin()


class Field(nn.Sequential):
    """Colour as a function of the place, by sine units. Source: Sitzmann et al. 2020 (NeurIPS), with speed 15."""

    def __init__(self, width: int = 64, speed: float = 15.0) -> None:
        first, second, last = nn.Linear(2, width), nn.Linear(width, width), nn.Linear(width, 3)
        nn.init.uniform_(first.weight, -1 / 2, 1 / 2)
        for layer in (second, last):
            bound = math.sqrt(6 / width) / speed
            nn.init.uniform_(layer.weight, -bound, bound)
        super().__init__(first, Sine(speed), second, Sine(speed), last)


class Poisson(nn.Module):
    """Solves u'' = f on [0, 1] with u = 0 at both ends; the output is the mean squared residual.

    Source: Raissi, Perdikaris, Karniadakis 2019, physics-informed networks. The right side is that of
    u = sin(2 pi x) + sin(6 pi x) / 4.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers(1, width, width, 1, activation=nn.Tanh))

    def forward(self, x: Tensor) -> Tensor:
        def solution(x: Tensor) -> Tensor:
            return (x * (1 - x) * self.body(x[None]).squeeze(0)).squeeze(-1)

        bend = torch.func.vmap(torch.func.hessian(solution))(x).flatten()
        two, six = 2 * torch.pi, 6 * torch.pi
        side = -(two**2) * (two * x).sin() - six**2 / 4 * (six * x).sin()
        return (bend - side.flatten()).square().mean() / 1000


class Flow(nn.Module):
    """A normalising flow of six affine couplings; the output is minus the log likelihood. Source: Dinh et al. 2017."""

    def __init__(self, width: int = 32, couplings: int = 6) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Sequential(*layers(1, width, width, 2)) for _ in range(couplings))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        stretched = torch.zeros_like(a)
        for part in self.parts:
            scale, shift = part(a).chunk(2, dim=1)
            a, b = b * scale.tanh().exp() + shift, a
            stretched = stretched + scale.tanh()
        return ((a.square() + b.square()) / 2 - stretched).mean() + math.log(2 * torch.pi)


class Graph(nn.Module):
    """Two layers that average over neighbours. Source: Kipf and Welling 2017, with the sum of a drawn subgraph."""

    def __init__(self, features: int, classes: int, width: int = 32) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(features, width), nn.Linear(width, classes)

    def forward(self, batch: Tensor) -> Tensor:
        links, x = batch.split([batch.shape[1], batch.shape[2] - batch.shape[1]], dim=2)
        return self.second(links @ F.relu(self.first(links @ x)))


class Pairs(nn.Module):
    """Says which word stands near another, among drawn ones. Source: Mikolov et al. 2013, skip-gram."""

    def __init__(self, vocabulary: int, width: int = 48) -> None:
        super().__init__()
        self.inner, self.outer = nn.Embedding(vocabulary, width), nn.Embedding(vocabulary, width)
        nn.init.uniform_(self.inner.weight, -0.5 / width, 0.5 / width)
        nn.init.zeros_(self.outer.weight)

    def forward(self, words: Tensor) -> Tensor:
        centre = self.inner(words[:, 0])
        logits = torch.einsum("bw,bkw->bk", centre, self.outer(words[:, 1:]))
        # The second word of a row was near the first, the others were drawn.
        return F.softplus(-logits[:, 0]).mean() + F.softplus(logits[:, 1:]).sum(1).mean()


def heavy_tailed(number: int, seed: int, noise: float, features: int = 20) -> tuple[Tensor, Tensor]:
    """Returns inputs, and a smooth function of them with ``noise`` times Student's t of 2 degrees, without variance."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, features, generator=generator)
    y = (x[:, 0] * x[:, 1]).tanh() + x[:, 2:5].sum(1).sin()
    normal = torch.randn(3, number, generator=generator)
    return x, y + noise * normal[0] / normal[1:].square().mean(0).sqrt()


def moons(number: int, seed: int) -> Tensor:
    """Returns points on two half circles with a little noise, shape (number, 2)."""
    generator = torch.Generator().manual_seed(seed)
    angle = torch.pi * torch.rand(number, generator=generator)
    side = torch.randint(2, (number,), generator=generator) * 2 - 1
    points = torch.stack([angle.cos() + 0.5 * side, side * angle.sin() - 0.25 * side], dim=1)
    return points + 0.1 * torch.randn(number, 2, generator=generator)


def communities(number: int, seed: int, nodes: int = 40, classes: int = 4, features: int = 16) -> tuple[Tensor, Tensor]:
    """Returns graphs whose nodes are linked more often within their class; links, averaged, stand before features."""
    generator = torch.Generator().manual_seed(seed)
    classes_of = torch.randint(classes, (number, nodes), generator=generator)
    same = classes_of[:, :, None] == classes_of[:, None, :]
    drawn = torch.rand(number, nodes, nodes, generator=generator).triu(1) < torch.where(same, 0.3, 0.1)
    links = (drawn | drawn.transpose(1, 2) | torch.eye(nodes, dtype=torch.bool)).float()
    centres = torch.randn(classes, features, generator=torch.Generator().manual_seed(0))
    x = 0.3 * centres[classes_of] + torch.randn(number, nodes, features, generator=generator)
    return torch.cat([links / links.sum(2, keepdim=True), x], dim=2), classes_of


def reversed_words(number: int, seed: int, symbols: int = 12, length: int = 10) -> tuple[Tensor, Tensor]:
    """Returns drawn words beside the same words backwards, and the latter once more as what should be said."""
    words = torch.randint(symbols, (number, length), generator=torch.Generator().manual_seed(seed))
    return torch.cat([words, words.flip(1)], dim=1), words.flip(1)
