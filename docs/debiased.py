"""Draws docs/figures/debiased.png: three ways to measure the smoothness of one step, against the truth.

    python docs/debiased.py

The step is one step of plain gradient descent on scikit-learn's digits. The truth is the change of the gradient on the
whole data set between the two ends of the step, divided by the length of the step. Each estimate sees 32 examples,
drawn afresh and with replacement, so that the two halves are independent. Needs scikit-learn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from smoothdiag import DebiasedSmoothness, Objective, PathSmoothness, Step
from smoothdiag.measure.loss.batches import MicroBatch, RandomState

BATCH = 64
HALF = 16
LR = 0.02
WARM_UP = 100
FIGURE = Path(__file__).parent / "figures" / "debiased.png"
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Draws:
    """Estimates of the smoothness along one step from repeated draws of data.

    Attributes:
        truth: Smoothness of the loss on all data along the step [f/x^2].
        grad_norm: Norm of the gradient on all data at the start of the step [f/x].
        naive: Smoothness from another batch at each end, one value per draw [f/x^2].
        same: Smoothness from one batch of twice the size at both ends.
        debiased: Smoothness from two halves.
        debiased_squared: Square of ``debiased``, which may be negative before the root is taken [f^2/x^4].
        squared_norm: Squared gradient norm from the two halves [f^2/x^2].
        squared_norm_same: Squared gradient norm from the batch of twice the size.
    """

    truth: float
    grad_norm: float
    naive: np.ndarray
    same: np.ndarray
    debiased: np.ndarray
    debiased_squared: np.ndarray
    squared_norm: np.ndarray
    squared_norm_same: np.ndarray


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the mean cross-entropy of a batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


def simulate(num: int = 200, half: int = HALF, seed: int = 0) -> Draws:
    """Takes one step and measures it ``num`` times, each time from two fresh batches of ``half`` examples."""
    generator = torch.Generator().manual_seed(seed)
    digits = load_digits()
    data = torch.tensor(digits.data / 8, dtype=torch.float64), torch.tensor(digits.target)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()
    parameters = list(model.parameters())

    def draw(size: int) -> Batch:
        chosen = torch.randint(len(data[1]), (size,), generator=generator)
        return data[0][chosen], data[1][chosen]

    def gradient(batch: Batch) -> Tensor:
        parts = torch.autograd.grad(cross_entropy(model, batch), parameters)
        return torch.cat([part.flatten() for part in parts])

    def move(point: Sequence[Tensor]) -> None:
        for parameter, value in zip(parameters, point, strict=True):
            parameter.data.copy_(value)

    def at(point: Sequence[Tensor], batch: Batch) -> Tensor:
        move(point)
        return gradient(batch)

    def step_on(*batches: Batch) -> Step:
        micro_batches = [MicroBatch(batch, RandomState.capture()) for batch in batches]
        objective = Objective(model, cross_entropy, micro_batches, parameters)
        return Step(index=WARM_UP, objective=objective, start=start, end=end, lr=LR)

    optimizer = torch.optim.SGD(parameters, lr=LR)
    for _ in range(WARM_UP + 1):
        start = [p.detach().clone() for p in parameters]
        optimizer.zero_grad()
        cross_entropy(model, draw(BATCH)).backward()
        optimizer.step()
    end = [p.detach().clone() for p in parameters]
    length = float(torch.cat([(b - a).flatten() for a, b in zip(start, end, strict=True)]).norm())

    naive = [float((at(end, draw(half)) - at(start, draw(half))).norm()) / length for _ in range(num)]
    same = [PathSmoothness(two_scale=False)(step_on(draw(2 * half))) for _ in range(num)]
    halves = [DebiasedSmoothness()(step_on(draw(half), draw(half))) for _ in range(num)]
    return Draws(
        truth=float((at(end, data) - at(start, data)).norm()) / length,
        grad_norm=float(at(start, data).norm()),
        naive=np.array(naive),
        same=np.array([estimate.smoothness for estimate in same]),
        debiased=np.array([estimate.smoothness for estimate in halves]),
        debiased_squared=np.array([estimate.extra["smoothness_squared"] for estimate in halves]),
        squared_norm=np.array([estimate.grad_norm**2 for estimate in halves]),
        squared_norm_same=np.array([estimate.grad_norm**2 for estimate in same]),
    )


def root_mean_square(values: np.ndarray) -> float:
    """Returns the root of the mean square."""
    return float(np.sqrt(np.mean(values**2)))


def draw_figure(draws: Draws) -> Figure:
    """Returns the figure: a histogram for each way of measuring, and the truth as a line through all panels."""
    rows = [
        ("another batch at each end", draws.naive, root_mean_square(draws.naive), "#d55e00"),
        ("one batch at both ends", draws.same, root_mean_square(draws.same), "#0072b2"),
        ("two halves (DebiasedSmoothness)", draws.debiased, float(np.sqrt(draws.debiased_squared.mean())), "#009e73"),
    ]
    largest = np.nanmax(draws.naive)
    bins = np.geomspace(0.6 * draws.truth, 1.4 * largest, 120)
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots(len(rows), sharex=True)
    for ax, (label, values, average, colour) in zip(axes, rows, strict=True):
        ax.hist(values[np.isfinite(values)], bins=bins, color=colour)
        ax.axvline(draws.truth, color="black", linewidth=1, linestyle="--")
        # In the gap between the two clusters: left of the naive values, right of the others.
        ax.text(
            float(np.sqrt(draws.truth * largest)),
            0.85,
            f"{label}\nroot mean square: {_short(average / draws.truth)} × truth",
            transform=ax.get_xaxis_transform(),
            ha="center",
            va="top",
            color=colour,
            fontsize=9,
        )
        ax.spines[["top", "right"]].set_visible(False)
        ax.yaxis.get_major_locator().set_params(nbins=3, integer=True)
    axes[0].annotate(
        "all data: the truth",
        (draws.truth, 0.9),
        xycoords=("data", "axes fraction"),
        xytext=(4, 0),
        textcoords="offset points",
        fontsize=9,
        va="top",
    )
    axes[0].set_xscale("log")
    axes[1].set_ylabel(f"draws, of {len(draws.naive)}")
    axes[-1].set_xlabel("smoothness along one step [loss / parameter²]")
    return figure


def _short(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    FIGURE.parent.mkdir(exist_ok=True)
    draw_figure(simulate()).savefig(FIGURE, dpi=150)
