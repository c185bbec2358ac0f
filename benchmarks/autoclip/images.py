"""Networks for images: convolutions with three kinds of normalisation or none, transformers, mixers, autoencoders."""

import itertools
from collections.abc import Callable
from functools import partial

import torch
from nets import Block
from torch import Tensor, nn
from torch.nn import functional as F


def groups_of(channels: int) -> nn.Module:
    return nn.GroupNorm(4, channels)


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(norm(outputs) for _ in range(2))
        self.stride, self.added = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[1](self.second(F.relu(self.norms[0](self.first(x)))))
        # The shortcut without parameters of He, Zhang, Ren, Sun 2016: every other pixel, and channels of zeros.
        return F.relu(y + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added)))


class ResNet(nn.Sequential):
    """A residual network: 8 layers with one block per width."""

    def __init__(
        self, width: int = 16, norm: Callable[[int], nn.Module] = nn.BatchNorm2d, blocks: int = 1, classes: int = 10
    ) -> None:
        stages: list[nn.Module] = []
        inputs = width
        for outputs in (width, 2 * width, 4 * width):
            stages.append(Residual(inputs, outputs, 1 if outputs == width else 2, norm))
            stages += [Residual(outputs, outputs, 1, norm) for _ in range(blocks - 1)]
            inputs = outputs
        stem = [nn.Conv2d(3, width, 3, 1, 1, bias=False), norm(width), nn.ReLU()]
        super().__init__(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


class Plain(nn.Sequential):
    """Two convolutions and two layers without any normalisation. Source: LeCun et al. 1998, with ReLU."""

    def __init__(self, channels: int = 1, classes: int = 10) -> None:
        super().__init__(
            nn.Conv2d(channels, 8, 5, 2, 2),
            nn.ReLU(),
            nn.Conv2d(8, 16, 5, 2, 2),
            nn.ReLU(),
            nn.Flatten(),
            nn.LazyLinear(64),
            nn.ReLU(),
            nn.Linear(64, classes),
        )
        self(torch.zeros(1, channels, 28, 28))


class Patches(nn.Module):
    """Cuts images into patches, and embeds them."""

    def __init__(self, width: int, patch: int, number: int) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, width, patch, patch)
        self.places = nn.Parameter(0.02 * torch.randn(number, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.cut(x).flatten(2).transpose(1, 2) + self.places


class VisionTransformer(nn.Sequential):
    """Patches of 4 x 4 pixels, two blocks, mean over places."""

    def __init__(self, width: int = 48, classes: int = 10) -> None:
        blocks = [Block(width, 4, causal=False) for _ in range(2)]
        super().__init__(Patches(width, 4, 16), *blocks, nn.LayerNorm(width), Mean(), nn.Linear(width, classes))


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Mixing(nn.Module):
    def __init__(self, width: int, places: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.over_places = nn.Sequential(nn.Linear(places, 2 * places), nn.GELU(), nn.Linear(2 * places, places))
        self.over_features = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.over_places(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return x + self.over_features(self.norms[1](x))


class Mixer(nn.Sequential):
    """Layers over places and over features in turn. Source: Tolstikhin et al. 2021 (NeurIPS)."""

    def __init__(self, width: int = 48, classes: int = 10) -> None:
        blocks = [Mixing(width, 16) for _ in range(3)]
        super().__init__(Patches(width, 4, 16), *blocks, nn.LayerNorm(width), Mean(), nn.Linear(width, classes))


def layers(*widths: int, activation: type[nn.Module] = nn.ReLU) -> list[nn.Module]:
    """Returns linear layers with an activation between any two."""
    found: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        found += [nn.Linear(inputs, outputs), activation()]
    return found[:-1]


class Variational(nn.Module):
    """A variational autoencoder; the output is the loss per image [nats / 100]. Source: Kingma and Welling 2014."""

    def __init__(self, hidden: int = 96, latent: int = 8) -> None:
        super().__init__()
        self.encode = nn.Sequential(*layers(784, hidden, 2 * latent))
        self.decode = nn.Sequential(*layers(latent, hidden, 784))

    def forward(self, images: Tensor) -> Tensor:
        mean, log_variance = self.encode(images.flatten(1)).chunk(2, dim=1)
        drawn = mean + torch.randn_like(mean) * (log_variance / 2).exp() if self.training else mean
        wrong = F.binary_cross_entropy_with_logits(self.decode(drawn), images.flatten(1), reduction="sum")
        apart = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()
        return (wrong + apart) / len(images) / 100


Autoencoder = partial(layers, 784, 128, 32, 8, 32, 128, 784, activation=nn.Tanh)
"""Layers of a deep autoencoder with a narrow middle. Source: the kind of Hinton and Salakhutdinov 2006."""


class Denoiser(nn.Module):
    """Tells the noise in an image from its level; the output is the mean squared error. Source: Ho et al. 2020."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.enter, self.level = nn.Linear(784, width), nn.Linear(16, width)
        self.parts = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(2)
        )
        self.leave = nn.Linear(width, 784)

    def forward(self, images: Tensor) -> Tensor:
        images = 2 * images.flatten(1) - 1
        generator = None if self.training else torch.Generator().manual_seed(0)
        share = torch.rand(len(images), 1, generator=generator)
        noise = torch.randn(images.shape, generator=generator)
        mixed = share.sqrt() * images + (1 - share).sqrt() * noise
        waves = (share * torch.pi * 2.0 ** torch.arange(8) / 8).repeat(1, 2)
        x = self.enter(mixed) + self.level(torch.cat([waves[:, :8].sin(), waves[:, 8:].cos()], dim=1))
        for part in self.parts:
            x = x + part(x)
        return F.mse_loss(self.leave(x), noise)


class Contrast(nn.Module):
    """Embeds two views of each image; the output is the loss of telling which belong together.

    Source: Chen et al. 2020, SimCLR, with crops and flips.
    """

    def __init__(self, width: int = 16, temperature: float = 0.2) -> None:
        super().__init__()
        self.body, self.temperature = ResNet(width, groups_of, classes=32), temperature

    def view(self, images: Tensor, seed: int | None) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        places = torch.randint(5, (2, len(images)), generator=generator)
        padded = F.pad(images, (2, 2, 2, 2))
        rows = places[0][:, None] + torch.arange(images.shape[-2])
        columns = places[1][:, None] + torch.arange(images.shape[-1])
        cut = padded[torch.arange(len(images))[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
        flipped = torch.rand(len(images), generator=generator) < 0.5
        return torch.where(flipped[:, None, None, None], cut.flip(-1), cut)

    def forward(self, images: Tensor) -> Tensor:
        views = [self.view(images, None if self.training else seed) for seed in range(2)]
        a, b = (F.normalize(self.body(view), dim=1) for view in views)
        likeness = a @ b.T / self.temperature
        right = torch.arange(len(images))
        return (F.cross_entropy(likeness, right) + F.cross_entropy(likeness.T, right)) / 2
