"""benchmarks/reproduce: closed forms hold, races count as a literal loop does, and the page has its tables."""

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from places import REPOSITORY
from scripts import modules
from torch.testing import assert_close

from smoothdiag import problems
from smoothdiag.optim import Clipped, GradientDescent

FOLDER = REPOSITORY / "benchmarks" / "reproduce"
TWINS = {
    "x^2": problems.quadratic([2.0]),
    "x^4": problems.power(4.0),
    "exp x": problems.exp_linear([1.0]),
    "hybrid": problems.hybrid(),
    "sin x": problems.sine(),
}


@pytest.fixture(scope="module")
def bench():
    return modules(FOLDER, "curves", "experiment", "kept", "races", "surfaces", "accounts")


# How smooth


@pytest.mark.parametrize("name", ["x^2", "x^3", "x^4", "exp x", "hybrid", "sin x"])
def test_slope_and_curvature_are_derivatives_of_the_value(bench, name) -> None:
    curve, x, h = bench.curves.CURVES[name], np.linspace(-3.05, 3.05, 62), 1e-6
    np.testing.assert_allclose((curve.value(x + h) - curve.value(x - h)) / (2 * h), curve.slope(x), atol=1e-6)
    np.testing.assert_allclose((curve.slope(x + h) - curve.slope(x - h)) / (2 * h), curve.curvature(x), atol=1e-6)


@pytest.mark.parametrize("name", TWINS)
def test_curves_are_the_landscapes_of_the_library(bench, name) -> None:
    curve, twin = bench.curves.CURVES[name], TWINS[name]
    for x in (-2.3, -0.4, 0.7, 1.9):
        point = torch.tensor([x], dtype=torch.float64)
        assert_close(torch.from_numpy(curve.slope(np.array([x]))), twin.gradient(point))
        assert abs(curve.curvature(np.array([x]))[0]) == pytest.approx(float(twin.hessian_norm(point)))
    for L1 in (0.3, 1.0, 4.0):
        assert curve.frontier(L1) == pytest.approx(twin.frontier(L1))


def test_grids_find_the_frontier_and_would_find_a_wrong_one(bench) -> None:
    for curve in bench.curves.CURVES.values():
        assert bench.curves.frontier_error(curve) < 1e-3
    wrong = replace(bench.curves.CURVES["x^3"], frontier=lambda L1: 3.1 / L1)
    assert bench.curves.frontier_error(wrong) > 0.03


def test_first_order_inequality_fails_without_a_radius_and_holds_with_the_factors_up_to_one(bench) -> None:
    curves = bench.curves
    for name in ("x^3", "x^4", "hybrid"):
        pair = next(pair for pair in curves.CURVES[name].pairs if pair[1] == 1.0)
        # at x = 0 the change over d is that of the slope alone
        assert curves.first_order(curves.CURVES[name], pair, [100.0]) > 50
        assert curves.first_order(curves.CURVES[name], pair, [0.5, 1.0]) > 1.4
        assert curves.first_order(curves.CURVES[name], pair, [0.5, 1.0], scaled=True) <= 1 + 1e-9
    exp = curves.first_order(curves.CURVES["exp x"], (0.0, 1.0), [1.0])
    assert exp == pytest.approx(math.e - 1)
    assert curves.first_order(curves.CURVES["exp x"], (0.0, 1.0), [1.0], scaled=True) == pytest.approx(1)


def test_steps_below_two_are_safe_near_a_parabola_and_not_above(bench) -> None:
    assert bench.curves.safe_factor(bench.curves.CURVES["x^2"], (2.0, 1e-12)) == pytest.approx(2, abs=0.011)
    assert bench.curves.safe_factor(bench.curves.CURVES["hybrid"], (1.0, 1.0)) == pytest.approx(2, abs=0.011)
    assert bench.curves.safe_factor(bench.curves.CURVES["hybrid"], (0.5, 1.0)) < 1.05


# Races


def literal(problem, x, rate, threshold, tolerance, most=3000):
    """Steps of the library's clipped descent until the gradient is below the tolerance."""
    p = torch.tensor([x], dtype=torch.float64, requires_grad=True)
    optimizer = GradientDescent([p], Clipped(rate, threshold))
    for taken in range(most):
        p.grad = problem.gradient(p.detach())
        if float(p.grad.norm()) <= tolerance:
            return taken
        optimizer.step()
    return math.inf


@pytest.mark.parametrize("name", ["hybrid", "|x|^3", "|x|^4"])
@pytest.mark.parametrize(("rate", "threshold"), [(0.05, math.inf), (0.5, 1.0), (0.8, 0.3)])
def test_slowest_start_counts_as_in_a_literal_loop(bench, name, rate, threshold) -> None:
    races = bench.races
    problem = {"hybrid": problems.hybrid(), "|x|^3": problems.power(3.0), "|x|^4": problems.power(4.0)}[name]
    starts = races.SLOPES[name].start(50.0) * races.STARTS
    assert abs(races.SLOPES[name].gradient(starts[-1:])[0]) == pytest.approx(50)
    expected = max(literal(problem, x, rate, threshold, races.TOLERANCE) for x in starts)
    found = races.fastest(races.SLOPES[name].gradient, starts, np.array([rate]), np.array([threshold]))
    assert found == (expected, rate, threshold)


def test_setting_that_leaves_the_starts_is_out_and_the_fastest_other_wins(bench) -> None:
    races = bench.races
    gradient, starts = races.SLOPES["hybrid"].gradient, races.SLOPES["hybrid"].start(1e3) * races.STARTS
    rates = np.array([0.1, 1e-3, 1e-2])
    assert races.fastest(gradient, starts, rates, np.full(3, math.inf)).rate == 1e-2
    # too large a rate diverges; a clipped step longer than the range would go to and fro for ever
    for rate, threshold in ((0.1, math.inf), (50.0, 1.0)):
        calls = []
        with pytest.raises(races.NoneArrived):
            races.fastest(
                lambda x, calls=calls: calls.append(x) or gradient(x), starts, np.array([rate]), np.array([threshold])
            )
        assert len(calls) < 10


def test_gap_and_frontier_of_the_bounds(bench) -> None:
    races, point = bench.races, torch.tensor([1 + math.log(70.0)], dtype=torch.float64)
    assert races.SLOPES["hybrid"].gap(70.0) == pytest.approx(float(problems.hybrid().value(point)) - 0.5)
    assert races.SLOPES["|x|^4"].gap(32.0) == pytest.approx(16)
    assert races.bound_of_fixed((1.0, 2.0), 10.0, 3.0) == pytest.approx(4 * 21 * 3 / 1e-4)
    assert races.setting_of_clipped((2.0, 4.0)) == pytest.approx((0.05, 0.5))
    assert races.setting_of_clipped((2.0, 0.01)) == pytest.approx((0.05, 20))
    assert races.bound_of_clipped((2.0, 3.0), 5.0) == pytest.approx(20 * 2 * 5 / 1e-4 + 20 * 9 * 5 / 2)


def test_no_fixed_rate_beats_the_lower_bound_and_both_methods_keep_below_the_upper_ones(bench) -> None:
    found = bench.races.dilemma(100.0, 100)
    assert found["fixed_at_least"] <= found["fixed"] <= found["fixed_at_most"]
    assert found["clipped"] <= found["clipped_at_most"]
    assert found["clipped"] < found["fixed"]
    # the largest rate that does not diverge is 2 x / M, so the count is the bound but for the grid of rates
    assert found["fixed_rate"] <= 2 * (1 + math.log(100)) / 100
    assert found["fixed"] == pytest.approx(found["fixed_at_least"], rel=0.2)


def test_growth_is_the_power_between_the_last_decades(bench) -> None:
    rows = pd.DataFrame(
        {
            "name": [f"|x|^4/{k}" for k in (1, 2, 3)],
            "bound": [1e1, 1e2, 1e3],
            "fixed": [1.0, 2.0, 100.0],
            "clipped": [1.0, 5.0, 10.0],
        }
    )
    assert "| 10 to 1,000 | M^0.667 | 0.67 | 1.00 | M^0.222 | 0.22 | 0.50 |" in bench.accounts.growth_table(rows)


# The page


def test_page_has_the_tables_of_the_stored_runs(bench) -> None:
    rows = bench.kept.Kept(FOLDER / "results" / "accounts-quick.jsonl").frame()
    assert set(rows["key"]) == set(bench.accounts.cases("quick"))
    page = (REPOSITORY / "docs" / "reproduce" / "accounts.md").read_text(encoding="utf-8")
    tables = bench.accounts.tables(rows)
    assert bench.experiment.put(page, "accounts.py", tables) == page
    assert all(table in page for table in tables.values())


def test_a_run_gives_its_stored_numbers_again(bench) -> None:
    lines = (FOLDER / "results" / "accounts-quick.jsonl").read_text().splitlines()
    stored = {row["key"]: row for row in map(json.loads, lines)}["race/|x|^4/2"]
    found = bench.accounts.cases("quick")["race/|x|^4/2"]()
    assert {name: stored[name] for name in found} == found
