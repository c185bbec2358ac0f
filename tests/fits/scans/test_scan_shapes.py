"""fits.scans.shapes: the grid finds what a slow search finds, with and without resampling."""

import numpy as np
import pytest
from scipy.optimize import minimize

from smoothdiag.fits.scans.shapes import EXPONENTS, FINE_SHARES, Shapes, left_out, lift

RNG = np.random.default_rng(0)
X = np.exp(RNG.uniform(-1, 2, 60))
Y = np.log((1 + 2 * X) * np.exp(0.3 * RNG.standard_normal(60)))
COUNTS = RNG.integers(0, 3, (5, 60)).astype(float)


def squares(x, y, counts, formula):
    rest = y - formula
    return float(counts @ (rest - np.average(rest, weights=counts)) ** 2)


@pytest.mark.parametrize("counts", [np.ones(60), COUNTS[0], COUNTS[1]])
def test_line_is_the_least_squares_line_in_logarithms(counts):
    grid = Shapes(X, np.ones(1), FINE_SHARES)
    intercept, slope, exponent = (part[0] for part in grid.constants(grid.fit(Y, counts[None])))
    slow = minimize(
        lambda p: float(counts @ (Y - np.log(np.exp(p[0]) + np.exp(p[1]) * X)) ** 2), [0.0, 0.0], method="Nelder-Mead",
        options={"xatol": 1e-8, "fatol": 1e-12},
    )  # fmt: skip
    assert exponent == 1
    assert [intercept, slope] == pytest.approx(np.exp(slow.x), rel=0.02)


def test_resamples_are_fitted_as_one_by_one():
    grid = Shapes(X, EXPONENTS)
    together = grid.constants(grid.fit(Y, COUNTS))
    for number, counts in enumerate(COUNTS):
        alone = grid.constants(grid.fit(Y, counts[None]))
        assert [part[number] for part in together] == pytest.approx([part[0] for part in alone])


def test_best_shape_has_the_least_sum_of_squares_of_the_grid():
    grid = Shapes(X, EXPONENTS)
    found = grid.fit(Y, COUNTS)
    for number, counts in enumerate(COUNTS):
        every = [squares(X, Y, counts, shape) for shape in grid.table]
        assert every[found.best[number]] == pytest.approx(min(every), rel=1e-8)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5, 2.0])
def test_exact_powers_come_back(exponent):
    grid = Shapes(X, EXPONENTS)
    found = grid.fit(np.log(3 * X**exponent), np.ones((1, 60)))
    assert [part[0] for part in grid.constants(found)] == pytest.approx([0, 3, exponent], abs=1e-9)


def test_constant_smoothness_has_the_exponent_zero():
    grid = Shapes(X, EXPONENTS)
    found = grid.fit(np.full(60, np.log(5.0)), np.ones((1, 60)))
    assert [part[0] for part in grid.constants(found)] == pytest.approx([5, 0, 0])
    assert grid.rise(found, 0.1, 10.0) == pytest.approx([1])


def test_rise_is_the_ratio_of_the_heights():
    grid = Shapes(X, np.ones(1), np.array([0.25]))
    found = grid.fit(Y, np.ones((1, 60)))
    a, b, _ = (part[0] for part in grid.constants(found))
    assert grid.rise(found, 0.5, 4.0)[0] == pytest.approx((a + 4 * b) / (a + 0.5 * b))


def test_left_out_points_are_predicted_by_the_others_alone():
    unit = np.repeat(np.arange(-1, 5), 10)
    without = (unit != np.arange(5)[:, None]).astype(float)
    grid = Shapes(X, EXPONENTS)
    found = left_out(grid, Y, unit, without)
    for number in range(5):
        changed = np.where(unit == number, Y + 100, Y)
        again = left_out(grid, changed, unit, without)
        assert again[(unit == number)[unit >= 0]] == pytest.approx(found[(unit == number)[unit >= 0]])


@pytest.mark.parametrize("quantile", [0.5, 0.8, 0.95])
def test_lift_leaves_the_share_at_or_below(quantile):
    rests = np.tile(RNG.standard_normal(60), (5, 1))
    for level, rest, counts in zip(lift(rests, COUNTS, quantile), rests, COUNTS, strict=True):
        share = counts @ (rest <= level) / counts.sum()
        before = counts @ (rest < level) / counts.sum()
        assert before < quantile <= share + 1e-12
