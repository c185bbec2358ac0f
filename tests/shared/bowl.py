"""A quadratic whose gradient is noisy from batch to batch, so that losses at any point are known."""

import torch
from torch import Tensor, nn


class Bowl(nn.Module):
    """The quadratic 2 x^2 + y^2 / 2 + 1, plus noise times (x, y)."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, noise: Tensor) -> Tensor:
        return value(self.x, noise)


def value(x: Tensor, noise: Tensor) -> Tensor:
    """The loss at a point."""
    return 2 * x[0] ** 2 + x[1] ** 2 / 2 + (noise * x).sum() + 1


def gradient(x: Tensor, noise: Tensor) -> Tensor:
    """Its gradient."""
    return torch.stack([4 * x[0], x[1]]) + noise


def noises(number: int, seed: int = 1) -> list[Tensor]:
    """Batches of length one in random directions."""
    source = torch.Generator().manual_seed(seed)
    drawn = torch.randn(number, 2, generator=source, dtype=torch.float64)
    return list(torch.nn.functional.normalize(drawn, dim=1))
