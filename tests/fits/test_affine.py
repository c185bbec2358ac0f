"""fits.affine, fits.walk: lines agree with brute force, with a literal primal programme and with closed forms."""

import itertools

import numpy as np
import pytest
from scipy.optimize import linprog

from smoothdiag.fits import walk
from smoothdiag.fits.affine import (
    Line,
    frontier,
    hard_envelope,
    least_squares,
    pinball,
    quantile_line,
    relative_weights,
)
from smoothdiag.fits.hull import upper_hull


def loss(line, x, y, quantile, weights):
    return float(weights @ pinball(y - line(x), quantile))


def least_loss(x, y, quantile, weights):
    """Smallest loss over all lines through two rows, or through one row with one constant at zero."""
    lines = [Line(0.0, 0.0)]
    lines += [Line(b, 0.0) for b in y] + [Line(0.0, b / a) for a, b in zip(x, y, strict=True)]
    for i, j in itertools.combinations(range(len(x)), 2):
        if x[i] != x[j]:
            slope = (y[i] - y[j]) / (x[i] - x[j])
            lines.append(Line(y[i] - slope * x[i], slope))
    return min(loss(line, x, y, quantile, weights) for line in lines if line.intercept >= 0 and line.slope >= 0)


def primal(x, y, quantile, weights):
    """The quantile programme as the textbook writes it: one pair of slacks per row."""
    n = len(x)
    cost = np.concatenate([[0, 0], quantile * weights, (1 - quantile) * weights])
    rows = np.hstack([np.ones((n, 1)), x[:, None], np.eye(n), -np.eye(n)])
    return Line(*linprog(cost, A_eq=rows, b_eq=y, bounds=(0, None), method="highs").x[:2])


def cloud(seed, n=40, *, rounded=False):
    rng = np.random.default_rng(seed)
    x = 10 ** rng.uniform(-2, 2, n)
    y = (rng.choice([0, 1.3]) + rng.choice([0, 2.1]) * x + 0.01) * np.exp(0.5 * rng.standard_normal(n))
    if rounded:  # Ties: many rows on one line, several rows with one gradient norm.
        x, y = np.round(x) + 1, np.round(y) + 1
    return x, y


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("rounded", [False, True])
def test_quantile_line_is_the_best_of_all_candidates(quantile, rounded):
    for seed in range(15):
        x, y = cloud(seed, rounded=rounded)
        weights = relative_weights(x, y) * np.random.default_rng(seed).integers(0, 3, len(x))
        best = least_loss(x, y, quantile, weights)
        for start in (None, Line(0.0, 5.0), Line(float(np.median(y)), 0.0)):
            line = quantile_line(x, y, quantile, weights, start=start)
            assert line.intercept >= 0
            assert line.slope >= 0
            assert loss(line, x, y, quantile, weights) <= best * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_quantile_line_is_the_primal_programme(seed):
    x, y = cloud(seed, n=200)
    weights = relative_weights(x, y)
    expected = primal(x, y, 0.9, weights)
    np.testing.assert_allclose(quantile_line(x, y, 0.9, weights), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_path_over_quantiles_is_that_of_the_primal_programme(seed):
    x, y = cloud(seed, n=400)
    weights = relative_weights(x, y)
    start = quantile_line(x, y, 0.95, weights)
    for quantile in (0.5, 0.9, 0.95, 0.99):
        line = quantile_line(x, y, quantile, weights, start=start)
        np.testing.assert_allclose(line, primal(x, y, quantile, weights), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("a", "b"), [(7.3, 1.0), (1.0, 0.013), (1e-30, 1e40)])
def test_lines_follow_their_units(a, b):
    x, y = cloud(4, n=4000)
    for fitted in (lambda u, v: quantile_line(u, v, 0.9), hard_envelope, least_squares):
        intercept, slope = fitted(x, y)
        np.testing.assert_allclose(fitted(a * b * x, a * b**2 * y), (a * b**2 * intercept, b * slope), rtol=1e-8)


@pytest.mark.thorough
@pytest.mark.parametrize("quantile", [0.5, 0.95])
@pytest.mark.parametrize("start", [None, Line(0.0, 500.0), Line(9.0, 0.0)])
def test_rows_put_together_give_the_line_of_all_rows(quantile, start, monkeypatch):
    x, y = cloud(1, n=walk.MANY + 200)
    weights = relative_weights(x, y) * np.random.default_rng(1).integers(0, 3, len(x))
    found = quantile_line(x, y, quantile, weights, start=start)
    monkeypatch.setattr(walk, "MANY", len(x))
    np.testing.assert_allclose(found, quantile_line(x, y, quantile, weights, start=start), rtol=1e-10, atol=1e-12)
    assert loss(found, x, y, quantile, weights) <= loss(primal(x, y, quantile, weights), x, y, quantile, weights) + 1e-6


@pytest.mark.parametrize("line", [(50.0, 0.0), (0.0, 0.0), (1e-3, 90.0)])
def test_rows_on_the_wrong_side_are_noticed(line):
    # Seen from a line this far off, the rows kept are the wrong ones, and the others lie on sides they will change.
    x, y = cloud(2, n=3000)
    weights = relative_weights(x, y)
    found = walk.Neighbours(x, y, line).walk(0.9, weights, line)
    np.testing.assert_allclose(found, quantile_line(x, y, 0.9, weights), rtol=1e-10, atol=1e-12)


def test_weights_are_one_over_the_median_of_equal_bins():
    x, y = cloud(5, n=1234)
    slow = np.empty(len(x))
    for rows in np.array_split(np.argsort(x, kind="stable"), 35):
        slow[rows] = 1 / np.median(y[rows])
    np.testing.assert_array_equal(relative_weights(x, y), slow)


@pytest.mark.parametrize("line", [None, (50.0, 0.0)])
def test_walks_for_many_weights_at_once_are_the_walks_for_each(line):
    x, y = cloud(6, n=4000)
    weights = relative_weights(x, y)
    start = quantile_line(x, y, 0.9, weights) if line is None else line
    counts = np.random.default_rng(6).poisson(1, (20, len(x))).astype(np.uint8)
    found = walk.Neighbours(x, y, start).walk_all(0.9, weights, counts, start)
    slow = [walk.walk(x, y, 0.9, weights * row, start) for row in counts]
    np.testing.assert_allclose(found, slow, rtol=1e-10, atol=1e-12)


def least_loss_centred(x, y, quantile):
    """The least loss, which the primal programme finds in coordinates without the common part of x."""
    middle, spread = np.mean(x), np.std(x)
    z, n = (x - middle) / spread, len(x)
    design = np.hstack([np.ones((n, 1)), z[:, np.newaxis], np.eye(n), -np.eye(n)])
    cost = np.concatenate([np.zeros(2), np.full(n, quantile), np.full(n, 1 - quantile)])
    bounds = [(None, None)] * 2 + [(0, None)] * (2 * n)
    # Intercept at x = 0 and slope stay at zero or above.
    low = np.zeros((2, 2 + 2 * n))
    low[0, :2], low[1, 1] = (-1, middle / spread), -1
    return linprog(cost, A_ub=low, b_ub=np.zeros(2), A_eq=design, b_eq=y, bounds=bounds).fun


@pytest.mark.parametrize("width", [1.0, 0.3, 1e-6])
def test_steps_of_a_walk_do_not_multiply_where_gradient_norms_hardly_vary(width, monkeypatch):
    rng, steps, whole = np.random.default_rng(8), [], walk._steepest_kink
    monkeypatch.setattr(walk, "_steepest_kink", lambda *rest: steps.append(1) or whole(*rest))
    x = 1 + width * rng.uniform(size=1000)
    y = (1 + 0.5 * (x - 1) / width) * np.exp(0.3 * rng.standard_normal(1000))
    weights = np.ones(1000)
    line = walk.walk(x, y, 0.9, weights, (float(np.median(y)), 0.0))
    assert len(steps) < 30
    slow = least_loss_centred(x, y, 0.9)
    assert loss(Line(*line), x, y, 0.9, weights) <= slow * (1 + 1e-9)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.2, 0.9, 1.0])
def test_a_line_search_ends_where_the_sorted_gains_use_up_the_descent(share):
    rng = np.random.default_rng(9)
    residual, movement, weights = rng.standard_normal(2000), rng.standard_normal(2000), rng.uniform(1, 2, 2000)
    moving = residual * movement > 0
    crossings, gains = (residual / movement)[moving], (weights * np.abs(movement))[moving]
    order, descent = np.argsort(crossings), share * float(np.sum(gains))
    slow = next(crossings[row] for row, sum_ in zip(order, np.cumsum(gains[order]), strict=True) if sum_ >= descent)
    assert walk._line_search(residual, movement, np.ones(2000, dtype=bool), weights, -descent) == slow
    assert walk._line_search(residual, movement, np.ones(2000, dtype=bool), weights, -9 * descent - 1e5) == np.inf


def test_the_rows_that_a_line_looks_at_one_by_one_grow_more_slowly_than_the_rows(monkeypatch):
    looked, whole = [0], walk._walk_to_vertex
    monkeypatch.setattr(walk, "_walk_to_vertex", lambda x, *rest: looked.append(looked[-1] + len(x)) or whole(x, *rest))
    for n in (10_000, 80_000):
        x, y = cloud(7, n=n)
        quantile_line(x, y, 0.9)
        looked.append(0)
    few, many = (before for before, after in itertools.pairwise(looked) if before > after)
    assert many < 8 * few * 0.7  # As the power 2/3: four times as many.


def test_quantile_line_covers_its_share_of_lognormal_noise():
    # Weights of 1/y would give .74 here.
    rng = np.random.default_rng(0)
    x = 10 ** rng.uniform(-1, 1, 4000)
    y = (1 + 2 * x) * np.exp(rng.standard_normal(4000))
    assert np.mean(y <= quantile_line(x, y, 0.95)(x)) == pytest.approx(0.95, abs=0.002)


def test_one_tiny_smoothness_does_not_pull_the_line_down():
    x, y = np.logspace(-1, 1, 100), 1 + 2 * np.logspace(-1, 1, 100)
    y[50] = 1e-12
    np.testing.assert_allclose(quantile_line(x, y, 0.95), (1, 2), rtol=1e-9)


def test_exact_law_over_three_decades_returns_its_constants():
    x = np.logspace(-3, 0, 300)
    np.testing.assert_allclose(quantile_line(x, 0.7 + 3 * x, 0.95), (0.7, 3), rtol=1e-9)


def test_constant_smoothness_has_no_slope():
    x = np.logspace(-3, 0, 300)
    intercept, slope = quantile_line(x, np.full(300, 5.0), 0.95)
    assert intercept == pytest.approx(5, rel=1e-12)
    assert slope < 1e-9


def test_least_squares_keeps_constants_nonnegative_only_when_asked():
    x = np.linspace(1, 3, 50)
    assert least_squares(x, 2 * x - 1).intercept == 0
    np.testing.assert_allclose(least_squares(x, 2 * x - 1, nonnegative=False), (-1, 2), rtol=1e-12)
    np.testing.assert_allclose(least_squares(1e6 * x, 3 + 2 * x), (3, 2e-6), rtol=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_least_squares_is_the_best_of_its_four_cases(seed):
    rng = np.random.default_rng(seed)
    x = 10 ** rng.uniform(-1, 1, 30)
    y = np.maximum(rng.normal() + rng.normal() * x + rng.standard_normal(30), 0.01)
    design = np.stack([np.ones(30), x], axis=1)
    cases = [np.linalg.lstsq(design, y)[0], [np.mean(y), 0.0], [0.0, x @ y / (x @ x)], [0.0, 0.0]]
    best = min((np.sum((y - design @ c) ** 2), tuple(c)) for c in cases if min(c) >= 0)[1]
    np.testing.assert_allclose(least_squares(x, y), best, rtol=1e-9, atol=1e-12)


def test_frontier_is_the_largest_excess_over_the_slope():
    x, y = cloud(3, n=300)
    hull = upper_hull(x, y)
    corners, _ = frontier(hull)
    at = np.concatenate([np.linspace(0, 1.5 * corners[-1], 101), corners])
    _, found = frontier(hull, at)
    np.testing.assert_allclose(found, [max(0, np.max(y - slope * x)) for slope in at], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("smoothness", "curve"),
    [
        (lambda x: 3 * x ** (2 / 3), lambda slope: 4 / slope**2),
        (lambda x: np.where(x < 2, 2 * x - x**2, 0), lambda slope: np.maximum(2 - slope, 0) ** 2 / 4),
    ],
)
def test_frontier_has_its_closed_form(smoothness, curve):
    # For y = 3 x^(2/3) the best x is (2 / slope)^3; the second is the logistic loss with a unit vector.
    x = np.logspace(-3, 3, 200_000)
    slopes = np.array([0.5, 1.0, 1.5])
    np.testing.assert_allclose(frontier(upper_hull(x, smoothness(x)), slopes)[1], curve(slopes), rtol=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_hard_envelope_is_the_lowest_line_above_all_rows(seed):
    x, y = cloud(seed, n=60)
    weights = relative_weights(x, y)
    line = hard_envelope(x, y)
    assert (y <= line(x) * (1 + 1e-12)).all()
    n = len(x)
    found = linprog([weights.sum(), weights @ x], A_ub=-np.stack([np.ones(n), x], 1), b_ub=-y, method="highs")
    assert weights @ line(x) == pytest.approx(found.fun, rel=1e-9)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_or_equal_rows_give_a_line(n):
    x, y = np.full(n, 2.0), np.full(n, 6.0)
    for line in (quantile_line(x, y, 0.95), hard_envelope(x, y), least_squares(x, y)):
        assert line(np.array(2.0)) == pytest.approx(6, rel=1e-9)


def test_hybrid_and_cosh_laws_have_their_corner_as_upper_quantile():
    x = np.logspace(-3, 2, 500)
    np.testing.assert_allclose(quantile_line(x, np.maximum(0.5, 3 * x), 0.99), (0.5, 3), rtol=0.05)
    np.testing.assert_allclose(quantile_line(x, np.hypot(0.5, 3 * x), 0.99), (0.5, 3), rtol=0.05)
