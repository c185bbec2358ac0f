"""Relative rounding error of one gradient, by dtype: where ``ROUNDING`` in the self-test comes from.

The script compares each model's gradient with the gradient of the same weights in the next wider dtype (float32 with
float64, bfloat16 and bfloat16 autocast with float32), at initialisation and after 30 steps of SGD.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smoothdiag import vectors


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(64, 64), nn.LSTM(64, 128, batch_first=True), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(x))[0])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
        self.embed, self.blocks, self.head = nn.Embedding(64, 64), nn.TransformerEncoder(layer, 2), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.triu(torch.full((x.shape[1],) * 2, float("-inf"), dtype=self.head.weight.dtype), 1)
        return self.head(self.blocks(self.embed(x), mask=mask))


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.body = nn.Sequential(
            nn.Conv1d(16, 64, 5, padding=2), nn.BatchNorm1d(64), nn.ReLU(), nn.Conv1d(64, 64, 5, padding=2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.embed(x).mT).mT


def gradient(model: nn.Module, x: Tensor, autocast: bool = False) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1).float(), x[:, 1:].flatten())
    return list(torch.autograd.grad(loss, list(model.parameters())))


def error(model: nn.Module, x: Tensor, narrow: Callable[[nn.Module], list[Tensor]], wide: torch.dtype) -> float:
    """Returns ||g_narrow - g_wide|| / ||g_wide||."""
    reference = gradient(copy.deepcopy(model).to(wide), x)
    return float(vectors.norm(vectors.sub([g.to(wide) for g in narrow(model)], reference)) / vectors.norm(reference))


def main() -> None:
    rows = []
    for kind in (Lstm, Attention, Convolutional):
        for seed in range(3):
            torch.manual_seed(seed)
            model, x = kind(), torch.randint(64, (16, 33))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            for steps in (0, 30):
                for _ in range(steps):
                    for p, g in zip(model.parameters(), gradient(model, x), strict=True):
                        p.grad = g
                    optimizer.step()
                bf16 = copy.deepcopy(model).bfloat16()
                rows.append(
                    {
                        "model": kind.__name__,
                        "steps": steps,
                        "float32": error(model, x, lambda m, x=x: gradient(m, x), torch.float64),
                        "bfloat16": error(bf16, x, lambda m, x=x: gradient(m, x), torch.float32),
                        "bfloat16 autocast": error(model, x, lambda m, x=x: gradient(m, x, True), torch.float32),
                    }
                )
    print(pd.DataFrame(rows).groupby(["model", "steps"]).max().map("{:.1e}".format).to_string())


if __name__ == "__main__":
    main()
