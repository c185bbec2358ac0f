"""fits.scans: a scan gets the verdict of its law, and no law where something else explains its points."""

import math

import numpy as np
import pytest
from scans import NAMES, linear, scanned

from smoothdiag.fits import SmoothnessFit, Verdict, fit_smoothness


def power(exponent):
    return lambda x, distance, loss: 0.05 + 0.95 * x**exponent


def constant(x, distance, loss):
    return 3.0


def far(x, distance, loss):
    return 1 + 2 * distance**2


def of_loss(x, distance, loss):
    return 0.3 + loss - 1.0


def fit(law=linear, *, quantile=0.95, num_boot=200, **options):
    return fit_smoothness(scanned(law, **options), quantile=quantile, num_boot=num_boot)


@pytest.mark.parametrize(
    ("law", "verdict"),
    [
        (linear, Verdict.L0L1),
        (power(0.5), Verdict.POWER),
        (power(1.5), Verdict.POWER),
        (constant, Verdict.CONSTANT),
        (of_loss, Verdict.LOSS_GAP),
        (far, Verdict.NOT_IDENTIFIED),
    ],
    ids=["line", "exponent .5", "exponent 1.5", "constant", "loss gap", "distance"],
)
def test_verdict_is_that_of_the_law(law, verdict):
    found = fit(law)
    assert found.verdict is verdict, found.verdict_reason


@pytest.mark.slow
@pytest.mark.parametrize("quantile", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("law", [constant, far, power(0.5), power(1.6)])
def test_no_law_passes_for_a_line(law, quantile):
    found = [fit(law, quantile=quantile, between=0.35, within=0.15, seed=seed).verdict for seed in range(20)]
    assert found.count(Verdict.L0L1) <= 1


@pytest.mark.slow
def test_exponent_interval_holds_the_exponent_as_often_as_it_says():
    ends = [fit(power(1.0), between=0.35, within=0.15, seed=seed).exponent_interval for seed in range(60)]
    covered = np.mean([low <= 1 <= high for low, high in ends])
    assert 0.8 <= covered, covered


def test_line_names_the_interval_of_the_exponent_and_how_far_the_points_went():
    found = fit()
    low, high = found.exponent_interval
    assert low <= 1 <= high
    assert f"between {low:.2f} and {high:.2f}" in found.verdict_reason
    farthest = scanned(linear)["distance"].max()
    assert f"10 lines out of one point, up to a distance of {farthest:.3g}" in found.verdict_reason
    assert "says nothing about other points" in found.verdict_reason


def test_exact_law_has_its_constants_and_its_intervals_hold_them():
    found = fit(between=0.0, within=0.0)
    assert [found.L0, found.L1] == pytest.approx([1, 2], rel=1e-3)
    assert found.verdict is Verdict.L0L1
    assert found.spread < 1e-3


@pytest.mark.parametrize("quantile", [0.5, 0.8, 0.95])
def test_share_of_points_at_or_below_the_line_is_the_quantile(quantile):
    found = fit(quantile=quantile, between=0.3, within=0.2)
    assert quantile <= found.coverage <= quantile + 1.01 / found.num_points
    assert found.lines["0.5"][1] / found.lines["0.5"][0] == pytest.approx(found.L1 / found.L0)
    assert "few points" not in {flag.name for flag in found.flags}


def test_numbers_of_the_fit_are_those_of_the_scan():
    found = fit()
    frame = scanned(linear)
    assert (found.num_scans, found.num_runs, found.num_points) == (10, 1, len(frame))
    assert found.row_cost == (6.0, 0.5)
    assert found.interval_freedom == 8  # nine units: the two random lines are one
    assert 10 <= found.num_effective < len(frame)
    assert found.spread == pytest.approx(0.12, abs=0.06)
    assert found.decades == pytest.approx(math.log10(np.exp(0.4 * 16)), abs=0.35)
    assert [score.name for score in found.comparison] == [
        "constant", "affine", "power", "isotonic", "distance", "loss gap",
    ]  # fmt: skip
    assert SmoothnessFit.from_dict(found.to_dict()) == found


def test_summary_speaks_of_lines_and_not_of_time():
    said = fit().summary()
    assert "error on lines left out" in said
    assert "with the distance from the start taken out" in said
    assert "later steps" not in said
    assert "with time" not in said


def test_units_only_change_the_constants():
    frame = scanned(linear)
    found = fit_smoothness(frame, num_boot=100)
    other = fit_smoothness(
        frame.assign(grad_norm=frame["grad_norm"] * 1e-40, smoothness=frame["smoothness"] * 1e60), num_boot=100
    )
    assert [other.L0, other.L1] == pytest.approx([found.L0 * 1e60, found.L1 * 1e100], rel=1e-6)
    assert other.verdict is found.verdict
    assert [s.skill for s in other.comparison] == pytest.approx([s.skill for s in found.comparison], abs=1e-6)


@pytest.mark.parametrize(("unit_x", "unit_f"), [(2.0**-98, 1.0), (1.0, 2.0**-100)])
def test_units_of_distance_and_loss_change_no_score(unit_x, unit_f):
    frame = scanned(of_loss)
    units = {"grad_norm": unit_f / unit_x, "smoothness": unit_f / unit_x**2, "loss": unit_f, "distance": unit_x}
    found = fit_smoothness(frame, num_boot=40)
    other = fit_smoothness(frame.assign(**{name: frame[name] * unit for name, unit in units.items()}), num_boot=40)
    assert other.verdict is found.verdict
    assert [s.skill for s in other.comparison] == pytest.approx([s.skill for s in found.comparison], abs=1e-9)


def test_formulas_of_the_models_are_in_the_units_of_the_caller():
    frame = scanned(far, between=0.0, within=0.0).assign(loss=np.nan)
    scores = {score.name: score for score in fit_smoothness(frame, num_boot=40).comparison}
    assert "loss gap" not in scores
    distance = scores["distance"]
    assert [distance.intercept, distance.coefficient, distance.exponent] == pytest.approx([1, 2, 2], rel=0.1)


def test_points_without_a_loss_are_fitted_without_the_loss_gap():
    found = fit_smoothness(scanned(linear).drop(columns="loss"), num_boot=60)
    assert found.verdict is Verdict.L0L1
    assert found.loss_floors == ()
    assert "loss" not in found.verdict_reason.split("out of one point")[1]


def test_short_range_says_how_smoothness_rises_and_nothing_more():
    found = fit(points=2)
    low, high = found.exponent_interval
    assert found.verdict is Verdict.NOT_IDENTIFIED
    assert found.decades < 1
    assert f"with an exponent between {low:.2f} and {high:.2f}" in found.verdict_reason


def test_short_range_is_enough_to_see_a_constant():
    assert fit(constant, points=3).verdict is Verdict.CONSTANT
    assert fit(power(0.5), points=3).verdict is not Verdict.CONSTANT


def test_one_descent_has_a_rank_correlation_and_no_verdict():
    found = fit(names=("descent",))
    assert found.verdict is Verdict.NOT_IDENTIFIED
    assert found.spearman > 0.9
    assert f"rank correlation {found.spearman:.2f}" in found.verdict_reason
    assert found.L1_interval == (0, math.inf)
    assert math.isnan(found.exponent_interval[0])
    found.summary()


@pytest.mark.parametrize("name", ["to a", "random 1"])
def test_a_line_without_a_start_is_still_no_fault(name):
    frame = scanned(linear, names=(name,))
    assert fit_smoothness(frame[frame["point"] > 0], num_boot=20).verdict is Verdict.NOT_IDENTIFIED


def test_all_default_lines_of_a_scan_are_four_units():
    names = (
        "gradient up",
        "gradient down",
        *(f"random {k}" for k in range(1, 6)),
        *(f"layers {k}" for k in range(1, 5)),
    )
    found = fit(names=names)
    assert found.interval_freedom == 3
    assert "few lines" not in {flag.name for flag in found.flags}
    few = fit(names=names[1:])
    assert few.verdict is Verdict.NOT_IDENTIFIED
    assert "10 lines, as good as 3 independent ones" in few.verdict_reason


def test_default_names_are_those_of_the_scan():
    assert {"gradient up", "gradient down", "update", "random 1", "layers 1"} <= set(NAMES)
