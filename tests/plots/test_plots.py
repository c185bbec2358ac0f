"""plots.smoothness, plots.over_steps: the artists of the figures hold the numbers of the trace."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from figures import NARROW, WIDE, axes, labels, starting
from matplotlib import pyplot as plt
from matplotlib.collections import PathCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.testing import assert_allclose
from traces import Recorded

from smoothdiag.plots import plot_smoothness, plot_trace
from smoothdiag.plots.common import band

NUM_ROWS = 60
DISPLACEMENT = 0.05
REPLICATES = tuple((1 + 0.01 * k, 2 - 0.01 * k) for k in range(-50, 51))  # a high L0 goes with a low L1
pytestmark = pytest.mark.usefixtures("no_figure_left_open")


def rows(num_rows: int = NUM_ROWS, **columns: Any) -> pd.DataFrame:
    """A trace of the law (1, 2) over two decades, measured at displacements of one length."""
    norm = np.geomspace(0.1, 10, num_rows)
    smoothness = 1 + 2 * norm
    frame = pd.DataFrame(
        {
            "step": 20 * np.arange(num_rows),
            "group": "all",
            "estimator": "local",
            "grad_norm": norm,
            "smoothness": smoothness,
            "loss": np.linspace(3, 1, num_rows),
            "lr": 0.1,
            "saturation": smoothness * DISPLACEMENT / (2 * norm),
            "status": "ok",
        }
    )
    return frame.assign(**columns)


def law(**fields: Any) -> Any:
    """Stands in for a fit of the law (1, 2): the fields that the figure reads."""
    plain: dict[str, Any] = {
        "L0": 1.0,
        "L1": 2.0,
        "L0_interval": (0.8, 1.3),
        "L1_interval": (1.9, 2.2),
        "interval_level": 0.9,
        "interval_freedom": np.inf,
        "replicates": REPLICATES,
        "estimator": "local",
        "group": "all",
        "verdict": SimpleNamespace(name="L0L1"),
        "predict": lambda x: 1.0 + 2.0 * np.asarray(x),
    }
    return SimpleNamespace(**plain | fields)


def points(collection: PathCollection) -> np.ndarray:
    offsets = np.asarray(collection.get_offsets())
    return offsets[np.argsort(offsets[:, 0])]


@pytest.mark.parametrize("wrap", [Recorded, lambda frame: frame], ids=["trace", "frame"])
def test_points_are_the_rows_coloured_by_step_on_logarithmic_axes_with_units(wrap: Any) -> None:
    frame = rows()
    ax = plot_smoothness(wrap(frame), ax=axes())
    drawn = starting(ax, "smoothness along the gradient, 60 rows")
    assert_allclose(points(drawn), frame[["grad_norm", "smoothness"]])
    assert sorted(drawn.get_array()) == frame["step"].tolist()
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert ax.get_xlabel().endswith("[loss / parameter]")
    assert ax.get_ylabel().endswith("[loss / parameter$^2$]")
    assert "step" in [inset.get_ylabel() for inset in ax.child_axes]
    assert frame.equals(rows()), "the caller's frame was changed"


def test_log_spaced_steps_have_a_logarithmic_scale_of_colours_and_even_ones_a_linear_one() -> None:
    spaced = np.concatenate([[0], np.unique(np.geomspace(1, 1e5, NUM_ROWS).round())])
    drawn = starting(plot_smoothness(rows(len(spaced), step=spaced), ax=axes()), "smoothness")
    assert isinstance(drawn.norm, LogNorm)
    assert sorted(drawn.get_array())[:3] == [1, 1, 2], "step 0 has the colour of the first step"
    even = starting(plot_smoothness(rows(step=20 * np.arange(NUM_ROWS)), ax=axes()), "smoothness")
    assert not isinstance(even.norm, LogNorm)


def test_outliers_stay_outside_and_are_counted() -> None:
    frame = rows()
    frame.loc[[5, 9], "smoothness"] = [1e9, 1e-9]
    frame.loc[7, "grad_norm"] = 1e7
    ax = plot_smoothness(frame.assign(lr=np.nan, saturation=np.nan), ax=axes())
    assert ax.get_ylim()[1] < 100
    assert ax.get_xlim()[1] < 100
    assert [text.get_text() for text in ax.texts] == ["3 rows not shown (beyond the axes)"]


def test_a_title_of_the_users_stays_and_a_group_is_named() -> None:
    ax = axes()
    ax.set_title("mine")
    assert plot_smoothness(rows(), ax=ax).get_title() == "mine"
    head = plot_smoothness(rows(group="head$"), group="head$", ax=axes())
    assert head.get_title() == r"Smoothness against gradient norm: head\$"


def test_colour_of_a_point_is_its_own_step() -> None:
    drawn = starting(plot_smoothness(rows(), ax=axes()), "smoothness along the gradient")
    order = np.argsort(np.asarray(drawn.get_offsets())[:, 0])
    assert drawn.get_array()[order].tolist() == rows()["step"].tolist()


def test_unusable_rows_are_hollow_and_saturated_ones_are_not() -> None:
    status = ["ok"] * (NUM_ROWS - 3) + ["saturated", "below_noise_floor", "failed"]
    ax = plot_smoothness(rows(status=status), ax=axes())
    hollow = starting(ax, "not usable, 2 rows")
    assert_allclose(points(hollow), rows()[["grad_norm", "smoothness"]][-2:])
    assert len(hollow.get_facecolors()) == 0
    assert len(points(starting(ax, "smoothness along the gradient, 58 rows"))) == NUM_ROWS - 2


def test_rows_without_a_step_are_hollow_because_no_fit_takes_them() -> None:
    frame = rows(step=[np.nan, *20.0 * np.arange(1, NUM_ROWS)])
    ax = plot_smoothness(frame, ax=axes())
    assert_allclose(points(starting(ax, "not usable, 1 row")), rows()[["grad_norm", "smoothness"]][:1])


def test_figure_of_unusable_rows_alone_has_no_colour_bar() -> None:
    ax = plot_smoothness(rows(status="below_noise_floor"), fit=law(), ax=axes())
    assert len(points(starting(ax, "not usable"))) == NUM_ROWS
    assert not ax.child_axes


@pytest.mark.parametrize("column", ["grad_norm", "smoothness"])
@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_rows_off_a_logarithmic_axis_are_left_out_and_counted(column: str, value: float) -> None:
    frame = rows()
    frame.loc[[3, 7], column] = value
    ax = plot_smoothness(frame, ax=axes())
    assert len(points(starting(ax, "smoothness along the gradient, 58 rows"))) == NUM_ROWS - 2
    assert [text.get_text().startswith("2 rows not shown") for text in ax.texts] == [True]
    assert np.isfinite([*ax.get_xlim(), *ax.get_ylim()]).all()


def test_no_note_where_every_row_is_drawn() -> None:
    assert not plot_smoothness(rows(), ax=axes()).texts


def test_envelope_is_the_prediction_over_the_usable_rows() -> None:
    frame = rows(status=["ok"] * (NUM_ROWS - 10) + ["below_noise_floor"] * 10)
    ax = plot_smoothness(frame, fit=law(), ax=axes())
    x, y = starting(ax, r"$L_0 + L_1$").get_data()
    assert_allclose(y, law().predict(x))
    assert_allclose([x.min(), x.max()], frame["grad_norm"].iloc[[0, -11]])
    assert r"$L_0$ = 1, $L_1$ = 2" in " ".join(labels(ax))


def test_band_is_the_interval_of_the_height_at_each_gradient_norm() -> None:
    ax = plot_smoothness(rows(), fit=law(), ax=axes())
    x, y = starting(ax, "90% interval of the line").get_paths()[0].vertices.T
    for at in (0.1, 10.0):
        heights = [L0 + L1 * at for L0, L1 in REPLICATES]
        there = np.isclose(x, at)
        assert_allclose([y[there].min(), y[there].max()], np.quantile(heights, [0.05, 0.95]))
    middle = np.abs(x - 1) == np.abs(x - 1).min()
    assert np.ptp(y[middle]) < 0.1, "all these lines pass through (1, 3), however far their constants spread"


def test_band_contains_the_line_and_widens_with_few_degrees_of_freedom() -> None:
    shifted = tuple((L0 + 1, L1) for L0, L1 in REPLICATES)
    low, high = band(law(replicates=shifted), np.array([1.0])) or pytest.fail("no band")
    assert low[0] == 3.0 < high[0]
    few = band(law(interval_freedom=2.0), np.array([10.0]))
    many = band(law(), np.array([10.0]))
    assert few is not None
    assert many is not None
    assert few[0] < many[0] < many[1] < few[1]


def test_no_band_without_resamples() -> None:
    ax = plot_smoothness(rows(), fit=law(replicates=()), ax=axes())
    assert not any("interval" in label for label in labels(ax))
    assert np.isfinite(ax.get_ylim()).all()


def test_several_runs_are_drawn_together() -> None:
    ax = plot_smoothness([rows(), Recorded(rows(7))], ax=axes())
    assert len(points(starting(ax, "smoothness along the gradient, 67 rows"))) == NUM_ROWS + 7


def test_verdict_heads_the_legend() -> None:
    legend = plot_smoothness(rows(), fit=law(verdict=SimpleNamespace(name="ARTEFACT")), ax=axes()).get_legend()
    assert legend is not None
    assert legend.get_title().get_text() == "ARTEFACT: do not use L0 and L1"


def test_ceiling_is_what_the_displacement_allows() -> None:
    frame = rows()
    ax = plot_smoothness(frame, ax=axes())
    expected = np.stack([frame["grad_norm"], 2 * frame["grad_norm"] / DISPLACEMENT], axis=1)
    assert_allclose(points(starting(ax, "ceiling")), expected)


@pytest.mark.parametrize("saturation", [np.nan, 0.0])
def test_no_ceiling_without_saturation(saturation: float) -> None:
    assert not any(
        label.startswith("ceiling") for label in labels(plot_smoothness(rows(saturation=saturation), ax=axes()))
    )


def test_null_line_stands_at_two_over_the_rate() -> None:
    ax = plot_smoothness(rows(lr=0.1), ax=axes())
    assert set(starting(ax, "2/lr = 20 (artefact line)").get_ydata()) == {20.0}


def test_varying_rates_make_a_band() -> None:
    lr = np.where(np.arange(NUM_ROWS) < 30, 0.1, 0.4)
    band = starting(plot_smoothness(rows(lr=lr), ax=axes()), "2/lr = 5 to 20 (artefact line)")
    assert_allclose([band.get_y(), band.get_y() + band.get_height()], [5, 20])


@pytest.mark.parametrize("lr", [np.nan, 0.0])
def test_no_null_line_without_a_rate(lr: float) -> None:
    assert not any(label.startswith("2/lr") for label in labels(plot_smoothness(rows(lr=lr), ax=axes())))


@pytest.mark.parametrize(("lr", "where"), [(1e-6, "far above"), (1e6, "far below")])
def test_far_null_line_does_not_squeeze_the_points(lr: float, where: str) -> None:
    ax = plot_smoothness(rows(lr=lr, saturation=np.nan), ax=axes())
    assert any(where in label for label in labels(ax))
    low, high = ax.get_ylim()
    assert high / low < 40, "the points span a factor of 18"


def test_estimator_prefers_the_fit_then_local_then_path() -> None:
    frame = pd.concat([rows(5, estimator=name) for name in ("hessian", "path", "local")])
    fitted, chosen = {"fit": law(estimator="hessian")}, {"fit": law(), "estimator": "path"}
    drawn = [(frame, {}), (frame[:10], {}), (frame[:5], {}), (frame, fitted), (frame, chosen)]
    names = [labels(plot_smoothness(table, ax=axes(), **options))[0].split(",")[0] for table, options in drawn]
    along = "smoothness along the "
    assert names == [f"{along}gradient", f"{along}step", "hessian", "hessian", f"{along}step"]


def test_only_the_group_is_drawn() -> None:
    frame = pd.concat([rows(), rows(7, group="head")])
    assert len(points(starting(plot_smoothness(frame, group="head", ax=axes()), "smoothness along the gradient"))) == 7
    assert len(points(starting(plot_smoothness(frame, ax=axes()), "smoothness along the gradient"))) == NUM_ROWS


def test_missing_columns_that_only_decorate_do_no_harm() -> None:
    bare = rows()[["grad_norm", "smoothness"]]
    assert labels(plot_smoothness(bare, ax=axes())) == ["unnamed, 60 rows"]
    assert plot_trace(bare).shape == (3,)


@pytest.mark.parametrize("draw", [plot_smoothness, plot_trace])
@pytest.mark.parametrize(
    ("frame", "options", "message"),
    [
        (rows()[:0], {}, "should have rows. Found none"),
        (pd.DataFrame({"step": [1]}), {}, "Missing: grad_norm, smoothness"),
        (rows(), {"group": "head"}, r"`group` should be one of \['all'\]. Found `group = 'head'`"),
        (rows(), {"estimator": "path"}, r"`estimator` should be one of \['local'\]. Found `estimator = 'path'`"),
        (pd.concat([rows(estimator="a"), rows(estimator="b")]), {}, r"name one of \['a', 'b'\].*None`"),
    ],
)
def test_wrong_input_is_named(draw: Any, frame: pd.DataFrame, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(frame, **options)
    assert not plt.get_fignums()


def test_rows_without_one_to_draw_are_refused() -> None:
    with pytest.raises(ValueError, match=r"positive and finite. Found 60 rows"):
        plot_smoothness(rows(smoothness=0.0))


def test_fit_of_another_group_is_refused() -> None:
    with pytest.raises(ValueError, match="`group` should be the fit's, `head`"):
        plot_smoothness(rows(), fit=law(group="head"))


@pytest.mark.parametrize("num_rows", [1, 2, 6])
def test_few_points_still_have_two_ticks_on_each_axis(num_rows: int) -> None:
    frame = rows(num_rows, grad_norm=4.0 + 0.01 * np.arange(num_rows), smoothness=9.0, saturation=np.nan, lr=np.nan)
    ax = plot_smoothness(frame, fit=law(), ax=axes())
    for axis, (low, high) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
        inside = [tick for tick in axis.get_majorticklocs() if low <= tick <= high]
        assert len(inside) >= 2
        assert high / low > 4, "a cloud without range must not fill the axis"
        assert all(axis.get_major_formatter().format_ticks(inside))


@pytest.mark.thorough
@pytest.mark.parametrize("width", [NARROW, WIDE])
def test_nothing_overlaps_or_leaves_the_figure(width: float) -> None:
    frame = rows(status=["ok"] * 50 + ["failed"] * 10)
    frame.loc[0, "smoothness"] = 0.0
    ax = plot_smoothness(frame, fit=law(), ax=axes(width))
    ax.figure.draw_without_rendering()
    legend = ax.get_legend()
    assert legend is not None
    frame_box, legend_box, label_box = (artist.get_window_extent() for artist in (ax.figure, legend, ax.xaxis.label))
    assert legend_box.y1 <= label_box.y0
    assert label_box.y1 <= ax.get_window_extent().y0
    for box in (legend_box, label_box, ax.yaxis.label.get_window_extent(), ax.child_axes[0].get_tightbbox()):
        assert box.x0 >= frame_box.x0 - 1
        assert box.y0 >= frame_box.y0 - 1
        assert box.x1 <= frame_box.x1 + 1
    assert ax.get_window_extent().height > 0.3 * frame_box.height, "the legend takes the room of the points"
    smallest = min(text.get_fontsize() for text in (*legend.get_texts(), *ax.texts, *ax.get_xticklabels()))
    assert smallest >= 8


def test_trace_panels_hold_loss_gradient_norm_and_smoothness() -> None:
    frame = rows().sample(frac=1, random_state=0)
    panels = plot_trace(frame)
    ordered = frame.sort_values("step")
    for panel, column in zip(panels, ("loss", "grad_norm", "smoothness"), strict=True):
        x, y = panel.lines[0].get_data()
        assert_allclose(x, ordered["step"])
        assert_allclose(y, ordered[column])
    assert [panel.get_yscale() for panel in panels] == ["linear", "log", "log"]
    assert [panel.get_ylabel().split("\n")[-1] for panel in panels] == [
        *("loss", "[loss / parameter]", "[loss / parameter$^2$]")
    ]
    assert panels[-1].get_xlabel() == "step"
    assert panels[0].get_shared_x_axes().joined(panels[0], panels[2])


def test_trace_shows_two_over_the_rate_of_every_step() -> None:
    lr = np.where(np.arange(NUM_ROWS) < 30, 0.1, 0.4)
    lr[-1] = 0.0
    line = starting(plot_trace(rows(lr=lr))[2], "2/lr (artefact line)").get_ydata()
    assert_allclose(line[:-1], 2 / lr[:-1])
    assert np.isnan(line[-1])


def test_trace_leaves_out_marks_and_counts_rows() -> None:
    frame = rows(status=["ok"] * (NUM_ROWS - 4) + ["failed"] * 4)
    frame.loc[[1, 2], "smoothness"] = 0.0
    frame.loc[5, "loss"] = np.nan
    panels = plot_trace(frame)
    assert [[text.get_text().split(" (")[0] for text in panel.texts] for panel in panels] == [
        ["1 row not shown"],
        [],
        ["2 rows not shown"],
    ]
    assert len(points(starting(panels[2], "not usable"))) == 4
    assert len(panels[2].lines[0].get_xdata()) == NUM_ROWS - 6


def test_trace_draws_a_loss_even_where_no_smoothness_can_be_shown() -> None:
    panels = plot_trace(rows(smoothness=np.nan, lr=np.nan))
    assert len(panels[0].lines[0].get_xdata()) == NUM_ROWS
    assert panels[2].texts[0].get_text().startswith("60 rows not shown")


def test_runs_of_a_trace_have_names_dashes_and_markers_of_their_own() -> None:
    runs = {"no clipping": rows(), "_AutoClip_": rows(30, loss=1.0)}
    panels = plot_trace(runs)
    assert labels(panels[2]) == ["no clipping", " _AutoClip_"], "2/lr is of a single run"
    for panel in panels:
        assert len({line.get_linestyle() for line in panel.lines}) == len({x.get_marker() for x in panel.lines}) == 2
    assert labels(plot_trace([rows(), rows()])[0]) == ["run 1", "run 2"]


def test_rates_near_zero_do_not_squeeze_the_smoothness() -> None:
    panel = plot_trace(rows(lr=np.geomspace(1e-9, 0.1, NUM_ROWS)))[2]
    assert panel.get_ylim()[1] < 1000
    assert "2/lr (artefact line, far above)" in labels(plot_trace(rows(lr=1e-6))[2])


def test_loss_that_explodes_has_a_logarithmic_axis_and_one_outlier_none() -> None:
    assert plot_trace(rows(loss=np.geomspace(1, 1e6, NUM_ROWS)))[0].get_yscale() == "log"
    panel = plot_trace(rows(loss=[1e9, *np.linspace(3, 1, NUM_ROWS - 1)]))[0]
    assert panel.get_yscale() == "linear"
    assert panel.get_ylim()[1] < 4
    assert panel.texts[0].get_text() == "1 row not shown (beyond the axes)"


def test_trace_draws_on_given_axes() -> None:
    given = Figure().subplots(3)
    assert [*plot_trace(rows(), ax=given)] == [*given]
    assert [*plot_trace(rows(), ax=[*given])] == [*given]
    with pytest.raises(ValueError, match=r"`ax` should hold three axes. Found 1"):
        plot_trace(rows(), ax=given[0])


def test_given_axes_open_no_figure_and_settings_stay() -> None:
    before, backend = mpl.rcParams.copy(), mpl.get_backend()
    ax = axes()
    assert plot_smoothness(rows(), fit=law(), ax=ax) is ax
    plot_trace(rows(), ax=Figure().subplots(3))
    assert not plt.get_fignums()
    assert mpl.rcParams == before
    assert mpl.get_backend() == backend


def test_without_axes_the_current_ones_are_used() -> None:
    _, panels = plt.subplots(1, 2)
    plt.sca(panels[0])
    assert plot_smoothness(rows()) is panels[0]
    assert plt.gca() is panels[0]
    assert len(plt.get_fignums()) == 1


def test_without_any_figure_one_is_made() -> None:
    assert plot_smoothness(rows()) is plt.gca()
    assert plt.gcf().get_constrained_layout(), "the legend below the axes would be cut off"
    assert plot_trace(rows())[0].figure is plt.gcf()
    assert len(plt.get_fignums()) == 2


@pytest.mark.thorough
def test_importing_the_module_loads_no_plotting_library() -> None:
    code = "import sys, smoothdiag.plots; print({'matplotlib', 'seaborn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
