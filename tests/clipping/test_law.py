"""clipping.law: the integral is exact, and descent at its rate lowers the loss at every step."""

import math
import pickle
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.integrate import quad
from scipy.special import lambertw

from smoothdiag import GradientDescent, LawRate, problems, step_rate
from smoothdiag.clipping import PowerLaw, StepRate
from smoothdiag.fits import Verdict, fit_smoothness
from smoothdiag.optim import LogSmoothed

NORMS = np.geomspace(1e-6, 1e6, 25)


def line_rate(L0, L1, norm):
    """The closed form for a line: Vankov et al., 2024, and Tyurin, 2025."""
    return np.log1p(L1 * norm / (L0 + L1 * norm)) / (L1 * norm)


def root_rate(a, b, norm):
    """For a + b norm^(1/2): substitute s = norm^(1/2), so that dx = 2 s ds."""
    low, high = np.sqrt(norm), np.sqrt(2 * norm)
    return 2 / norm * ((high - low) / b - a / b**2 * np.log1p(b * (high - low) / (a + b * low)))


def square_rate(a, b, norm):
    """For a + b norm^2: a difference of arc tangents."""
    root = np.sqrt(b / a)
    return np.arctan2(root * norm, 1 + 2 * (root * norm) ** 2) / (norm * np.sqrt(a * b))


@pytest.mark.parametrize(("exponent", "closed"), [(1.0, line_rate), (0.5, root_rate), (2.0, square_rate)])
@pytest.mark.parametrize(("a", "b"), [(1.0, 2.0), (0.3, 5.0), (40.0, 0.01)])
def test_integral_equals_the_closed_form(exponent, closed, a, b):
    norms = NORMS[NORMS > 1e-3] if exponent == 0.5 else NORMS  # the closed form cancels at smaller ones
    np.testing.assert_allclose(LawRate(PowerLaw(a, b, exponent))(norms), closed(a, b, norms), rtol=1e-10)


def test_line_gives_the_rate_of_log_smoothed_descent_and_the_optimizer_takes_any_law():
    law, norms = LawRate(PowerLaw(1.0, 2.0, 1.0)), torch.from_numpy(NORMS)
    torch.testing.assert_close(law(norms), LogSmoothed(1.0, 2.0)(norms), rtol=1e-11, atol=0)
    steps = []
    for rule in (law, LogSmoothed(1.0, 2.0)):
        x = torch.nn.Parameter(torch.tensor([3.0, 1.0], dtype=torch.float64))
        x.grad = 5 * x.detach()
        GradientDescent([x], rule).step()
        steps.append(x.detach())
    torch.testing.assert_close(*steps, rtol=1e-12, atol=0)


@pytest.mark.parametrize("exponent", [0.25, 0.7, 1.5, 2.5, 3.0])
def test_integral_of_any_power_equals_adaptive_quadrature(exponent):
    rate = LawRate(PowerLaw(1.0, 2.0, exponent))
    for norm in NORMS:
        exact = quad(lambda v, g=norm: 1 / (1 + 2 * (g * (1 + v)) ** exponent), 0, 1, epsabs=0, epsrel=1e-13)[0]
        assert rate(float(norm)) == pytest.approx(exact, rel=1e-12)


def test_kink_of_a_law_costs_some_tenths_of_a_percent():
    """The hybrid landscape: max(L0, L1 norm), with the closed form by pieces."""
    rate = LawRate(lambda norm: np.maximum(1.0, 2.0 * norm))
    norms = np.linspace(0.2, 0.6, 401)
    low = np.clip(0.5, norms, 2 * norms)
    exact = (low - norms + np.log(2 * norms / low) / 2) / norms
    worst = np.max(np.abs(rate(norms) / exact - 1))
    assert 1e-5 < worst < 5e-3


def test_rate_takes_numbers_arrays_and_tensors_and_keeps_their_kind():
    rate = LawRate(PowerLaw(1.0, 2.0, 0.5))
    expected = rate(np.array([0.0, 3.0]))
    assert expected.tolist() == pytest.approx([rate(0.0), rate(3.0)], rel=1e-15)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        found = rate(torch.tensor([0.0, 3.0], dtype=dtype))
        assert found.dtype is dtype
        np.testing.assert_allclose(found.double().numpy(), expected, rtol=4 * torch.finfo(dtype).eps)
    assert isinstance(rate(3.0), float)
    assert pickle.loads(pickle.dumps(rate)) == rate


def test_extreme_norms_give_limits_and_no_errors():
    rate = LawRate(PowerLaw(1.0, 2.0, 2.0))
    for norm in (1e200, math.inf, np.float64(1e200)):
        assert rate(norm) == 0.0
    assert math.isnan(rate(math.nan))
    assert LawRate(PowerLaw(0.0, 2.0, 0.5))(0.0) == math.inf
    assert LawRate(PowerLaw(0.0, 2.0, 0.5))(np.zeros(1)) == math.inf
    assert LawRate(lambda norm: 4.0).threshold(0.2499) == math.inf
    assert LawRate(lambda norm: 4.0).threshold(0.26) == 0.0


def test_units_follow_those_of_loss_and_parameters():
    """f -> a f, x -> x / b: smoothness by a b^2, gradient norms by a b."""
    a, b, exponent = 3.0, 0.2, 0.7
    plain, scaled = PowerLaw(1.0, 2.0, exponent), PowerLaw(a * b**2, 2.0 * a * b**2 / (a * b) ** exponent, exponent)
    assert LawRate(scaled)(a * b * 5.0) * a * b**2 == pytest.approx(LawRate(plain)(5.0), rel=1e-12)
    assert LawRate(scaled).threshold(0.1 / (a * b**2)) == pytest.approx(a * b * LawRate(plain).threshold(0.1))


def iterated(norm):
    """The law of e^(e^x): f' = e^x f and f'' = (1 + e^x) f', and e^x is Lambert's W of f'."""
    return norm * (1 + lambertw(norm).real)


# Each step is at most `first` times too short: with more it lands beyond the other side, where the loss is the same.
LANDSCAPES = {
    "cubic": (problems.power(3.0, dim=2), PowerLaw(0.0, 2 * 3**0.5, 0.5), 2 / (2**0.5 - 1)),
    "quartic": (problems.power(4.0, dim=2), PowerLaw(0.0, 12 / 4 ** (2 / 3), 2 / 3), 2 / (2 ** (1 / 3) - 1)),
    "exponential": (problems.exponential(1.0, 2.0, dim=2), PowerLaw(1.0, 2.0, 1.0), 2.0),
    "hybrid": (problems.hybrid(1.0, 2.0, dim=2), lambda norm: np.maximum(1.0, 2.0 * norm), 2.0),
}


def descend(problem, law, kappa, radius):
    """Losses and smallest promised decreases of descent at kappa times the rate of the law."""
    rate = LawRate(law)
    x = torch.tensor([0.6, 0.8], dtype=torch.float64) * radius
    losses, promised = [float(problem.value(x))], []
    for _ in range(40):
        gradient = problem.gradient(x)
        norm = float(gradient.norm())
        if norm < 1e-12:
            break
        x = x - kappa * rate(norm) * gradient
        losses.append(float(problem.value(x)))
        promised.append(rate(norm) * norm**2 / 2)
    return np.array(losses), np.array(promised)


@pytest.mark.parametrize("radius", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("name", LANDSCAPES)
def test_every_step_lowers_the_loss_by_what_the_proof_promises(name, radius):
    problem, law, _ = LANDSCAPES[name]
    losses, promised = descend(problem, law, 1.0, radius)
    assert (-np.diff(losses) >= promised * (1 - 1e-9) - 1e-15).all()
    assert losses[-1] - problem.f_min < 0.2 * (losses[0] - problem.f_min)


@pytest.mark.parametrize("name", LANDSCAPES)
def test_rate_that_is_as_many_times_larger_as_the_landscape_allows_raises_the_loss(name):
    problem, law, first = LANDSCAPES[name]
    assert (np.diff(descend(problem, law, 0.99 * first, 1e-3)[0]) < 0).all()
    assert (np.diff(descend(problem, law, 1.05 * first, 1e-3)[0]) > 0).any()


def test_iterated_exponential_descends_by_its_own_law_and_not_at_three_times_its_line():
    """No line bounds its smoothness. The law has a closed form, and the rate takes any law."""
    rate, x, losses = LawRate(iterated), 2.0, []
    for _ in range(60):
        losses.append(math.exp(math.exp(x)))
        gradient = math.exp(x) * losses[-1]
        x -= rate(gradient) * gradient
    assert (np.diff(losses) < 0).all()
    assert losses[-1] < 0.01 * losses[0]


@pytest.mark.thorough
@pytest.mark.parametrize("exponent", [3.0, 4.0])
def test_fitted_power_gives_a_rate_that_descends_below_and_above_the_recorded_norms(exponent):
    problem = problems.power(exponent, dim=2)
    x = torch.tensor([0.6, 0.8], dtype=torch.float64)
    radii = np.random.default_rng(0).permutation(np.geomspace(0.3, 5.0, 300))
    rows = [(float(problem.gradient(x * r).norm()), float(problem.hessian_norm(x * r))) for r in radii]
    frame = pd.DataFrame(rows, columns=["grad_norm", "smoothness"]).assign(saturation=0.1)
    fit = fit_smoothness(frame, num_boot=50)
    assert fit.verdict is Verdict.POWER
    rate = step_rate(fit)
    assert isinstance(rate, LawRate)
    for start in (0.1, 1.0, 20.0):
        losses, _ = descend(problem, lambda norm: 1 / rate(norm), 1.0, start)
        assert (np.diff(losses) < 0).all()
    least = fit.grad_norm_quantiles[0]
    assert rate(0.0) == rate(least / 2) == rate(least)
    assert rate(torch.tensor(0.0, dtype=torch.float64)).item() == pytest.approx(rate(least), rel=1e-12)
    assert "above, the law is extrapolated" in rate.reason
    assert step_rate(fit, kappa=0.5)(1.0) == rate(1.0) / 2
    assert rate.scale(1.0, 100.0, momentum=0.9) == pytest.approx(rate(1.0) / 1000)
    assert rate.scale(1.0, 1e-9) == 1.0
    assert step_rate(replace(fit, estimator="local")).reason.endswith("would settle it.")


def test_line_of_the_theorem_and_rate_of_the_rule_agree_within_their_factors():
    """kappa / (L0 + L1 norm) lies between the integral and twice the integral."""
    integral, rule = LawRate(PowerLaw(1.0, 2.0, 1.0))(NORMS), StepRate(1.0, 2.0, 1.0, "")(NORMS)
    assert (integral <= rule * (1 + 1e-12)).all()
    assert (rule <= 2 * integral).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [("law", 3.0), ("law", PowerLaw), ("kappa", 0.0), ("kappa", 2.1), ("low", -1.0), ("low", math.inf)],
)
def test_wrong_parameters_are_refused(name, value):
    with pytest.raises(ValueError, match=f"Parameter `{name}` should be"):
        LawRate(**{"law": PowerLaw(1.0, 1.0, 1.0), name: value})


@pytest.mark.parametrize("rate", [StepRate(1.0, 2.0, 1.0, ""), LawRate(lambda norm: 1 + 2 * norm)])
def test_a_norm_below_zero_is_refused(rate):
    for norm in (-1.0, np.float64(-1.0), -math.inf):
        with pytest.raises(ValueError, match="`grad_norm` should be a norm"):
            rate(norm)
