"""fits.scans: scans of landscapes with known Hessian norms get the law that holds there, and its constants."""

import numpy as np
import pytest
import torch

import smoothdiag as sd
from smoothdiag import problems

SPECTRUM = np.logspace(-3, 0, 30).tolist()


def scanned(problem, x, seed=0, **options):
    model = problem.as_module(torch.as_tensor(x, dtype=torch.float64))
    return sd.scan(model, lambda model, batch: model(), [None], seed=seed, progress=False, **options)


def away(length, dim=20, seed=0):
    u = np.random.default_rng(seed).standard_normal(dim)
    return length * u / np.linalg.norm(u)


def descended(problem, x, steps):
    x = torch.as_tensor(x, dtype=torch.float64)
    for _ in range(steps):
        x = x - problem.gradient(x)
    return x


def test_exponential_from_far_has_its_constants_within_a_hundredth():
    found = sd.fit_smoothness(scanned(problems.exponential(0.7, 2.0, dim=20), away(3.0), budget=300), num_boot=100)
    assert found.verdict is sd.Verdict.L0L1, found.verdict_reason
    assert [found.L0, found.L1] == pytest.approx([0.7, 2.0], rel=0.01)


@pytest.mark.slow
def test_exponential_near_its_minimum_is_constant_there():
    found = sd.fit_smoothness(scanned(problems.exponential(0.7, 2.0, dim=20), away(0.05)), num_boot=100)
    assert found.verdict is sd.Verdict.CONSTANT


def test_cube_of_the_norm_has_the_exponent_one_half():
    found = sd.fit_smoothness(scanned(problems.power(3, dim=20), away(1.0)), num_boot=100)
    assert found.verdict is sd.Verdict.POWER
    assert found.exponent_interval == pytest.approx((0.5, 0.5))


@pytest.mark.slow
def test_cosh_follows_its_loss_and_its_line_has_the_slope_of_the_corner():
    # ||H|| is L1^2 (f - f*) + L0 there, exactly, and L0 + L1 ||g|| is only a bound.
    found = sd.fit_smoothness(scanned(problems.cosh(0.7, 2.0, dim=20), away(2.0)), num_boot=100)
    assert found.verdict is sd.Verdict.LOSS_GAP
    assert found.L1 == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("steps", [0, 50])
def test_quadratic_is_constant(steps):
    problem = problems.quadratic(SPECTRUM)
    x = descended(problem, np.random.default_rng(0).standard_normal(30), steps)
    found = sd.fit_smoothness(scanned(problem, x, budget=250), num_boot=100)
    assert found.verdict is sd.Verdict.CONSTANT, found.verdict_reason
    assert pytest.approx(1.0, rel=0.03) == found.L0


@pytest.mark.slow
@pytest.mark.parametrize("steps", [0, 50, 400])
def test_quadratic_is_constant_for_twenty_seeds_of_twenty(steps):
    problem = problems.quadratic(SPECTRUM)
    found = []
    for seed in range(20):
        x = descended(problem, np.random.default_rng(seed).standard_normal(30), steps)
        found.append(sd.fit_smoothness(scanned(problem, x, seed=seed), num_boot=100).verdict)
    assert found.count(sd.Verdict.CONSTANT) == 20


def test_descent_into_the_minimum_of_the_exponential_follows_its_law():
    trace = scanned(problems.exponential(0.7, 2.0, dim=20), away(2.0), directions=["descent"], points=8)
    found = sd.fit_smoothness(trace)
    assert found.verdict is sd.Verdict.NOT_IDENTIFIED
    assert found.spearman > 0.99
