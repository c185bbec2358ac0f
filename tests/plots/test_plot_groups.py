"""plots.groups: the artists of the figures hold the rows and the constants of several fits."""

from dataclasses import replace
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from figures import NARROW, WIDE, labelled, labels, starting
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from numpy.testing import assert_allclose

import smoothdiag as sd
from smoothdiag.plots import plot_constants, plot_groups

NUM_ROWS = 120
pytestmark = pytest.mark.usefixtures("no_figure_left_open")


def rows(group: str, seed: int = 0, **columns: Any) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    norm = 10 ** rng.uniform(-2, 1, NUM_ROWS)
    frame = pd.DataFrame(
        {
            "step": np.arange(NUM_ROWS),
            "group": group,
            "estimator": "local",
            "grad_norm": norm,
            "smoothness": (1 + 2 * norm) * np.exp(0.1 * rng.standard_normal(NUM_ROWS)),
            "saturation": 0.1,
            "status": "ok",
        }
    )
    return frame.assign(**columns)


@pytest.fixture(scope="module")
def trace() -> pd.DataFrame:
    parts = [
        rows("head", 1),
        rows("all"),
        rows("embed", 2),
        rows("dead", smoothness=0.0),
        rows("path", estimator="path"),
    ]
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="module")
def fits(trace: pd.DataFrame) -> sd.GroupFits:
    return sd.fit_groups(trace, num_boot=40)


def titles(panels: Any) -> list[str]:
    return [ax.get_title(loc="left") for ax in panels]


def test_every_group_has_a_panel_with_rows_line_and_verdict(trace: pd.DataFrame, fits: sd.GroupFits) -> None:
    panels = plot_groups(trace, fits=fits)
    assert titles(panels)[:3] == [f"{group}\n{fits[group].verdict.name}" for group in ("all", "head", "embed")]
    for ax, (group, fit) in zip(panels, fits.items(), strict=False):
        frame = trace[trace["group"] == group]
        assert_allclose(labelled(ax, "rows").get_offsets(), frame[["grad_norm", "smoothness"]])
        x, y = labelled(ax, "fitted line").get_data()
        assert_allclose(y, fit.predict(x))
        assert_allclose([x.min(), x.max()], [frame["grad_norm"].min(), frame["grad_norm"].max()])
        assert "its 90% interval" in labels(ax)


def test_groups_without_a_fit_have_a_panel_that_says_so(trace: pd.DataFrame, fits: sd.GroupFits) -> None:
    panels = plot_groups(trace, fits=fits)
    assert titles(panels)[3:] == [f"dead\nno fit\n{NUM_ROWS} rows not shown", "path\nno fit"]
    for ax in panels[3:]:
        assert not ax.lines
        assert [text.get_text() for text in ax.texts] == ["no rows to show"]


def test_axes_are_shared_and_have_units(trace: pd.DataFrame, fits: sd.GroupFits) -> None:
    panels = plot_groups(trace, fits=fits)
    figure = panels[0].figure
    assert len({ax.get_xlim() for ax in panels}) == len({ax.get_ylim() for ax in panels}) == 1
    assert {(ax.get_xscale(), ax.get_yscale()) for ax in panels} == {("log", "log")}
    assert figure.get_supxlabel().endswith("[loss / parameter]")
    assert figure.get_supylabel().endswith("[loss / parameter$^2$]")
    low, high = panels[0].get_xlim()
    shown = trace["grad_norm"]
    assert low < shown.min() < shown.max() < high
    assert len(figure.axes) == len(panels), "no empty panel is left"


def test_without_fits_the_rows_of_every_group_are_drawn(trace: pd.DataFrame) -> None:
    live = trace[~trace["group"].isin(["dead", "path"])]
    panels = plot_groups(live)
    assert titles(panels) == ["all", "head", "embed"]
    assert not any(ax.lines for ax in panels)
    assert len(plot_groups(live.drop(columns="group"))) == 1


def test_unusable_rows_are_hollow() -> None:
    (ax,) = plot_groups(rows("all", status=["ok"] * (NUM_ROWS - 2) + ["failed"] * 2))
    hollow = labelled(ax, "not usable")
    assert len(hollow.get_offsets()) == 2
    assert len(hollow.get_facecolors()) == 0


def test_several_runs_are_drawn_together() -> None:
    (ax,) = plot_groups([rows("all"), rows("all", 1)])
    assert len(labelled(ax, "rows").get_offsets()) == 2 * NUM_ROWS


@pytest.mark.parametrize(
    ("frame", "options", "message"),
    [
        (rows("head"), {"fits": True}, "`group` should be one of"),
        (rows("all", smoothness=0.0), {}, r"positive and finite. Found none in the groups \['all'\]"),
        (rows("all"), {"fits": {}}, "`fits` should hold at least one fit. Found none"),
    ],
)
def test_wrong_rows_are_named(fits: sd.GroupFits, frame: pd.DataFrame, options: dict[str, Any], message: str) -> None:
    options = {"fits": fits} if options.get("fits") else options
    with pytest.raises(ValueError, match=message):
        plot_groups(frame, **options)
    assert not plt.get_fignums()


def test_constants_stand_on_their_intervals(fits: sd.GroupFits) -> None:
    panels = plot_constants(fits)
    assert [ax.get_xlabel() for ax in panels] == ["$L_0$ [loss / parameter$^2$]", "$L_1$ [1 / parameter]"]
    assert [tick.get_text() for tick in panels[0].get_yticklabels()] == ["all", "head", "embed"]
    assert panels[0].get_ylim()[0] > panels[0].get_ylim()[1], "the first fit is on top"
    for ax, name in zip(panels, ("L0", "L1"), strict=True):
        dots = sorted(line.get_xydata()[0].tolist()[::-1] for line in ax.lines if len(line.get_xdata()) == 1)
        assert_allclose(dots, [[place, getattr(fit, name)] for place, fit in enumerate(fits.values())])
        bars = [line.get_xdata() for line in ax.lines if len(line.get_xdata()) == 2]
        assert_allclose(bars, [getattr(fit, f"{name}_interval") for fit in fits.values()])


def test_only_a_verdict_of_the_law_is_filled_and_each_has_a_look_of_its_own(fits: sd.GroupFits) -> None:
    some = fits["all"]
    named = {verdict.name: replace(some, verdict=verdict) for verdict in sd.Verdict}
    ax = plot_constants(named | {"again": some})[1]
    assert [label.split(":")[0] for label in labels(ax)] == [*named], "one entry per verdict"
    looks = {name: starting(ax, f"{name}:") for name in named}
    assert [name for name, dot in looks.items() if dot.get_markerfacecolor() != "white"] == ["L0L1"]
    assert len({dot.get_marker() for dot in looks.values()}) == len(named)
    assert len({dot.get_color() for dot in looks.values()}) == len(named)


def test_long_intervals_end_in_carets_and_squeeze_nothing(fits: sd.GroupFits) -> None:
    some = replace(fits["all"], L1=2.0, L1_interval=(1.0, 3.0))
    ax = plot_constants(
        {"a": some, "b": replace(some, L1_interval=(0.0, np.inf)), "c": replace(some, L1_interval=(1, 1e9))}
    )[1]
    carets = [line.get_xydata()[0].tolist() for line in ax.lines if line.get_marker() == 5]
    assert_allclose(carets, [[3, 1], [3, 2]])
    assert ax.get_xlim()[1] < 4


def test_constants_over_decades_have_a_logarithmic_axis_and_zero_a_linear_one(fits: sd.GroupFits) -> None:
    some = fits["all"]
    spread = {f"{L1:g}": replace(some, L1=L1, L1_interval=(0.0, 2 * L1)) for L1 in (0.1, 1.0, 100.0)}
    ax = plot_constants(spread)[1]
    assert ax.get_xscale() == "log"
    assert ax.get_xlim()[0] > 0.01
    assert [line.get_marker() for line in ax.lines].count(4) == 3, "zero is beyond the axis"
    ax = plot_constants(spread | {"none": replace(some, L1=0.0, L1_interval=(0.0, 0.0))})[1]
    assert ax.get_xscale() == "linear"
    assert ax.get_xlim()[0] <= 0


def test_given_axes_open_no_figure_and_settings_stay(fits: sd.GroupFits) -> None:
    before = mpl.rcParams.copy()
    given = Figure(layout="constrained").subplots(1, 2)
    assert [*plot_constants(fits, axes=given)] == [*given]
    assert not plt.get_fignums()
    assert mpl.rcParams == before
    with pytest.raises(ValueError, match=r"`axes` should hold two axes. Found 1"):
        plot_constants(fits, axes=given[0])
    with pytest.raises(ValueError, match="`fits` should hold at least one fit. Found none"):
        plot_constants({})


@pytest.mark.thorough
@pytest.mark.parametrize("width", [NARROW, WIDE])
def test_nothing_overlaps_or_leaves_the_figure(trace: pd.DataFrame, fits: sd.GroupFits, width: float) -> None:
    with plt.rc_context({"figure.figsize": (width, 0.75 * width)}):
        for panels in (plot_groups(trace, fits=fits), plot_constants(fits)):
            figure = panels[0].figure
            figure.draw_without_rendering()
            whole, boxes = figure.bbox, [ax.get_tightbbox() for ax in panels]
            for number, box in enumerate(boxes):
                assert min(box.x0 - whole.x0, box.y0 - whole.y0, whole.x1 - box.x1, whole.y1 - box.y1) >= -1
                for other in boxes[:number]:
                    apart = box.x0 >= other.x1 - 1 or other.x0 >= box.x1 - 1
                    assert apart or box.y0 >= other.y1 - 1 or other.y0 >= box.y1 - 1
            for ax in panels:
                assert ax.get_window_extent().height > 50 * figure.dpi / 72
                shown = [tick for tick in ax.xaxis.get_majorticklocs() if ax.get_xlim()[0] <= tick <= ax.get_xlim()[1]]
                assert len(shown) >= 2


@pytest.mark.thorough
def test_labels_that_are_numbers_or_missing_are_drawn_as_they_are_fitted() -> None:
    frame = pd.concat([rows("all"), rows("0", 1), rows("1", 2)], ignore_index=True)
    numbered = frame.assign(group=frame["group"].map({"all": "all", "0": 0, "1": 1}))
    for table in (numbered, frame.assign(group=frame["group"].where(frame["group"] != "1"))):
        fits = sd.fit_groups(table, num_boot=20, quantile=0.5)
        assert set(fits) == {"all", "0", "1"} or set(fits) == {"all", "0", "missing"}
        assert len(plot_groups(table, fits=fits)) == 3
        plt.close("all")
    assert sd.fit_smoothness(numbered, group=0, num_boot=20, quantile=0.5).group == "0"  # type: ignore[arg-type]
