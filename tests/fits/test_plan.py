"""fits.plan, fits.needed: errors agree with simulated fits, and rows are promised only where rows help."""

import math
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pandas as pd
import pytest

from smoothdiag.fits import Flag, Verdict, checks, fit_smoothness
from smoothdiag.fits.affine import pinball, quantile_line, relative_weights
from smoothdiag.fits.artefacts import MIN_POINTS
from smoothdiag.fits.base import HessianCheck
from smoothdiag.fits.models import fit_constant, fit_power
from smoothdiag.fits.needed import (
    FEWEST,
    IN_TAIL,
    MIN_DECADES,
    MIN_SKILL,
    Law,
    over,
    relative_errors,
    rows_for_exponent,
    rows_for_line,
    skill_of_line,
)
from smoothdiag.fits.plan import LARGEST_EXPONENT, SCAN_GRADIENTS
from smoothdiag.fits.scans.shapes import EXPONENTS
from smoothdiag.fits.verdict import MIN_SKILL as ASKED

NORMS = np.logspace(-1.0, 1.0, 200)
LINE = fit_smoothness(
    pd.DataFrame({"grad_norm": NORMS, "smoothness": 1 + 2 * NORMS, "saturation": 0.1}).sample(frac=1, random_state=0),
    num_boot=20,
)
FIT = replace(
    LINE, spread=0.5, quantile=0.8, num_points=30, num_effective=15.0, row_cost=(3.0, 1.5), flags=(),
    verdict=Verdict.NOT_IDENTIFIED, estimator="local",
)  # fmt: skip
RANGE = Flag("range", "", "", "", blocking=True)
TREND = Flag("time trend", "", "", "fit other seeds", blocking=True)
FEW = Flag("few points", "", "", "", blocking=True)


def drawn(count: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = 10 ** rng.uniform(-1, 1, count)
    return x, (1 + 2 * x) * np.exp(noise * rng.standard_normal(count))


@pytest.mark.parametrize("quantile", [0.5, 0.8])
def test_standard_error_of_a_slope_is_that_of_simulated_fits(quantile):
    """The standard deviation of forty numbers is known to 11%."""
    slopes = []
    for seed in range(40):
        x, y = drawn(300, 0.4, seed)
        slopes.append(quantile_line(x, y, quantile, relative_weights(x, y)).slope)
    error = relative_errors(NORMS, Law(1.0, 2.0, 0.4, quantile))[0] / math.sqrt(300)
    assert np.std(slopes) / np.mean(slopes) == pytest.approx(error, rel=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("quantile", [0.5, 0.8])
def test_standard_error_of_a_free_exponent_is_that_of_simulated_fits(quantile):
    exponents = []
    for seed in range(60):
        x, y = drawn(300, 0.4, seed)
        exponents.append(fit_power(x, y, relative_weights(x, y), quantile).exponent)
    error = relative_errors(NORMS, Law(1.0, 2.0, 0.4, quantile))[1] / math.sqrt(300)
    assert np.std(exponents) == pytest.approx(error, rel=0.3)


@pytest.mark.slow
def test_planned_rows_show_a_line_and_half_as_many_often_do_not():
    """Planned is nine of ten; the cell and the seeds are those of no other place."""
    law = Law(1.0, 2.0, 0.4, 0.8)
    rows = rows_for_line(np.logspace(-1, 1, 101), law)
    found = {}
    for count in (int(rows), int(rows) // 2):
        fits = []
        for seed in range(100, 120):
            x, y = drawn(count, 0.4, seed)
            frame = pd.DataFrame({"grad_norm": x, "smoothness": y, "saturation": 0.1})
            fits.append(fit_smoothness(frame, quantile=0.8, num_boot=100).verdict is Verdict.L0L1)
        found[count] = sum(fits)
    assert found[int(rows)] >= 15
    assert found[int(rows) // 2] < 15


def test_error_of_a_slope_alone_is_smaller_than_that_of_a_free_exponent_and_both_follow_their_units():
    slope, exponent = relative_errors(NORMS, Law(1.0, 2.0, 0.4, 0.8))
    assert exponent > 1.4 * slope
    scaled = relative_errors(1e6 * NORMS, Law(3.0, 6e-6, 0.4, 0.8))
    np.testing.assert_allclose(scaled, (slope, exponent), rtol=1e-9)
    assert relative_errors(NORMS, Law(1.0, 2.0, 0.8, 0.8))[0] == pytest.approx(2 * slope)
    np.testing.assert_allclose(
        relative_errors(NORMS, Law(1.0, 0.0, 0.4, 0.8)), relative_errors(NORMS, Law(0.0, 1.0, 0.4, 0.8))
    )
    for bad in (
        relative_errors(NORMS[:2], Law(1.0, 2.0, 0.4, 0.8)),
        relative_errors(NORMS, Law(1.0, 2.0, math.nan, 0.8)),
    ):
        assert np.isnan(bad).all()


def test_share_that_a_line_removes_is_that_of_many_simulated_rows():
    for quantile, noise in ((0.5, 0.4), (0.8, 0.4), (0.95, 0.9)):
        x, y = drawn(40_000, noise, 0)
        height = (1 + 2 * x) * np.exp(noise * NormalDist().inv_cdf(quantile))
        weights = 1 / (1 + 2 * x)
        flat = fit_constant(x, y, weights, quantile)(x)
        line, constant = (np.mean(weights * pinball(y - model, quantile)) for model in (height, flat))
        lift = math.exp(noise * NormalDist().inv_cdf(quantile))
        found = skill_of_line(NORMS, Law(lift, 2 * lift, noise, quantile))[0]
        assert found == pytest.approx(1 - line / constant, abs=0.02)


def test_noise_is_answered_by_rows_with_what_they_cost():
    plan = FIT.plan()
    norms, law = np.array(FIT.grad_norm_quantiles), Law(FIT.L0, FIT.L1, 0.5, 0.8)
    assert plan.missing == ("rows",)
    assert plan.rows == rows_for_line(norms, law) > 20
    assert plan.rows_for_exponent == rows_for_exponent(norms, law)
    error = relative_errors(norms, law)[1]
    assert plan.rows_for_exponent == math.ceil((error * 1.64485 / 0.25) ** 2)
    assert plan.exponent_error == pytest.approx(error / math.sqrt(15))
    more = (plan.rows - 15) * 30 / 15  # Each independent row takes two.
    assert plan.gradients == pytest.approx(3 * more)
    assert plan.minutes == pytest.approx(1.5 * more / 60)
    text = " ".join(str(plan).split())
    assert f"Record {more:.0f} more rows like these, about {plan.gradients:.0f} gradients and" in text
    assert f"apart takes about {plan.rows_for_exponent:.0f} independent rows" in text
    unknown = replace(FIT, spread=math.nan).plan()
    assert math.isnan(unknown.rows)
    assert "How many is unknown" in str(unknown)
    free = replace(FIT, row_cost=(math.nan, math.nan)).plan()
    assert math.isnan(free.gradients)
    assert f"Record {more:.0f} more rows like these. About" in " ".join(str(free).split())


def test_noise_that_hides_any_line_is_not_answered_by_rows():
    plan = replace(FIT, spread=1.1).plan()
    assert plan.missing == ("noise",)
    assert math.isnan(plan.rows)
    assert math.isnan(plan.gradients)
    norms = np.array(FIT.grad_norm_quantiles)
    shown = [Law(FIT.L0, FIT.L1, plan.spread_allowed * factor, 0.8) for factor in (0.98, 1.02)]
    assert [skill_of_line(norms, law)[0] >= 0.25 for law in shown] == [True, False]
    law = Law(FIT.L0, FIT.L1, 1.1, 0.8)
    assert skill_of_line(over(norms, plan.decades_needed), law)[0] >= 0.25
    assert skill_of_line(over(norms, plan.decades_needed - 0.1), law)[0] < 0.25
    text = " ".join(str(plan).split())
    assert f"It takes {plan.decades_needed:.1f} decades of gradient norms or a noise of at most" in text
    assert "like these" not in text


@pytest.mark.parametrize("flags", [(RANGE,), (RANGE, FEW)])
def test_short_range_is_not_answered_by_rows(flags):
    plan = replace(FIT, flags=flags, decades=0.5).plan()
    assert "decades" in plan.missing
    assert math.isnan(plan.rows)
    assert math.isnan(plan.rows_for_exponent)
    assert math.isnan(plan.gradients)
    text = " ".join(str(plan).split())
    no_help = (
        "The rows are too few, too, but more rows of the same run do not help: the range comes first"
        if FEW in flags
        else "More rows of the same"
    )
    assert f"cover 0.50 decades and should cover at least 1. {no_help}" in text
    assert f"takes about {SCAN_GRADIENTS} gradients, here 4 minutes" in text
    assert "If you cannot scan, measure the first steps more often" in text
    assert "Other learning rates alone do not help" in text
    assert "like these" not in text
    scanned = " ".join(str(replace(FIT, flags=flags, decades=0.5, num_scans=11).plan()).split())
    assert "do not help" in scanned
    assert "`sd.scan(model, loss_fn, batches)` at another checkpoint" in scanned
    assert "first step" not in scanned
    late = " ".join(str(replace(FIT, flags=flags, decades=0.5, first_step=100.0).plan()).split())
    assert "If you cannot scan, record the warm-up from the first step in a further run" in late


def test_rows_over_a_wider_range_are_those_of_that_range():
    text = " ".join(str(replace(FIT, flags=(RANGE,), decades=0.5).plan()).split())
    wide = np.logspace(-1.5 / 0.95 / 2, 1.5 / 0.95 / 2, 101) * np.median(FIT.grad_norm_quantiles)
    rows = rows_for_line(wide, Law(FIT.L0, FIT.L1, 0.5, 0.8))
    assert f"With the noise of these rows, a line over 1.5 decades would take about {rows:.0f} independent rows" in text
    loud = " ".join(str(replace(FIT, flags=(RANGE,), decades=0.5, spread=2.0).plan()).split())
    assert "would take more than any number of rows: less noise is needed, too." in loud


def test_other_flags_are_answered_by_their_remedies_and_time_by_a_scan():
    plan = replace(FIT, flags=(TREND,)).plan()
    assert (plan.missing, math.isnan(plan.rows)) == (("remedy",), True)
    assert "Flag time trend: fit other seeds. More rows of the same kind do not help." in " ".join(plan.advice)
    assert "neither time nor rate can be the cause" in str(plan)
    fatal = replace(FIT, flags=(replace(TREND, name="saturation", fatal=True),), verdict=Verdict.ARTEFACT).plan()
    assert fatal.missing == ("remedy",)
    assert "scan" not in str(fatal)


def test_rows_enough_and_still_no_relation_is_said():
    plan = replace(FIT, num_effective=500.0, num_points=500).plan()
    assert plan.missing == ("relation",)
    assert "explains too little" in " ".join(str(plan).split())
    assert math.isnan(plan.gradients)


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        ({"verdict": Verdict.L0L1}, ("directions",)),
        ({"verdict": Verdict.CONSTANT, "hessian": HessianCheck(3, 1.0, (0.0, 1.0), None)}, ("directions",)),
        ({"verdict": Verdict.L0L1, "hessian": HessianCheck(60, 0.8, (1.0, 3.0), True)}, ()),
        ({"verdict": Verdict.POWER, "estimator": "hessian_norm"}, ()),
        ({"flags": (FEW,)}, ("rows",)),
    ],
)
def test_what_is_missing_follows_from_the_verdict(change, missing):
    plan = replace(FIT, **change).plan()
    assert plan.missing == missing
    assert str(plan).startswith(f"PLAN after {plan.verdict}: {'missing: ' if missing else 'nothing is missing'}")
    assert len(str(plan).splitlines()) < 20


def test_thresholds_are_those_of_the_flags():
    assert max(EXPONENTS) == LARGEST_EXPONENT
    assert (MIN_DECADES, FEWEST, IN_TAIL) == (checks.MIN_DECADES, MIN_POINTS, checks.MIN_IN_TAIL)
    assert MIN_SKILL == ASKED


def test_a_scan_asks_for_lines_and_their_gradients():
    scanned = replace(FIT, num_scans=14, estimator="hessian_norm", data="fixed", exponent_interval=(0.4, 1.6))
    plan = scanned.plan()
    assert plan.missing == ("lines",)
    # Twice the width that is enough takes four times the lines.
    assert plan.gradients == pytest.approx(4 * SCAN_GRADIENTS)
    assert "toward=" in str(plan)
    assert math.isnan(plan.rows)
    assert replace(scanned, flags=(RANGE,)).plan().missing == ("decades",)
    unknown = replace(scanned, exponent_interval=(0.4, 3.0)).plan()
    assert math.isnan(unknown.gradients)
    assert "unknown" in str(unknown)
