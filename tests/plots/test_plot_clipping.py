"""plots.clipping: the artists of the figure hold the measured lengths, the threshold and the clipped steps."""

import numpy as np
import pandas as pd
import pytest
from autoclip_runs import Run, adamw, batches, sgd
from figures import axes, starting
from numpy.testing import assert_allclose

from smoothdiag import DirectionalCurvature, StepRule, every, plot_clipping

pytestmark = pytest.mark.usefixtures("no_figure_left_open")


@pytest.fixture(scope="module")
def run():
    run = Run(sgd(2.0, 0.9), schedule=every(9)).over(batches(50))
    run.optimizer.param_groups[0]["lr"] = 8.0
    run.over(batches(20, seed=1))
    run.optimizer.param_groups[0]["lr"] = 1.0  # below its peak
    return run.over(batches(80, seed=2))


def test_lengths_steps_and_the_longest_are_those_of_trace_and_history(run) -> None:
    ax = plot_clipping(run.clipper, ax=axes(3.4))
    rows = run.probe.trace.to_frame().query("estimator == 'local_clip'")
    x, y = starting(ax, "measured length").get_data()
    assert_allclose(x, rows["step"])
    assert_allclose(y, rows["grad_norm"] / rows["smoothness"])
    x, y = starting(ax, "longest step").get_data()
    history = run.clipper.history
    assert_allclose(x, [*history["step"], rows["step"].max()])
    assert_allclose(y, [*history["longest_step"], run.clipper.longest_step])
    _, y = starting(ax, "unclipped step").get_data()
    assert_allclose(y, 10 * rows["lr"] * rows["grad_norm"], rtol=1e-9)
    assert set(rows["lr"]) == {2.0, 8.0, 1.0}


def test_a_trace_and_a_history_from_files_make_the_same_figure(run, tmp_path) -> None:
    run.clipper.history.to_csv(tmp_path / "history.csv", index=False)
    ours = plot_clipping(run.clipper, ax=axes(3.4))
    theirs = plot_clipping(run.probe.trace.to_frame(), history=pd.read_csv(tmp_path / "history.csv"), ax=axes(3.4))
    for a, b in zip(ours.lines, theirs.lines, strict=True):
        assert_allclose(np.array(a.get_data(), float), np.array(b.get_data(), float))


def test_updates_have_lengths_of_their_own_and_no_norm() -> None:
    run = Run(adamw(0.1), rule=StepRule(0.5), estimator=DirectionalCurvature("update")).over(batches(40))
    ax = plot_clipping(run.clipper, ax=axes(3.4))
    rows = run.probe.trace.to_frame().query("estimator == 'curvature_update_clip'")
    lengths = -rows["slope"] / rows["smoothness"]
    assert_allclose(starting(ax, "best step along the direction").get_data()[1], lengths[lengths > 0])
    assert len(ax.get_legend_handles_labels()[1]) == 2


def test_labels_have_units_and_stay_inside_a_narrow_figure(run) -> None:
    ax = plot_clipping(run.clipper, ax=axes(3.4))
    assert ax.get_ylabel() == "length of a step [parameter]"
    assert ax.get_xlabel() == "step"
    assert ax.get_yscale() == "log"
    figure = ax.figure
    figure.draw_without_rendering()
    box = ax.get_legend().get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
    assert box.y0 >= 0


def test_a_trace_is_enough_where_updates_are_shortened() -> None:
    run = Run(adamw(1.0)).over(batches(9))
    ax = plot_clipping(run.probe.trace, ax=axes(3.4))
    longest = next(line for line in ax.lines if line.get_label() == "longest step $S$")
    held = [row["longest_step"] for row in run.probe.trace if "longest_step" in row]
    assert list(longest.get_ydata())[: len(held)] == pytest.approx(held)


def test_without_a_history_there_is_nothing_to_draw(run) -> None:
    for data, history in (
        (Run(sgd()).probe.trace, None),
        (Run(sgd()).clipper, None),
        (run.probe.trace, pd.DataFrame()),
    ):
        with pytest.raises(ValueError, match="Parameter `history` should be the history of an AutoClip"):
            plot_clipping(data, history=history, ax=axes(3.4))
