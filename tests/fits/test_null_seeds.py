"""fits: null cases called by name get their verdict over many seeds, a few by default and a hundred with `-m slow`.

Measured cases go through a real probe or take the gradients of a training loop as they come, as published
measurements do. `docs/verdicts.md` quotes the counts.
"""

import numpy as np
import pandas as pd
import pytest
import torch
from simulated import different_batches, law, uniform, white
from torch import nn

from smoothdiag import PathSmoothness, Probe, every
from smoothdiag.fits import Verdict, fit_smoothness
from smoothdiag.optim import ClippedMomentum

pytestmark = pytest.mark.thorough

COLUMNS = ["grad_norm", "smoothness", "saturation"]


def simulated(run):
    def frame(rng):
        return pd.DataFrame(dict(zip(COLUMNS, run(rng), strict=True)) | {"estimator": "local"})

    return frame


def clipped_batches(rng, n=200, lr=0.5, threshold=0.1):
    """Successive gradients of clipped descent on a quadratic, each of a batch of its own: the loop's own threshold."""
    curvature, x = np.logspace(-1, 0, 50), 1e-3 * rng.standard_normal(50)
    rows = []
    here = curvature * x
    for deviation in uniform(rng, n) / 10:
        step = lr * min(1.0, threshold / np.linalg.norm(here)) * here
        x = x - step
        there = curvature * x + deviation * rng.standard_normal(50)
        change, size = np.linalg.norm(there - here), np.linalg.norm(here)
        rows.append((size, change / np.linalg.norm(step), change / (size + np.linalg.norm(there))))
        here = there
    return np.array(rows).T


class Bowl(nn.Module):
    def __init__(self, x):
        super().__init__()
        self.x = nn.Parameter(torch.as_tensor(x))


def overshooting(rng, n=60):
    """Path rows of a probe while clipped descent jumps across the sharpest direction of a quadratic."""
    curvature = torch.as_tensor(rng.uniform(0.5, 1.0) * np.logspace(-2, 0, 20))
    model = Bowl(rng.standard_normal(20))
    optimizer = ClippedMomentum(model.parameters(), lr=2.5 / float(curvature.max()), threshold=0.1, momentum=0.0)

    def loss_fn(model, tilt):
        return (curvature * model.x.square()).sum() / 2

    probe = Probe(model, optimizer, loss_fn, estimators=[PathSmoothness(two_scale=False)], schedule=every(1))
    for batch in probe.watch([torch.zeros(1)] * n):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    return probe.trace.to_frame()


# The rows of one run, the verdicts it may get, and how many of a hundred seeds must get one of them.
CASES = {
    "different batches": (simulated(different_batches), {Verdict.ARTEFACT}, 95),
    "clipped descent, different batches": (simulated(clipped_batches), {Verdict.ARTEFACT}, 95),
    "clipped descent, overshooting": (overshooting, {Verdict.ARTEFACT}, 95),
    "white noise": (simulated(white), {Verdict.NOT_IDENTIFIED, Verdict.CONSTANT}, 95),
    "true law": (simulated(law(uniform, 200)), {Verdict.L0L1}, 90),
}


def hits(case, seeds):
    run, allowed, _ = CASES[case]
    return sum(fit_smoothness(run(np.random.default_rng(seed)), num_boot=50).verdict in allowed for seed in seeds)


@pytest.mark.parametrize("case", CASES)
def test_verdict_over_a_few_seeds(case):
    assert hits(case, range(100, 104)) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_verdict_over_a_hundred_seeds(case):
    found = hits(case, range(100))
    print(f"{case}: {found} of 100")
    assert found >= CASES[case][2]
