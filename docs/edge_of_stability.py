"""Draws docs/figures/edge_of_stability.png: curvature rises until the optimizer is barely stable, and stays there.

    python docs/edge_of_stability.py

Three optimizers train the same small network on all of scikit-learn's digits at once, without batch noise. The printed
table compares the last third of each run with the limits. Needs scikit-learn.

Source: Cohen, Kaur, Li, Kolter, Talwalkar 2021 (ICLR); Cohen et al. 2022 for Adam.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import smoothdiag as sd

NUM_STEPS = 1500
EVERY = 20
WIDTH = 32
FIGURE = Path(__file__).parent / "figures" / "edge_of_stability.png"
Batch = tuple[Tensor, Tensor]

OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.5),
    "SGD, momentum 0.9": lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
}


def squared_error(model: nn.Module, batch: Batch) -> Tensor:
    """Returns half the squared distance to the one-hot target, mean over the batch."""
    return 0.5 * F.mse_loss(model(batch[0]), batch[1], reduction="sum") / len(batch[0])


def simulate(name: str, num_steps: int = NUM_STEPS, seed: int = 0) -> pd.DataFrame:
    """Trains with one of ``OPTIMIZERS`` on the whole data set and returns the trace."""
    digits = load_digits()
    inputs = torch.tensor(digits.data / 16, dtype=torch.float32)
    batch = inputs - inputs.mean(0), F.one_hot(torch.tensor(digits.target)).float()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 10))
    optimizer = OPTIMIZERS[name](model.parameters())
    estimators = [sd.Sharpness(), sd.DirectionalCurvature(), sd.CriticalStep()]
    with sd.Probe(
        model, optimizer, squared_error, estimators=estimators, schedule=sd.every(EVERY), probe_batches=[batch]
    ) as probe:
        for _ in range(num_steps):
            optimizer.zero_grad()
            squared_error(model, batch).backward()
            optimizer.step()
    return probe.trace.to_frame()


def in_the_end(trace: pd.DataFrame) -> dict[str, np.ndarray]:
    """Returns the ratio of curvature to its limit in the last third of a run, for each estimator that has a limit.

    The limit of the critical step is 2 / lr. Steps that went uphill have no limit and are left out.
    """
    trace = trace[trace["step"] >= trace["step"].max() * 2 / 3]
    is_critical = trace["estimator"] == "critical_step"
    limit = trace["stability_limit"].where(~is_critical, 2 / trace["lr"])
    ratio = (trace["smoothness"] / limit).dropna()
    return {
        str(name).removesuffix("_preconditioned"): values.to_numpy()
        for name, values in ratio.groupby(trace["estimator"])
    }


def table(traces: dict[str, pd.DataFrame]) -> str:
    """Returns the table: the median over the last third of each run, and a range that holds 80% of the values."""
    columns = {"sharpness": "sharpness", "batch_sharpness": "batch sharpness", "critical_step": "critical step"}
    lines = [f"| optimizer | limit | {' | '.join(columns.values())} |", "|---|---|" + "---|" * len(columns)]
    for name, trace in traces.items():
        limit, lr = trace["stability_limit"].dropna().iloc[0], trace["lr"].iloc[0]
        found = in_the_end(trace)
        cells = [f"{name}, lr {lr:g}", f"{limit * lr:.3g}/lr = {limit:.4g}"]
        for column in columns:
            low, middle, high = np.quantile(found[column], [0.1, 0.5, 0.9])
            cells.append(f"{middle:.3f} ({low:.3f} to {high:.3f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_figure(traces: dict[str, pd.DataFrame]) -> Figure:
    """Returns the figure: a panel for each optimizer, from a fortieth of its limit upwards."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, len(traces))
    for ax, (name, trace) in zip(panels, traces.items(), strict=True):
        sd.plot_sharpness(trace, ax=ax)
        limit = trace["stability_limit"].dropna().max()
        ax.set_title(name, pad=16)  # above the note
        ax.set_ylim(limit / 40, limit * 1.8)
    return figure


if __name__ == "__main__":
    torch.set_num_threads(1)
    traces = {name: simulate(name) for name in OPTIMIZERS}
    print(table(traces))
    FIGURE.parent.mkdir(exist_ok=True)
    draw_figure(traces).savefig(FIGURE, dpi=150)
