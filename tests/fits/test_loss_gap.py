"""fits.lossgap: smoothness that follows the loss is told from smoothness that follows the gradient norm."""

import numpy as np
import pandas as pd
import pytest
from simulated import spread

from smoothdiag.fits import Verdict, fit_smoothness
from smoothdiag.fits.affine import pinball, relative_weights
from smoothdiag.fits.lossgap import DISTANCES
from smoothdiag.fits.models import FITTERS, fit_isotonic

N = 300


def by_the_loss(rng):
    """H0 + H1 (f - f*): in half of six phases the same loss comes with gradients a tenth as large."""
    gap = 10 ** rng.uniform(-1, 1, N)
    slow = (np.arange(N) // 50) % 2 == 1
    x = np.sqrt(gap) * np.where(slow, 0.1, 1.0) * spread(rng, N, 0.5)
    return x, (1 + 2 * gap) * spread(rng, N, 0.2), 3 + gap


def by_the_gradient(rng):
    """The (1, 2) law, with a loss that follows the gradient norm as on a quadratic, up to a third."""
    x = 10 ** rng.uniform(-1, 1, N)
    return x, (1 + 2 * x) * spread(rng, N, 0.2), 3 + x**2 / 2 * spread(rng, N, 0.3)


def drift(rng):
    """Loss, gradient norm and smoothness fall with time, each with noise of its own."""
    level = 10 ** (2 * np.exp(-6 * np.arange(N) / N) - 1)
    x, y, gap = (base * spread(rng, N, 0.3) for base in (level, 1 + 2 * level, level))
    return x, y, 3 + gap


def exponential(rng):
    """The exponential landscape in one dimension: gradient norm and loss are functions of each other."""
    r = rng.uniform(0.02, 2.5, N)
    return np.expm1(2 * r) / 2, np.exp(2 * r) * spread(rng, N, 0.1), (np.expm1(2 * r) - 2 * r) / 4


def fit(run, seed, num_boot=50):
    x, y, loss = run(np.random.default_rng(seed))
    return fit_smoothness(
        pd.DataFrame({"grad_norm": x, "smoothness": y, "loss": loss, "saturation": 0.1}), num_boot=num_boot
    )


# The run, the verdicts it may get, and how many of fifty seeds must get one of them.
CASES = {
    "loss": (by_the_loss, {Verdict.LOSS_GAP}, 45),
    "gradient": (by_the_gradient, {Verdict.L0L1}, 45),
    "drift": (drift, {Verdict.NOT_IDENTIFIED}, 45),
    "exponential": (exponential, {Verdict.L0L1}, 45),
}


@pytest.mark.thorough
@pytest.mark.parametrize("case", CASES)
def test_verdict(case):
    run, allowed, _ = CASES[case]
    assert sum(fit(run, seed).verdict in allowed for seed in range(50, 53)) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_verdict_over_fifty_seeds(case):
    run, allowed, at_least = CASES[case]
    verdicts = [fit(run, seed).verdict for seed in range(50)]
    print(case, {verdict.name: verdicts.count(verdict) for verdict in set(verdicts)})
    assert sum(verdict in allowed for verdict in verdicts) >= at_least
    assert case == "loss" or Verdict.LOSS_GAP not in verdicts


def test_scan_of_the_smallest_loss():
    found = fit(by_the_loss, 0)
    assert len(found.loss_floors) == len(DISTANCES)
    assert "smallest loss anywhere from" in found.verdict_reason
    floors = [score.floor for score in found.loss_floors]
    assert floors == sorted(floors, reverse=True)
    assert floors[0] < 3.2
    gap = found.comparison[-1]
    assert gap.name == "loss gap"
    assert gap.loss == pytest.approx(min(score.loss for score in found.loss_floors), rel=1e-9)
    exponents = [score.exponent for score in found.loss_floors]
    assert min(exponents) <= 1 <= max(exponents)
    frame = found.comparison_frame()
    assert list(frame["name"][~frame["scan"]]) == ["constant", "affine", "power", "isotonic", "loss gap"]
    assert list(frame["floor"][frame["scan"]]) == floors


@pytest.mark.thorough
def test_true_gap_is_found_where_nothing_is_noise():
    rng = np.random.default_rng(0)
    gap = 10 ** rng.uniform(-1, 1, N)
    frame = pd.DataFrame({"grad_norm": 10 ** rng.uniform(-1, 1, N), "smoothness": 1 + 2 * gap, "loss": 5 + gap})
    score = fit_smoothness(frame, num_boot=20).comparison[-1]
    assert score.exponent == 1
    assert score.coefficient == pytest.approx(2, rel=1e-6)
    assert score.intercept - score.coefficient * (score.floor - 5) == pytest.approx(1, rel=1e-3)
    assert score.later_loss < 1e-6


@pytest.mark.thorough
def test_formula_of_the_score_gives_the_heights():
    rng = np.random.default_rng(0)
    gap = 10 ** rng.uniform(-1, 1, N)
    y = 1 + 2 * gap**0.5
    frame = pd.DataFrame({"grad_norm": 10 ** rng.uniform(-1, 1, N), "smoothness": y, "loss": 5 + gap})
    score = fit_smoothness(frame, num_boot=20).comparison[-1]
    assert 0.4 < score.exponent < 0.9
    heights = score.intercept + score.coefficient * (5 + gap - score.floor) ** score.exponent
    np.testing.assert_allclose(heights, y, rtol=0.05)


@pytest.mark.thorough
def test_constant_added_to_the_loss_changes_the_floor_alone():
    rng = np.random.default_rng(3)
    x, y, loss = by_the_loss(rng)
    frame = pd.DataFrame({"grad_norm": x, "smoothness": y, "loss": loss})
    first, other = (fit_smoothness(frame.assign(loss=loss + shift), num_boot=20).comparison[-1] for shift in (0, 64))
    assert other.floor - 64 == pytest.approx(first.floor, rel=1e-9)
    assert other.later_loss == pytest.approx(first.later_loss, rel=1e-9)


@pytest.mark.thorough
@pytest.mark.parametrize("loss", [np.nan, 2.0, np.where(np.arange(N) < 20, np.arange(N), np.nan)])
def test_without_losses_nothing_is_compared(loss):
    rng = np.random.default_rng(0)
    x, y, _ = by_the_gradient(rng)
    found = fit_smoothness(pd.DataFrame({"grad_norm": x, "smoothness": y, "loss": loss}), num_boot=20)
    assert [score.name for score in found.comparison] == ["constant", "affine", "power", "isotonic"]
    assert found.loss_floors == ()


@pytest.mark.thorough
def test_rows_without_a_loss_are_left_out_of_its_score():
    x, y, loss = by_the_loss(np.random.default_rng(1))
    frame = pd.DataFrame({"grad_norm": x, "smoothness": y, "loss": loss, "step": np.arange(N), "saturation": 0.1})
    some = frame.assign(loss=np.where(np.arange(N) % 3 == 0, np.nan, loss))
    whole, part = fit_smoothness(some, num_boot=20), fit_smoothness(some[np.arange(N) % 3 != 0], num_boot=20)
    assert part.num_points == 200 < whole.num_points == 300
    assert whole.comparison[-1].skill == pytest.approx(part.comparison[-1].skill, abs=0.02)


def best_monotone(x, y, weights, quantile):
    """The least loss of any monotone function with values among those of y, by dynamic programming over all of them."""
    order = np.argsort(x)
    levels = np.sort(y)
    costs = weights[order][:, None] * pinball(y[order][:, None] - levels, quantile)
    best = costs[0]
    for row in costs[1:]:
        best = row + np.minimum.accumulate(best)
    return best.min()


@pytest.mark.parametrize("quantile", [0.3, 0.5, 0.95])
def test_isotonic_is_the_ceiling_of_all_monotone_functions(quantile):
    rng = np.random.default_rng(4)
    x, y = 10 ** rng.uniform(-1, 1, 80), np.exp(rng.standard_normal(80))
    y += 0.3 * x
    weights = relative_weights(x, y)
    steps = fit_isotonic(x, y, weights, quantile)
    assert (np.diff(steps(np.sort(x))) >= 0).all()
    loss = weights @ pinball(y - steps(x), quantile)
    np.testing.assert_allclose(loss, best_monotone(x, y, weights, quantile), rtol=1e-12)
    for fitter in FITTERS.values():
        assert loss <= weights @ pinball(y - fitter(x, y, weights, quantile)(x), quantile) * (1 + 1e-12)


def test_isotonic_gives_equal_gradient_norms_one_value():
    x, y = np.repeat([1.0, 2.0, 3.0], 5), np.tile([1.0, 2.0, 3.0, 4.0, 5.0], 3) * np.repeat([1, 3, 2], 5)
    steps = fit_isotonic(x, y, np.ones(15), 0.5)
    np.testing.assert_array_equal(steps.at, [1, 2, 3])
    np.testing.assert_allclose(steps(np.array([0.5, 1.0, 9.0])), [3, 3, steps.values[-1]])


@pytest.mark.thorough
def test_where_every_floor_gives_the_same_line_units_do_not_choose_one():
    # With an exponent of 1 the fits for all f* are one line; only rounding would prefer one of them.
    rng = np.random.default_rng(1)
    x, _, loss = by_the_loss(rng)
    y = (1 + 2 * (loss - 3)) * spread(rng, N, 0.1)
    frame = pd.DataFrame({"grad_norm": x, "smoothness": y, "loss": loss, "saturation": 0.1})

    def floor(a, b):
        scaled = frame.assign(grad_norm=a * b * x, smoothness=a * b * b * y, loss=a * loss)
        return fit_smoothness(scaled, num_boot=20).comparison[-1].floor / a

    assert [floor(a, b) for a, b in ((1, 7), (1 / 7, 1), (1e-6, 1), (3, 1e5))] == pytest.approx(
        [floor(1, 1)] * 4, rel=1e-8
    )


@pytest.mark.thorough
@pytest.mark.parametrize("factor", [1e160, 1e-155, 1e-170])
def test_losses_whose_powers_overflow_are_not_known(factor):
    x, y, loss = by_the_loss(np.random.default_rng(0))
    frame = pd.DataFrame({"grad_norm": x, "smoothness": y, "loss": factor * loss, "saturation": 0.1})
    assert "loss gap" not in [score.name for score in fit_smoothness(frame, num_boot=20).comparison]
    one = frame.assign(loss=np.where(np.arange(N) == 5, -1e308, loss))
    with np.errstate(all="raise"):
        assert fit_smoothness(one, num_boot=20).comparison[-1].name == "loss gap"
