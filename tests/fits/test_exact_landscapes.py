"""fits: constants, exponents and refusals are right on landscapes whose Hessian norm is known at every point."""

import numpy as np
import pandas as pd
import pytest
import torch

from smoothdiag import problems
from smoothdiag.fits import Verdict, fit_smoothness


def rows(problem, points):
    points = [torch.as_tensor(point, dtype=torch.float64) for point in points]
    return pd.DataFrame(
        {
            "grad_norm": [float(problem.gradient(point).norm()) for point in points],
            "smoothness": [float(problem.hessian_norm(point)) for point in points],
            "saturation": 0.1,
            "estimator": "hessian_norm",
        }
    )


def radial(problem, low, high, n=300, seed=0):
    """Points in random directions, their lengths uniform in the logarithm."""
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((n, problem.dim))
    return rows(
        problem,
        points / np.linalg.norm(points, axis=1, keepdims=True) * 10 ** rng.uniform(*np.log10([low, high]), (n, 1)),
    )


def test_exponential_returns_its_constants_within_a_hundredth():
    found = fit_smoothness(radial(problems.exponential(0.7, 2.0, dim=3), 0.01, 3), num_boot=50)
    assert found.verdict is Verdict.L0L1
    assert [found.L0, found.L1] == pytest.approx([0.7, 2.0], rel=0.01)


@pytest.mark.thorough
@pytest.mark.parametrize("problem", [problems.cosh(0.7, 2.0, dim=3), problems.hybrid(0.7, 2.0, dim=3)])
def test_corners_of_cosh_and_hybrid_within_a_twentieth(problem):
    found = fit_smoothness(radial(problem, 0.005, 3, n=600), num_boot=50, quantile=0.99)
    assert [found.L0, found.L1] == pytest.approx([0.7, 2.0], rel=0.05)
    assert found.verdict is Verdict.L0L1


@pytest.mark.thorough
@pytest.mark.parametrize("n", [3, 4, 6])
def test_powers_of_the_norm_have_their_slopes(n):
    found = fit_smoothness(radial(problems.power(n, dim=3), 0.01, 2), num_boot=50)
    assert found.verdict is Verdict.POWER
    assert found.loglog_slope == pytest.approx((n - 2) / (n - 1), rel=1e-6)
    power = next(score for score in found.comparison if score.name == "power")
    assert power.exponent == pytest.approx((n - 2) / (n - 1), abs=0.01)


def test_quadratic_is_constant():
    points = np.random.default_rng(0).standard_normal((300, 4)) * np.logspace(-2, 1, 300)[:, None]
    found = fit_smoothness(rows(problems.quadratic([0.1, 0.5, 1.0, 2.0]), points), num_boot=50)
    assert found.verdict is Verdict.CONSTANT
    assert pytest.approx(2.0) == found.L0


@pytest.mark.thorough
def test_valley_is_no_law():
    # Along x y = 1 the gradient vanishes and the curvature has no bound.
    verdicts = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        x = 10 ** rng.uniform(-1, 1, 300)
        y = (1 + 0.3 * rng.standard_normal(300)) / x
        verdicts.append(fit_smoothness(rows(problems.valley(), np.stack([x, y], axis=1)), num_boot=50).verdict)
    assert Verdict.L0L1 not in verdicts


def test_minus_log_is_a_square():
    points = 10 ** np.random.default_rng(0).uniform(-1, 1, (300, 1))
    found = fit_smoothness(rows(problems.neg_log(), points), num_boot=50)
    assert found.verdict is Verdict.POWER
    assert found.loglog_slope == pytest.approx(2)
