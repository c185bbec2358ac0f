"""clipping.rate: the rate of every step satisfies its inequality and descends where the law holds."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from smoothdiag import clip_rule, problems, step_rate
from smoothdiag.fits import Flag, Verdict, fit_smoothness

X = 10 ** np.random.default_rng(0).uniform(-1.5, 1.5, 200)


def fitted(L1: float = 2.0):
    return fit_smoothness(pd.DataFrame({"grad_norm": X, "smoothness": 1 + L1 * X, "saturation": 0.1}), num_boot=20)


FIT = fitted()


@pytest.mark.parametrize("kappa", [0.5, 2.0])
@pytest.mark.parametrize(("momentum", "dampening", "gain"), [(0.0, 0.5, 1.0), (0.9, 0.0, 10.0), (0.9, 0.5, 5.0)])
def test_effective_rate_times_smoothness_is_kappa_at_every_norm(kappa, momentum, dampening, gain):
    rate = step_rate(FIT, kappa=kappa)
    np.testing.assert_allclose(rate(X) * (1 + 2 * X), kappa, rtol=1e-6)
    assert rate(torch.tensor(3.0)).item() == pytest.approx(rate(3.0), rel=1e-6)
    assert "L0 1 and L1 2" in rate.reason
    scale = rate.scale(X, 0.03, momentum=momentum, dampening=dampening)
    np.testing.assert_allclose(scale, np.minimum(1, kappa / (0.03 * gain * (1 + 2 * X))), rtol=1e-6)
    assert rate.scale(3.0, 0.03) == pytest.approx(rate.scale(torch.tensor(3.0), 0.03).item(), rel=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("momentum", [0.5, 0.9])
@pytest.mark.parametrize("name", ["exponential", "hybrid", "cosh"])
def test_scaled_gradients_descend_under_momentum_too(name, momentum):
    problem = getattr(problems, name)(L0=1.0, L1=2.0, dim=3)
    rate = step_rate(replace(FIT, L0=1.0, L1=2.0))
    x = torch.nn.Parameter(torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64) * 5)
    optimizer = torch.optim.SGD([x], lr=1.0, momentum=momentum)
    losses = []
    for _ in range(400):
        optimizer.zero_grad()
        loss = problem.value(x)
        loss.backward()
        x.grad *= rate.scale(float(x.grad.norm()), 1.0, momentum=momentum)
        optimizer.step()
        losses.append(loss.item())
    assert max(losses) == losses[0]
    assert losses[-1] < 1e-3 * losses[0]


@pytest.mark.parametrize(("L0", "L1"), [(1.0, 2.0), (0.3, 0.5)])
@pytest.mark.parametrize("name", ["exponential", "hybrid", "cosh"])
def test_descent_at_that_rate_never_ascends(name, L0, L1):
    """At a rate of kappa <= 1 over L0 + L1 ||g|| a step is at most 1/L1 long, and the loss falls by the theorem."""
    problem = getattr(problems, name)(L0=L0, L1=L1, dim=3)
    rate = step_rate(replace(FIT, L0=L0, L1=L1, L0_interval=(L0, L0), L1_interval=(L1, L1)))
    x = torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64) * 20 / L1
    losses, steps = [], []
    for _ in range(60):
        x = x.detach().requires_grad_()
        loss = problem.value(x)
        (gradient,) = torch.autograd.grad(loss, x)
        losses.append(loss.item())
        norm = float(gradient.norm())
        steps.append(rate(norm) * norm)
        x = x - rate(norm) * gradient
    assert (np.diff(losses) <= 1e-12).all()
    assert losses[-1] < 1e-3 * losses[0]
    assert max(steps) <= 1 / L1


def test_where_the_slope_goes_to_zero_a_threshold_grows_without_bound_and_the_rate_does_not():
    nearly_flat = replace(FIT, L1=1e-9, L1_interval=(1e-12, 1e-8))
    assert clip_rule(nearly_flat, lr=0.5).threshold > 1e8
    assert step_rate(nearly_flat)(10.0) == pytest.approx(1.0)
    flat = fitted(L1=0.0)
    assert flat.verdict is Verdict.CONSTANT
    assert step_rate(flat)(10.0) == pytest.approx(1.0, rel=1e-3)


def test_an_l0_that_may_be_zero_is_replaced_by_the_end_of_its_interval():
    rate = step_rate(replace(FIT, L0=0.0, L0_interval=(0.0, 0.5)))
    assert rate(0.0) == pytest.approx(2.0)
    assert "upper end stands in for L0" in rate.reason
    for end in (0.0, math.inf):
        with pytest.raises(ValueError, match="should have an L0 above zero"):
            step_rate(replace(FIT, L0=0.0, L0_interval=(0.0, end)))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"verdict": Verdict.NOT_IDENTIFIED}, "its verdict is NOT_IDENTIFIED"),
        ({"verdict": Verdict.ARTEFACT}, "its verdict is ARTEFACT"),
        ({"flags": (Flag("saturation", "", "", "", fatal=True),)}, "saturation"),
        ({"flags": (Flag("saturation unknown", "", "", ""),)}, "could not run"),
    ],
)
def test_a_fit_that_establishes_nothing_makes_no_rate(change, word):
    with pytest.raises(ValueError, match=f"have constants that a rate can rest on. Found that .*{word}"):
        step_rate(replace(FIT, **change))


def test_wrong_parameters_are_refused():
    with pytest.raises(ValueError, match="Parameter `fit` should be a SmoothnessFit"):
        step_rate(pd.DataFrame())
    with pytest.raises(ValueError, match="Parameter `momentum`"):
        step_rate(FIT).scale(1.0, 0.1, momentum=1.0)
    with pytest.raises(ValueError, match="Parameter `kappa`"):
        step_rate(FIT, kappa=3.0)
