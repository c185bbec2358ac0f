"""plots.fit: the artists of the figure hold the rows, the line and the intervals of the fit."""

from dataclasses import replace
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from figures import NARROW, WIDE, labelled, labels
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from numpy.testing import assert_allclose, assert_array_equal

import smoothdiag as sd
from smoothdiag.plots import plot_fit

NUM_ROWS = 240
pytestmark = pytest.mark.usefixtures("no_figure_left_open")


def rows(num_rows: int = NUM_ROWS, seed: int = 0, **columns: Any) -> pd.DataFrame:
    """The law (1, 2) over three decades with a little noise, in random order."""
    rng = np.random.default_rng(seed)
    norm = 10 ** rng.uniform(-2, 1, num_rows)
    frame = pd.DataFrame(
        {
            "step": np.arange(num_rows),
            "estimator": "local",
            "group": "all",
            "grad_norm": norm,
            "smoothness": (1 + 2 * norm) * np.exp(0.1 * rng.standard_normal(num_rows)),
            "status": "ok",
        }
    )
    return frame.assign(**columns)


@pytest.fixture(scope="module")
def fit() -> sd.SmoothnessFit:
    return sd.fit_smoothness(rows(), num_boot=60)


def test_four_panels_have_units_and_the_verdict_heads_them(fit: sd.SmoothnessFit) -> None:
    panels = plot_fit(fit, rows())
    assert panels.shape == (4,)
    assert [ax.get_xlabel().split("[")[-1] for ax in panels[:3]] == [
        "loss / parameter]",
        "loss / parameter]",
        "1 / parameter]",
    ]
    assert [ax.get_ylabel() for ax in panels[:3]] == [
        "smoothness / line",
        "smoothness $L$\n[loss / parameter$^2$]",
        "$L_0$ [loss / parameter$^2$]",
    ]
    assert panels[3].get_xlabel().startswith("skill on later steps")
    assert panels[0].figure.get_suptitle() == "L0L1: L0 and L1 can be used"
    assert [ax.get_title() for ax in panels] == [
        *("Residuals", "Lines at other quantiles", "Pairs that cover every row", "Rival models")
    ]


def test_residuals_are_the_rows_over_the_line_and_their_quantile_stays_at_one(fit: sd.SmoothnessFit) -> None:
    frame = rows()
    ax = plot_fit(fit, frame)[0]
    drawn = np.asarray(labelled(ax, "rows").get_offsets())
    assert_allclose(drawn, np.stack([frame["grad_norm"], frame["smoothness"] / fit.predict(frame["grad_norm"])], 1))
    centres, heights = labelled(ax, "their 0.95 quantile").get_data()
    assert len(centres) == 6, "two rows beyond the quantile in each bin of forty"
    assert_array_equal(centres, np.sort(centres))
    assert_allclose(heights, 1, atol=0.1)
    assert set(labelled(ax, "where it should be").get_ydata()) == {1}
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")


def test_quantile_of_the_residuals_shows_a_line_that_misses(fit: sd.SmoothnessFit) -> None:
    frame = rows()
    bent = frame.assign(smoothness=frame["grad_norm"] ** 2 * (frame["smoothness"] / (1 + 2 * frame["grad_norm"])))
    heights = labelled(plot_fit(fit, bent)[0], "their 0.95 quantile").get_ydata()
    assert heights[0] < 0.01
    assert heights[-1] > 2


def test_quantile_of_a_bin_is_that_of_its_rows(fit: sd.SmoothnessFit) -> None:
    norm = np.repeat([1.0, 10.0], 40)
    ratio = np.tile(np.arange(1.0, 41.0), 2) * np.repeat([1.0, 100.0], 40)
    frame = rows(80, grad_norm=norm, smoothness=ratio * fit.predict(norm))
    centres, heights = labelled(plot_fit(fit, frame)[0], "their 0.95 quantile").get_data()
    assert_allclose(centres, [1, 10])
    assert_allclose(heights, [38, 3800])


def test_few_rows_have_no_quantile_of_their_own(fit: sd.SmoothnessFit) -> None:
    assert labels(plot_fit(fit, rows(79))[0]) == ["rows", "where it should be"]


def test_unusable_rows_are_hollow_and_rows_off_the_axes_counted(fit: sd.SmoothnessFit) -> None:
    frame = rows(status=["ok"] * (NUM_ROWS - 2) + ["failed"] * 2)
    frame.loc[[0, 1, 2], "smoothness"] = 0.0
    ax = plot_fit(fit, frame)[0]
    hollow = labelled(ax, "not usable")
    assert len(hollow.get_offsets()) == 2
    assert len(hollow.get_facecolors()) == 0
    assert ax.texts[0].get_text().startswith("3 rows not shown")
    empty = plot_fit(fit, frame.assign(smoothness=0.0))[0]
    assert "no row can be shown" in empty.texts[1].get_text()


def test_without_rows_the_first_panel_says_so(fit: sd.SmoothnessFit) -> None:
    panels = plot_fit(fit)
    assert "plot_fit(fit, data)" in panels[0].texts[0].get_text()
    assert not panels[0].collections
    assert "0.95, fitted" in labels(panels[1])


def test_lines_are_those_of_the_fit_with_the_fitted_one_in_black(fit: sd.SmoothnessFit) -> None:
    ax = plot_fit(fit, rows())[1]
    assert {*labels(ax)} == {"0.5", "0.9", "0.99", "hard", "mean", "0.95, fitted", "its interval"}
    for name, (L0, L1) in fit.lines.items():
        line = labelled(ax, "0.95, fitted" if name == "0.95" else name)
        assert_allclose(line.get_ydata(), L0 + L1 * line.get_xdata())
        assert_allclose(line.get_xdata()[[0, -1]], np.array(fit.grad_norm_quantiles)[[0, -1]])
        assert (line.get_color() == "black") == (name == "0.95")
    looks = {(line.get_color(), line._unscaled_dash_pattern[1] and "dashed") for line in ax.lines}
    assert len({color for color, _ in looks}) == len(ax.lines)
    assert len({str(line._unscaled_dash_pattern) for line in ax.lines}) == len(ax.lines)


def test_frontier_is_that_of_the_fit_with_the_pair_its_box_and_its_resamples(fit: sd.SmoothnessFit) -> None:
    ax = plot_fit(fit)[2]
    frontier = labelled(ax, "frontier")
    assert_allclose(frontier.get_xydata()[:-1], fit.frontier()[["L1", "L0"]])
    assert_allclose(labelled(ax, "fitted").get_xydata(), [[fit.L1, fit.L0]])
    assert_allclose(labelled(ax, "hard").get_xydata(), [fit.lines["hard"][::-1]])
    assert_allclose(labelled(ax, "resamples").get_offsets(), np.array(fit.replicates)[:, ::-1])
    box = labelled(ax, "90% intervals").get_bbox()
    assert_allclose([box.x0, box.x1], fit.L1_interval)
    assert_allclose([box.y0, box.y1], fit.L0_interval)
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    for L1 in (*fit.L1_interval, fit.L1, fit.lines["hard"][1]):
        assert left < L1 < right
    for L0 in (*fit.L0_interval, fit.L0, fit.lines["hard"][0]):
        assert bottom < L0 < top


def test_endless_interval_has_no_box_and_a_long_one_does_not_squeeze_the_pair(fit: sd.SmoothnessFit) -> None:
    few = plot_fit(sd.fit_smoothness(rows(6)))[2]
    assert "no 90% intervals" in labels(few)
    assert np.isfinite([*few.get_xlim(), *few.get_ylim()]).all()
    long = plot_fit(replace(fit, L1_interval=(0.0, 1e9)))[2]
    assert long.get_xlim()[0] == 0
    assert long.get_xlim()[1] < 5 * fit.L1


@pytest.mark.thorough
def test_skill_of_every_model_there_is_stands_with_its_interval(fit: sd.SmoothnessFit) -> None:
    other = replace(fit.comparison[1], name="another", skill=0.5, skill_interval=(-9.0, 0.75))
    scores = (*fit.comparison[:3], other)
    ax = plot_fit(replace(fit, comparison=scores))[3]
    names = ["constant", "affine", f"power {fit.comparison[2].exponent:.2f}", "another"]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == names
    for place, (name, score) in enumerate(zip(names, scores, strict=True)):
        assert_allclose(labelled(ax, name).get_xydata(), [[score.skill, place]])
    bars = {int(line.get_ydata()[0]): line.get_xdata() for line in ax.lines if len(line.get_xdata()) == 2}
    assert_allclose(bars[1], fit.comparison[1].skill_interval)
    assert_allclose(bars[3], [-1, 0.75])
    assert [line.get_xydata().tolist() for line in ax.lines if line.get_marker() == 4] == [[[-1, 3]]], "a caret"
    assert len({labelled(ax, name).get_marker() for name in names}) == len(names)


def test_models_of_the_fit_all_have_a_place_of_their_own(fit: sd.SmoothnessFit) -> None:
    ax = plot_fit(fit)[3]
    for tick, score in zip(ax.get_yticklabels(), fit.comparison, strict=True):
        assert tick.get_text().startswith(score.name)


def test_skill_beyond_the_axis_is_no_marker_within_it(fit: sd.SmoothnessFit) -> None:
    bad = replace(fit.comparison[1], skill=-7.0, skill_interval=(-9.0, -6.0))
    ax = plot_fit(replace(fit, comparison=(fit.comparison[0], bad)))[3]
    assert [line.get_marker() for line in ax.lines if line.get_ydata()[0] == 1 and len(line.get_xdata()) == 1] == [4]


def test_models_that_were_not_scored_say_so() -> None:
    few = sd.fit_smoothness(rows(6))
    assert np.isnan(few.comparison[1].skill)
    ax = plot_fit(few)[3]
    assert [text.get_text() for text in ax.texts] == ["not scored"] * len(few.comparison)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_smoothness_can_be_drawn(value: float) -> None:
    frame = rows(smoothness=3.0)
    found = sd.fit_smoothness(frame, num_boot=40)
    panels = plot_fit(replace(found, L0=value, L1=0.0), frame)
    for ax in panels:
        assert np.isfinite([*ax.get_xlim(), *ax.get_ylim()]).all()


def test_several_runs_and_the_group_of_the_fit_are_drawn() -> None:
    runs = [pd.concat([rows(seed=k), rows(9, group="head")]) for k in (0, 1)]
    together = sd.fit_smoothness(runs, num_boot=40)
    assert len(labelled(plot_fit(together, runs)[0], "rows").get_offsets()) == 2 * NUM_ROWS
    with pytest.raises(ValueError, match="`group` should be one of"):
        plot_fit(replace(together, group="tail"), runs)


def test_given_axes_open_no_figure_and_settings_stay(fit: sd.SmoothnessFit) -> None:
    before = mpl.rcParams.copy()
    given = Figure(layout="constrained").subplots(2, 2)
    panels = plot_fit(fit, rows(), axes=given)
    assert [*panels] == [*given.ravel()]
    assert panels[0].figure.get_suptitle() == "L0L1: L0 and L1 can be used"
    shared = plot_fit(fit, axes=[*Figure().subplots(3, 2).ravel()[:4]])
    assert shared[0].get_title() == "L0L1: L0 and L1 can be used\nResiduals", "other panels may belong to other fits"
    assert not plt.get_fignums()
    assert mpl.rcParams == before
    with pytest.raises(ValueError, match=r"`axes` should hold four axes. Found 2"):
        plot_fit(fit, axes=[*given[0]])


@pytest.mark.thorough
@pytest.mark.parametrize("width", [NARROW, WIDE])
def test_nothing_overlaps_or_leaves_the_figure(fit: sd.SmoothnessFit, width: float) -> None:
    with plt.rc_context({"figure.figsize": (width, 0.75 * width)}):
        panels = plot_fit(fit, rows())
    figure = panels[0].figure
    figure.draw_without_rendering()
    whole = figure.bbox
    boxes = [ax.get_tightbbox() for ax in panels]
    for number, box in enumerate(boxes):
        assert box.x0 >= whole.x0 - 1
        assert box.y0 >= whole.y0 - 1
        assert box.x1 <= whole.x1 + 1
        assert box.y1 <= whole.y1 + 1
        for other in boxes[:number]:
            assert not (
                box.x0 < other.x1 - 1 and other.x0 < box.x1 - 1 and box.y0 < other.y1 - 1 and other.y0 < box.y1 - 1
            )
    assert len({ax.get_position().x0 for ax in panels}) == (1 if width == NARROW else 2)
    for ax in panels:
        assert ax.get_window_extent().height > 0.1 * whole.height
        assert min(text.get_fontsize() for text in ax.get_xticklabels()) >= 8


def test_rows_beyond_the_axis_of_the_lines_are_counted() -> None:
    rng = np.random.default_rng(0)
    norm = 10 ** rng.uniform(-1, 1, 200)
    smoothness = (1 + 2 * norm) * np.exp(0.1 * rng.standard_normal(200))
    smoothness[:7] *= 1e-5
    frame = pd.DataFrame({"grad_norm": norm, "smoothness": smoothness, "saturation": 0.1})
    panel = plot_fit(sd.fit_smoothness(frame, num_boot=20), frame)[1]
    assert "7 rows not shown (beyond the axes)" in [text.get_text() for text in panel.texts]
