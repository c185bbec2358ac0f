"""report.figures: each run has the figures of its kind, whose captions say what this run shows."""

import pytest
from pages import lawful, recorded

from smoothdiag.report.figures import figures_of, height_of_constants
from smoothdiag.report.run import Options, read_run
from smoothdiag.report.svg import Drawing


@pytest.fixture
def readings(monkeypatch):
    """The captions of the figures of a trace by title, without drawing them."""
    monkeypatch.setattr("smoothdiag.report.figures.draw", lambda name, plot, height: Drawing(name))
    monkeypatch.setattr("smoothdiag.report.figures.draw_own", lambda name, plot: Drawing(name))

    def read(frame, **meta) -> dict[str, str]:
        figures = figures_of(read_run("run", recorded(frame, **meta), Options({"num_boot": 20})), "r-")
        assert [figure.drawing.svg for figure in figures] == [f"r-f{number}" for number in range(len(figures))]
        return {figure.title: figure.reading for figure in figures}

    return read


def test_only_a_run_of_gradient_descent_is_told_about_two_over_the_rate(readings) -> None:
    title = "Loss, gradient norm and smoothness over the steps"
    assert "2 over the learning rate" in readings(lawful(60))[title]
    assert "learning rate" not in readings(lawful(60), optimizer="AdamW", follows_gradients=False)[title]


@pytest.mark.parametrize(
    ("mode", "said"), [("clip", "AutoClip shortened the steps"), ("shadow", "It would have shortened the steps")]
)
def test_shadow_mode_shortened_nothing(readings, mode, said) -> None:
    held = {"longest_step": 0.3, "threshold": 3.0, "peak_lr": 0.1, "clip_fraction": 0.2, "clip_mode": mode}
    found = readings(lawful(30, estimator="local_clip", **held))
    assert said in found["Measured lengths and the longest step of AutoClip"]


def test_names_of_three_lines_make_a_figure_of_constants_taller() -> None:
    names = ["model.layers.0.self_attention.query_key_value"] * 6
    assert height_of_constants(names) > height_of_constants(["a"] * 6)
