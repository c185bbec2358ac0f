"""fits.models: the rivals of the line win on rows that follow one of them, exactly or with noise."""

import numpy as np
import pytest

from smoothdiag.fits import models
from smoothdiag.fits.affine import quantile_line, relative_weights
from smoothdiag.fits.models import compare, fit_affine, fit_constant, fit_power, searched
from smoothdiag.fits.resamples import stationary_counts

X = 10 ** np.random.default_rng(0).uniform(-1.5, 1.5, 300)
LAWS = {"constant": np.full(300, 3.0), "affine": 1 + 2 * X, "power": 0.5 + 2 * X**0.6}


def scores(y, x=X):
    counts = stationary_counts(np.arange(float(len(x))), 1.0, 100, seed=0)
    return {score.name: score for score in compare(x, y, relative_weights(x, y), 0.9, counts)}


def test_constant_is_the_weighted_quantile():
    y = np.arange(1.0, 11.0)
    assert fit_constant(y, y, np.ones(10), 0.9).intercept == 9
    assert fit_constant(y, y, np.where(y == 4, 100.0, 1.0), 0.9).intercept == 4


def test_power_finds_its_exponent():
    curve = fit_power(X, LAWS["power"], relative_weights(X, LAWS["power"]), 0.9)
    np.testing.assert_allclose(curve, (0.5, 2, 0.6), rtol=2e-3)


def test_line_is_found_by_the_line():
    np.testing.assert_allclose(fit_affine(X, LAWS["affine"], np.ones(300), 0.9), (1, 2, 1), rtol=1e-9)


@pytest.mark.parametrize("law", LAWS)
def test_true_law_loses_almost_nothing_and_beats_simpler_ones(law):
    found = scores(LAWS[law])
    assert found[law].later_loss < 1e-3
    names = list(LAWS)
    for simpler in names[: names.index(law)]:
        assert found[law].later_loss < 0.1 * found[simpler].later_loss


def test_savings_are_shares_of_the_loss_of_the_baseline():
    rng = np.random.default_rng(1)
    found = scores(LAWS["affine"] * np.exp(0.2 * rng.standard_normal(300)))
    affine, power, constant = found["affine"], found["power"], found["constant"]
    assert affine.skill == pytest.approx(1 - affine.later_loss / constant.later_loss)
    assert power.gain == pytest.approx(1 - power.later_loss / affine.later_loss)
    assert (constant.skill, affine.gain) == (0, 0)
    assert affine.skill_interval[0] < affine.skill < affine.skill_interval[1]


def test_later_blocks_are_not_seen_by_the_fit():
    y = LAWS["constant"].copy()
    y[200:] *= 10  # A model that had seen the jump would lose less than .9 * (30 - 3) / 30 there.
    found = scores(y)["constant"]
    assert found.later_loss > 0.2
    assert found.later_loss > found.loss


def test_short_runs_are_not_scored():
    found = scores(LAWS["affine"][:20], X[:20])["affine"]
    assert np.isnan(found.later_loss)
    assert np.isnan(found.skill)


def test_a_power_of_many_rows_is_searched_on_some_and_fitted_to_all(monkeypatch):
    rng = np.random.default_rng(3)
    x = 10 ** rng.uniform(-1, 1, 6000)
    y = (0.5 + 2 * x**1.5) * np.exp(0.1 * rng.standard_normal(6000))
    weights = relative_weights(x, y)
    whole = fit_power(x, y, weights, 0.9)
    monkeypatch.setattr(models, "SEARCHED", 2000)
    some = fit_power(x, y, weights, 0.9)
    assert some.exponent == pytest.approx(whole.exponent, abs=0.05)
    line = quantile_line(x**some.exponent, y, 0.9, weights)
    np.testing.assert_allclose((some.intercept, some.coefficient), line, rtol=1e-9)


def test_rows_to_search_are_one_of_every_few_neighbours_and_favour_no_run(monkeypatch):
    assert searched(models.SEARCHED) == slice(None)
    monkeypatch.setattr(models, "SEARCHED", 3000)
    rows = searched(12_000)
    np.testing.assert_array_equal(rows // 4, np.arange(3000))
    assert np.bincount(rows % 4) == pytest.approx(750, abs=100)  # Four runs that take turns.


def test_means_of_resamples_are_those_of_repeated_losses():
    rng = np.random.default_rng(4)
    losses, counts = rng.uniform(1, 2, 40), rng.integers(0, 4, (9, 60)).astype(np.uint8)
    found = models.averages({"one": losses, "two": losses**2}, counts)
    for values, means in ((losses, found["one"]), (losses**2, found["two"])):
        slow = [np.mean(np.repeat(values, row[20:])) for row in counts]
        np.testing.assert_allclose(means, [*slow, np.mean(values)], rtol=1e-12)
