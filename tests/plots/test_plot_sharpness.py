"""plots.sharpness: the artists of the figure hold the measured curvature and its limits."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from figures import NARROW, WIDE, axes, labels, starting
from matplotlib import pyplot as plt
from matplotlib.collections import PathCollection
from networks import mlp
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

import smoothdiag as sd
from smoothdiag.names import readable
from smoothdiag.plots import plot_sharpness

NUM_ROWS = 30
LR = 0.1
CRITICAL = readable("critical_step")
pytestmark = pytest.mark.usefixtures("no_figure_left_open")


def rows(estimator: str = "sharpness", num_rows: int = NUM_ROWS, **columns: Any) -> pd.DataFrame:
    """Sharpness that rises to 2/lr, and its limit for gradient descent."""
    frame = pd.DataFrame(
        {
            "step": 20 * np.arange(num_rows),
            "group": "all",
            "estimator": estimator,
            "grad_norm": 1.0,
            "smoothness": np.linspace(5, 20, num_rows),
            "lr": LR,
            "stability_limit": np.nan if estimator == "critical_step" else 2 / LR,
            "status": "ok",
        }
    )
    return frame.assign(**columns)


def adam(limit: float = 38 / LR) -> pd.DataFrame:
    """A trace of Adam: raw rows without a limit, preconditioned ones with it, and the critical step."""
    raw = [rows(name, stability_limit=np.nan) for name in ("sharpness", "batch_sharpness")]
    twins = [rows(f"{name}_preconditioned", stability_limit=limit) for name in ("sharpness", "batch_sharpness")]
    return pd.concat([*raw, *twins, rows("critical_step")], ignore_index=True)


def test_every_estimator_is_a_line_over_the_steps_with_its_colour_and_its_marker() -> None:
    names = ["sharpness", "hessian_norm", "batch_sharpness", "curvature_update", "critical_step"]
    parts = [rows(name, smoothness=np.linspace(1, 20 + k, NUM_ROWS)) for k, name in enumerate(names)]
    frame = pd.concat([*parts, rows("local")], ignore_index=True).sample(frac=1, random_state=0)
    before = frame.copy()
    ax = plot_sharpness(frame, ax=axes())
    lines = [starting(ax, readable(name)) for name in names]
    for line, part in zip(lines, parts, strict=True):
        assert_array_equal(line.get_xdata(), part["step"])
        assert_array_equal(line.get_ydata(), part["smoothness"])
    assert len({line.get_color() for line in lines}) == len({line.get_marker() for line in lines}) == len(names)
    assert "local" not in labels(ax)
    assert (ax.get_yscale(), ax.get_xscale()) == ("log", "linear")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "curvature [loss / parameter$^2$]")
    pd.testing.assert_frame_equal(frame, before)


def test_a_trace_counts_as_its_frame() -> None:
    trace = sd.Trace()
    trace.extend(rows().to_dict("records"))
    assert_array_equal(starting(plot_sharpness(trace, ax=axes()), "sharpness").get_ydata(), rows()["smoothness"])


def test_gradient_descent_has_one_line_at_two_over_the_rate_of_every_step() -> None:
    lr = np.where(np.arange(NUM_ROWS) < 15, 0.1, 0.4)
    lr[-1] = 0.0
    with np.errstate(divide="ignore"):
        limit = 2 / lr
    ax = plot_sharpness(rows(lr=lr, stability_limit=limit), ax=axes())
    assert labels(ax) == ["sharpness", "stability limit, 2/lr"]
    line = starting(ax, "stability limit")
    assert line.get_drawstyle() == "steps-post"
    assert_array_equal(line.get_xdata(), rows()["step"])
    assert_allclose(line.get_ydata()[:-1], limit[:-1])
    assert np.isnan(line.get_ydata()[-1]), "no curvature is too large for a rate of zero"


@pytest.mark.parametrize("factor", [3.8, 38.0])
def test_another_limit_stands_beside_a_fainter_two_over_the_rate(factor: float) -> None:
    ax = plot_sharpness(rows(stability_limit=factor / LR), ax=axes())
    limit, null = starting(ax, f"stability limit, {factor:g}/lr"), starting(ax, "2/lr")
    assert_allclose(limit.get_ydata(), factor / LR)
    assert_allclose(null.get_ydata(), 2 / LR)
    assert (null.get_alpha() or 1) < (limit.get_alpha() or 1)
    low, high = ax.get_ylim()
    assert low < 5
    assert factor / LR < high


def test_limit_that_follows_no_rate_has_no_factor() -> None:
    ax = plot_sharpness(rows(stability_limit=np.linspace(30, 50, NUM_ROWS)), ax=axes())
    assert labels(ax) == ["sharpness", "stability limit", "2/lr"]


def test_critical_step_has_its_limit_at_two_over_the_rate_whatever_the_momentum() -> None:
    frame = pd.concat([rows(stability_limit=3.8 / LR), rows("critical_step")], ignore_index=True)
    ax = plot_sharpness(frame, ax=axes())
    assert labels(ax) == ["sharpness", CRITICAL, "stability limit, 3.8/lr", "2/lr, limit of the critical step"]
    alone = plot_sharpness(frame, estimators="critical_step", ax=axes())
    assert labels(alone) == [CRITICAL, "2/lr, limit of the critical step"]


def test_limit_of_a_step_is_not_lost_to_a_row_without_one() -> None:
    frame = pd.concat([rows("critical_step"), rows(num_rows=10)], ignore_index=True)
    line = starting(plot_sharpness(frame, ax=axes()), "stability limit").get_ydata()
    assert_allclose(line[:10], 2 / LR)
    assert np.isnan(line[10:]).all()


def test_unknown_optimizer_has_two_over_the_rate_alone() -> None:
    assert labels(plot_sharpness(rows(stability_limit=np.nan), ax=axes())) == ["sharpness", "2/lr"]
    bare = rows().drop(columns=["lr", "stability_limit"])
    assert labels(plot_sharpness(bare, ax=axes())) == ["sharpness"]


def test_norm_of_the_limit_is_drawn_unless_another_is_asked_for() -> None:
    ax = plot_sharpness(adam(), ax=axes())
    twins = ["sharpness, preconditioned", "batch sharpness, preconditioned"]
    assert labels(ax) == [*twins, CRITICAL, "stability limit, 38/lr", "2/lr, limit of the critical step"]
    assert ax.get_ylabel() == "preconditioned\ncurvature [1 / parameter]"

    raw = plot_sharpness(adam(), estimators=["batch_sharpness", "sharpness"], ax=axes())
    assert labels(raw) == ["sharpness", "batch sharpness"], "2/lr has another unit than the raw Hessian"
    assert raw.get_ylabel() == "curvature [loss / parameter$^2$]"

    without_limit = plot_sharpness(adam(limit=np.nan), ax=axes())
    assert labels(without_limit) == ["sharpness", "batch sharpness"]


@pytest.mark.parametrize(
    "estimators", [["sharpness", "sharpness_preconditioned"], ["critical_step", "sharpness"]], ids=str
)
def test_two_norms_in_one_figure_are_refused(estimators: list[str]) -> None:
    with pytest.raises(ValueError, match=r"`estimators` should hold either preconditioned .* \['sharpness'\] are not"):
        plot_sharpness(adam(), estimators=estimators)
    assert not plt.get_fignums()


def test_unusable_rows_are_hollow_with_the_marker_of_their_estimator() -> None:
    status = ["ok"] * (NUM_ROWS - 3) + ["saturated", "not_converged", "failed"]
    frame = pd.concat([rows(status=status), rows("batch_sharpness", status=status)], ignore_index=True)
    ax = plot_sharpness(frame, ax=axes())
    assert [label for label in labels(ax) if label.startswith("not usable")] == ["not usable"]
    hollow = [artist for artist in ax.collections if isinstance(artist, PathCollection)]
    assert len(hollow) == 2
    for artist in hollow:
        assert_allclose(artist.get_offsets(), rows()[["step", "smoothness"]][-2:])
        assert len(artist.get_facecolors()) == 0
    shapes = [artist.get_paths()[0].vertices.shape for artist in hollow]
    assert shapes[0] != shapes[1], "a circle and a triangle"
    assert len(starting(ax, "sharpness").get_xdata()) == NUM_ROWS - 2


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_rows_off_a_logarithmic_axis_are_left_out_and_counted(value: float) -> None:
    frame = rows("curvature_update")
    frame.loc[[3, 7], "smoothness"] = value
    ax = plot_sharpness(frame, ax=axes())
    assert_array_equal(starting(ax, readable("curvature_update")).get_xdata(), frame["step"].drop([3, 7]))
    assert [text.get_text().startswith("2 rows not shown") for text in ax.texts] == [True]
    assert not plot_sharpness(rows(), ax=axes()).texts


def test_warm_up_from_a_rate_near_zero_does_not_squeeze_the_curvature() -> None:
    lr = np.geomspace(1e-9, LR, NUM_ROWS)
    ax = plot_sharpness(rows(lr=lr, stability_limit=2 / lr), ax=axes())
    low, high = ax.get_ylim()
    assert 20 < high < 5000
    assert low > 1


@pytest.mark.parametrize(("lr", "where"), [(1e-6, "far above"), (1e6, "far below")])
def test_far_limit_is_named_and_off_the_axis(lr: float, where: str) -> None:
    ax = plot_sharpness(rows(lr=lr, stability_limit=2 / lr), ax=axes())
    assert labels(ax) == ["sharpness", f"stability limit, 2/lr, {where}"]
    low, high = ax.get_ylim()
    assert high / low < 10


def test_one_step_has_a_mark_for_its_limit() -> None:
    ax = plot_sharpness(rows(num_rows=1), ax=axes())
    line = starting(ax, "stability limit")
    assert line.get_marker() == "_"
    assert_allclose(line.get_ydata(), 2 / LR)


def test_only_the_group_is_drawn() -> None:
    frame = pd.concat([rows(), rows(num_rows=7, group="head")], ignore_index=True)
    assert len(starting(plot_sharpness(frame, group="head", ax=axes()), "sharpness").get_xdata()) == 7
    assert len(starting(plot_sharpness(frame, ax=axes()), "sharpness").get_xdata()) == NUM_ROWS


@pytest.mark.parametrize(
    ("frame", "options", "message"),
    [
        (rows()[:0], {}, "should have rows. Found none"),
        (pd.DataFrame({"step": [1]}), {}, "Missing: grad_norm, smoothness"),
        (rows(), {"group": "head"}, r"`group` should be one of \['all'\]. Found `group = 'head'`"),
        (rows("local"), {}, r"of curvature, one of Sharpness\(\), .*CriticalStep\(\).*Found rows of \['local'\]"),
        (rows(), {"estimators": ["local"]}, r"hold some of \['sharpness'\]. Found `estimators = \['local'\]`"),
        (rows(), {"estimators": []}, r"hold some of \['sharpness'\]. Found `estimators = \[\]`"),
        (rows(smoothness=-1.0), {}, r"positive and finite. Found 30 rows of \['sharpness'\], group `all`"),
    ],
)
def test_wrong_input_is_named(frame: pd.DataFrame, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_sharpness(frame, **options)
    assert not plt.get_fignums()


def test_axes_are_the_given_ones_else_the_current_ones_else_new() -> None:
    given = axes()
    assert plot_sharpness(rows(), ax=given) is given
    assert not plt.get_fignums()
    assert plot_sharpness(rows()) is plt.gca()
    assert plt.gcf().get_constrained_layout(), "the legend below the axes would be cut off"
    assert plot_sharpness(rows()) is plt.gca()
    assert len(plt.get_fignums()) == 1


@pytest.mark.thorough
@pytest.mark.parametrize("width", [NARROW, WIDE])
def test_nothing_overlaps_or_leaves_the_figure(width: float) -> None:
    frame = adam()
    frame.loc[frame["step"] == 0, "smoothness"] = -1.0
    frame.loc[frame["step"] == 60, "status"] = "not_converged"
    ax = plot_sharpness(frame, ax=axes(width))
    ax.figure.draw_without_rendering()
    legend = ax.get_legend()
    assert legend is not None
    frame_box, legend_box, label_box = (artist.get_window_extent() for artist in (ax.figure, legend, ax.xaxis.label))
    assert legend_box.y1 <= label_box.y0
    for box in (legend_box, label_box, ax.yaxis.label.get_window_extent(), ax.texts[0].get_window_extent()):
        assert box.x0 >= frame_box.x0 - 1
        assert box.y0 >= frame_box.y0 - 1
        assert box.x1 <= frame_box.x1 + 1
        assert box.y1 <= frame_box.y1 + 1


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_probe_records_what_the_figure_draws(name: str) -> None:
    model = mlp(4, 8, 2)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01)
    batch = torch.randn(16, 4), torch.randn(16, 2)

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    estimators = [
        sd.Sharpness(),
        sd.HessianNorm(),
        sd.DirectionalCurvature(),
        sd.DirectionalCurvature("update"),
        sd.CriticalStep(),
    ]
    options: dict[str, Any] = {"schedule": sd.every(1), "probe_batches": [batch]}
    with sd.Probe(model, optimizer, loss_fn, estimators=estimators, **options) as probe:
        for _ in range(3):
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
    ax = sd.plot_sharpness(probe.trace, ax=axes())
    suffix, limit, factor = ("", "stability", 2) if name == "SGD" else ("_preconditioned", "full-batch", 38)
    assert readable(f"sharpness{suffix}") in labels(ax)
    assert_allclose(starting(ax, f"{limit} limit, {factor}/lr").get_ydata(), factor / 0.01)
    drawn = {
        label for label in labels(ax) if not label.startswith(("stability", "full-", "small-", "2/lr", "not usable"))
    }
    recorded = probe.trace.to_frame().query("smoothness > 0")["estimator"]
    assert drawn == {readable(n) for n in recorded if n.endswith(suffix) or n == "critical_step"}


@pytest.mark.parametrize(
    ("full", "small", "others", "expected"),
    [
        (3.8, 0.2, [], ["full-batch limit, 3.8/lr", "small-batch limit, 0.2/lr", "2/lr"]),
        (38.0, 2.0, [], ["full-batch limit, 38/lr", "small-batch limit, 2/lr"]),
        (
            *(38.0, 2.0, ["critical_step"]),
            ["full-batch limit, 38/lr", "small-batch limit, 2/lr", "2/lr, limit of the critical step"],
        ),
        (2.0, 2.0, [], ["stability limit, 2/lr"]),
    ],
)
def test_small_batches_have_a_line_of_their_own_where_their_limit_differs(full, small, others, expected) -> None:
    limits = {"stability_limit": full / LR, "stability_limit_small_batch": small / LR}
    frame = pd.concat([rows(name, **limits) for name in ("batch_sharpness", *others)], ignore_index=True)
    ax = plot_sharpness(frame, ax=axes())
    assert labels(ax)[1 + len(others) :] == expected
    if full != small:
        assert_allclose(starting(ax, "full-batch limit").get_ydata(), full / LR)
        line = starting(ax, "small-batch limit")
        assert_allclose(line.get_ydata(), small / LR)
        assert line.get_linestyle() == "--"
