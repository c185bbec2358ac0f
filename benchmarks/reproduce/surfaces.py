"""What the instrument says of the functions of the accounts: scans and descents of landscapes with known constants."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import smoothdiag as sd
from smoothdiag.optim import Clipped, GradientDescent

DIM = 8
FAR, NEAR = 3.0, 0.1
"""Distances of the two checkpoints from the minimum."""
BOUND = 1e3
"""Gradient at the start of a descent."""


@dataclass(frozen=True)
class Surface:
    """A landscape, and the law that it has.

    Attributes:
        problem: The landscape.
        truth: Its law in words.
        exponent: Power of the gradient norm in the law; NaN if there is no law, or a constant.
        right: Verdicts that are right far from the minimum.
    """

    problem: sd.problems.Problem
    truth: str
    exponent: float
    right: tuple[str, ...]


SURFACES = {
    "quadratic": Surface(
        sd.problems.quadratic(np.geomspace(0.1, 10, DIM).tolist()), "L0 = 10, L1 = 0", np.nan, ("CONSTANT",)
    ),
    "||x||^3": Surface(sd.problems.power(3.0, dim=DIM), "exponent 1/2", 1 / 2, ("POWER",)),
    "||x||^4": Surface(sd.problems.power(4.0, dim=DIM), "exponent 2/3", 2 / 3, ("POWER",)),
    "exp a'x": Surface(sd.problems.exp_linear([DIM**-0.5] * DIM), "L0 = 0, L1 = 1", 1.0, ("L0L1",)),
    "exponential": Surface(sd.problems.exponential(dim=DIM), "L0 = 1, L1 = 1", 1.0, ("L0L1",)),
    "hybrid": Surface(sd.problems.hybrid(dim=DIM), "largest of 1 and gradient", 1.0, ("L0L1",)),
    "(1 - xy)^2 / 2": Surface(sd.problems.valley(), "none", np.nan, ("NOT_IDENTIFIED",)),
}


def scan(name: str, distance: float) -> pd.DataFrame:
    """Returns the rows of a scan of a checkpoint at this distance from zero."""
    problem = SURFACES[name].problem
    x = torch.randn(problem.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = problem.as_module(distance * x / x.norm())
    return sd.scan(model, loss, [None], max_loss=1e12, progress=False).to_frame()


def descend(name: str, num_steps: int) -> pd.DataFrame:
    """Returns the Hessian norms along clipped descent with L0 = L1 = 1 from a gradient of `BOUND`."""
    problem = SURFACES[name].problem
    direction = torch.ones(problem.dim, dtype=torch.float64) / problem.dim**0.5
    low, high = 1e-3, 1e3
    while high > low * (1 + 1e-12):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if problem.gradient(middle * direction).norm() < BOUND else (low, middle)
    model = problem.as_module(low * direction)
    optimizer = GradientDescent(model.parameters(), Clipped(0.05, 1.0))
    with sd.Probe(model, optimizer, loss, estimators=[sd.HessianNorm()], schedule=sd.every(1)) as probe:
        for _ in range(num_steps):
            probe.observe(None)
            optimizer.zero_grad()
            loss(model, None).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return probe.trace.to_frame()


def loss(model: nn.Module, batch: None) -> Tensor:
    value: Tensor = model()
    return value


def said(rows: pd.DataFrame) -> Mapping[str, Any]:
    """Returns what the fit of the rows says, and the verdict on the same rows with their smoothness shuffled."""
    fit = sd.fit_smoothness(rows)
    mixed = rows.copy()
    usable = mixed["smoothness"].notna().to_numpy()
    order = np.random.default_rng(0).permutation(usable.sum())
    mixed.loc[usable, "smoothness"] = mixed.loc[usable, "smoothness"].to_numpy()[order]
    return {
        "verdict": fit.verdict.name,
        "reason": fit.verdict_reason,
        "flags": [flag.name for flag in fit.flags],
        "L0": fit.L0,
        "L1": fit.L1,
        "L1_interval": list(fit.L1_interval),
        "exponent_interval": list(fit.exponent_interval),
        "decades": fit.decades,
        "rows": fit.num_points,
        "shuffled": sd.fit_smoothness(mixed).verdict.name,
    }
