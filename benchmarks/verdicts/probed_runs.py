"""Null cases that go through a real `Probe`, and the two runs known to have got a false L0L1."""

import inspect
import warnings
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from null_runs import Rows, quadratic_row, saw_teeth
from torch import nn

import smoothdiag as sd

TAKES_DATA = "data" in inspect.signature(sd.Probe).parameters


def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return (model(batch[0])[:, 0] - batch[1]).square().mean() / 2


def rounded_weights(seed: int) -> Rows:
    """Linear regression in bfloat16 under a saw-toothed rate: the rounding of the gradient goes with its norm."""
    torch.manual_seed(seed)
    inputs, truth = torch.randn(64, 30), torch.randn(30)
    kept = inputs.bfloat16(), (inputs @ truth + 0.5 * torch.randn(64)).bfloat16()
    model = nn.Linear(30, 1, bias=False, dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"schedule": sd.every(1), "estimators": [sd.LocalSmoothness()], "probe_batches": [kept]}
    with sd.Probe(model, optimizer, loss_fn, **options) as probe, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for rate in saw_teeth(300, 0.3, 0.01, 30):
            optimizer.param_groups[0]["lr"] = float(rate)
            chosen = torch.randint(0, 64, (8,))
            batch = kept[0][chosen], kept[1][chosen]
            probe.observe(batch)
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
        return probe.trace.to_frame()


def batches_of_a_quadratic(size: int, data: str | None) -> Callable[[int], Rows]:
    """Linear regression on examples of unequal length; ``data`` goes to the probe, None is its default."""

    def case(seed: int) -> Rows:
        torch.manual_seed(seed)
        truth, mixing = torch.randn(30), torch.randn(30, 30) / 30**0.5
        model = nn.Linear(30, 1, bias=False)
        nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        options = {} if data is None or not TAKES_DATA else {"data": data}
        with sd.Probe(model, optimizer, loss_fn, schedule=sd.every(1), **options) as probe, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(300):
                lengths = torch.exp(0.8 * torch.randn(size, 1))
                inputs = torch.randn(size, 30) @ mixing * lengths
                batch = inputs, inputs @ truth + 0.5 * torch.randn(size)
                probe.observe(batch)
                optimizer.zero_grad()
                loss_fn(model, batch).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            return probe.trace.to_frame()

    return case


def kicks_on_a_quadratic(seed: int) -> Rows:
    """Full gradients of a quadratic; in one step of ten the noise is Student-t. The columns are hand-made."""
    rng = np.random.default_rng(seed)
    curvature, weights, rows = np.logspace(-2, 0, 50), rng.standard_normal(50), []
    for step in range(800):
        is_kick = rng.random() < 0.1
        noise = rng.standard_normal(50) * (0.1 * rng.standard_t(1.5) if is_kick else 0.005)
        if step % 2 == 0:
            rows.append(quadratic_row(step, 0.5, curvature, weights))
        weights = weights - 0.5 * (curvature * weights + noise)
    frame = pd.DataFrame(rows)[["step", "grad_norm", "smoothness", "loss"]]
    return frame.assign(saturation=0.1, estimator="local")


PROBED = {"rounded_weights": rounded_weights}
KNOWN = {
    "batches_of_a_quadratic 8": batches_of_a_quadratic(8, None),
    "batches_of_a_quadratic 8, step rows": batches_of_a_quadratic(8, "step"),
    "batches_of_a_quadratic 32": batches_of_a_quadratic(32, None),
    "batches_of_a_quadratic 32, step rows": batches_of_a_quadratic(32, "step"),
    "kicks_on_a_quadratic": kicks_on_a_quadratic,
}
if not TAKES_DATA:  # a probe that always measures on the step's batch has only one kind of rows
    KNOWN = {name: case for name, case in KNOWN.items() if not name.endswith("step rows")}
