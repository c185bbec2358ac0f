"""fits.scans.doubts: each doubt is raised where its cause is, and not where it is not."""

import numpy as np
import pandas as pd
import pytest
from scans import NAMES, linear, scanned

from smoothdiag.fits import Verdict, fit_smoothness
from smoothdiag.fits.scans.doubts import within
from smoothdiag.fits.scans.lines import select_lines


def flags(frame, **options):
    return {flag.name: flag for flag in fit_smoothness(frame, num_boot=100, **options).flags}


def test_a_clean_law_has_no_flag():
    assert flags(scanned(linear), quantile=0.8) == {}


def test_secants_never_decide():
    found = fit_smoothness(scanned(linear, estimator="local"), num_boot=60)
    assert found.verdict is Verdict.NOT_IDENTIFIED
    assert found.flags[0].name == "direction"
    assert found.flags[0].blocking


def test_distance_that_explains_as_much_blocks():
    # Every line has the same pace, so distance and gradient norm are one and the same.
    assert flags(scanned(linear, spin=0.0, falls=False))["distance"].blocking
    assert "distance" not in flags(scanned(linear))


def test_points_that_did_not_converge():
    frame = scanned(linear)
    tenth, most = (frame.assign(status=np.where(frame.index % 10 < k, "not_converged", "ok")) for k in (2, 7))
    most.loc[0, "status"] = "ok"
    assert not flags(tenth)["not converged"].blocking
    assert flags(most)["not converged"].blocking
    assert "not converged" not in flags(frame)


def test_scatter_that_grows_with_the_gradient_norm():
    rng = np.random.default_rng(0)
    frame = scanned(linear)
    size = np.where(frame["grad_norm"] > frame["grad_norm"].median(), 0.9, 0.05)
    wide = frame.assign(smoothness=frame["smoothness"] * np.exp(size * rng.standard_normal(len(frame))))
    assert "scatter" in flags(wide, quantile=0.8)
    assert "scatter" not in flags(frame, quantile=0.8)


def test_a_relation_from_line_to_line_alone_blocks():
    rng = np.random.default_rng(0)
    rows = [{"scan": "start", "point": 0, "distance": 0.0, "grad_norm": 1.0, "smoothness": 1.0}]
    for number in range(10):
        level = np.exp(0.5 * number)
        rows += [
            {"scan": f"to {number}", "point": p, "distance": p * level, "grad_norm": level * np.exp(0.3 * rng.normal()),
             "smoothness": level * np.exp(0.3 * rng.normal())}
            for p in range(1, 20)
        ]  # fmt: skip
    frame = pd.DataFrame(rows).assign(estimator="hessian_norm")
    assert abs(within(select_lines(frame, None, "all")[1])) < 0.25
    assert flags(frame)["within lines"].blocking
    assert "within lines" not in flags(scanned(linear))


def test_one_line_that_makes_all_of_the_rise_leaves_the_law_open():
    frame = scanned(lambda x, distance, loss: 1.0, points=6)
    steep = frame["scan"] == "to b"
    frame.loc[steep, "smoothness"] *= 40 * frame.loc[steep, "grad_norm"]
    frame.loc[steep, "grad_norm"] *= 40
    assert fit_smoothness(frame, num_boot=100).verdict is Verdict.NOT_IDENTIFIED


def test_one_line_that_decides_the_slope_is_named():
    frame = scanned(linear, names=NAMES[:5])
    frame.loc[frame["scan"] == "update", "smoothness"] *= frame["grad_norm"]
    assert "'update'" in flags(frame)["leverage"].evidence
    assert "leverage" not in flags(scanned(linear))


def test_a_quantile_that_rests_on_one_line():
    frame = scanned(linear)
    frame.loc[frame["scan"] == "update", "smoothness"] *= 3
    assert "1 line" in flags(frame)["few above"].evidence
    assert "few above" not in flags(frame, quantile=0.5)


@pytest.mark.parametrize(("names", "expected"), [(NAMES[:3], True), (NAMES[:4], False)])
def test_few_lines(names, expected):
    assert ("few lines" in flags(scanned(linear, names=names))) is expected
