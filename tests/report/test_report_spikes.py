"""report: a run whose trace has spikes gets a section that says how many, when, from which cause, and what to do."""

import math

import pandas as pd
import pytest
from pages import Page, lawful, recorded

from smoothdiag import Trace, write_report
from smoothdiag.report.run import Options, read_run
from smoothdiag.report.views import View

FEW = {"num_boot": 20}
HOSTILE = "<script>alert(1)</script>"


def spike(step: int, **values: object) -> dict[str, object]:
    known = {"loss_value": 4.14, "loss_usual": 0.3285, "loss_deviations": 60.0, "done": "logged", "cause": "data"}
    return {
        "step": step, "estimator": "spike", "grad_norm": 2.0, "smoothness": math.nan, "status": "not_measured",
        "data": "step", "spiked": "loss", **known, **values,
    }  # fmt: skip


def trace_of(*spikes: dict[str, object]) -> Trace:
    trace = recorded(lawful(80))
    trace.extend(spikes)
    return trace


def page_of(trace: Trace, tmp_path) -> Page:
    return Page(write_report(trace, tmp_path / "report.html", **FEW).read_text(encoding="utf-8"))


def test_the_section_has_count_figure_table_and_what_comes_next(tmp_path) -> None:
    norm = {"grad_norm_value": 2.142, "grad_norm_usual": 0.3309, "grad_norm_deviations": 9.36}
    both = {"spiked": "grad_norm loss", **norm}
    page = page_of(
        trace_of(
            spike(40, **both, explanation="The batch is unlike the others."),
            spike(55, loss_value=math.inf, loss_deviations=math.nan, done="skipped", cause="numerics"),
        ),
        tmp_path,
    )
    heads = page.inside("h2")
    assert heads[heads.index("Spikes") - 1 : heads.index("Spikes") + 2] == ["What was measured", "Spikes", "Verdict"]
    assert "2 steps spiked. By cause: 1 data, 1 numerics." in page.inside("bdi")
    assert "Spikes over the steps, and their causes." in page.inside("b")
    assert page.tags["svg"] == page.tags["figure"] == 4
    assert "usually 0.331, deviations 9.36; loss 4.14, usually 0.329, deviations 60" in page.text
    assert "loss ∞, usually 0.329, deviations –" in page.text
    assert "The batch is unlike the others." in page.text
    assert page.inside("code").count("docs/howto/spikes.md") == 1
    assert {"signals", "done", "why"} <= set(page.values("data-name"))
    assert page.tags["caption"] == page.tags["table"]


def test_without_spikes_there_is_no_section(tmp_path) -> None:
    assert "Spikes" not in page_of(trace_of(), tmp_path).inside("h2")


def test_names_and_texts_of_a_stranger_are_escaped(tmp_path) -> None:
    hostile = {name: HOSTILE for name in ("cause", "done")}
    said = f"The first module is `{HOSTILE}`. It ends with a\u202eb."
    page = page_of(trace_of(spike(40, spiked=HOSTILE.replace(" ", ""), explanation=said, **hostile)), tmp_path)
    assert "script" not in page.tags
    assert HOSTILE in page.inside("code")
    assert page.inside("bdi").count(HOSTILE) >= 3, "signal, cause and done"
    assert r"a\u202eb" in page.text
    assert "\u202e" not in page.text


def test_of_many_spikes_the_first_and_the_last_are_listed() -> None:
    run = read_run("run", trace_of(*(spike(step) for step in range(0, 60, 2))), Options(FEW))
    view = View(run, "run-1")
    assert [line["step"] for line in view.spikes] == [str(step) for step in (*range(0, 12, 2), *range(48, 60, 2))]
    assert view.spikes_caption == "The first and the last six of 30 steps."
    assert view.spikes_said == "30 steps spiked. By cause: 30 data."


def test_a_figure_of_another_signal_where_the_loss_never_spiked(monkeypatch) -> None:
    monkeypatch.setattr("smoothdiag.report.figures.draw", lambda name, plot, height: None)
    from smoothdiag.report.figures import spiked_signal

    norm = {"spiked": "grad_norm", "grad_norm_value": 2.0, "grad_norm_usual": 0.3, "grad_norm_deviations": 9.0}
    assert spiked_signal(read_run("run", trace_of(spike(4, **norm)), Options(FEW))) == "grad_norm"
    assert spiked_signal(read_run("run", trace_of(spike(4, **norm), spike(9)), Options(FEW))) == "loss"


@pytest.mark.parametrize(
    "lost", ["loss_value", "cause", *(pytest.param(name, marks=pytest.mark.slow) for name in ("done", "loss_usual"))]
)
def test_a_row_that_lacks_something_costs_its_cell_alone(lost, tmp_path) -> None:
    row = {name: value for name, value in spike(40).items() if name != lost}
    page = page_of(trace_of(row), tmp_path)
    assert "Spikes" in page.inside("h2")
    assert "could not be drawn" not in page.text


def test_a_run_that_cannot_be_fitted_is_no_log_because_it_spiked() -> None:
    failed = lawful(30, status="failed", grad_norm=math.nan, smoothness=math.nan)
    trace = recorded(pd.concat([failed, pd.DataFrame([spike(4)])]))
    found = read_run("run", trace, Options(FEW)).answer
    assert found.headline == "No threshold follows from this, because its rows cannot be fitted."
    assert "Correct loss_fn." in found.steps[0]


def test_the_benefit_of_clipping_is_drawn(tmp_path) -> None:
    row = {"estimator": "clip_benefit", "status": "not_measured", "grad_norm": math.nan, "smoothness": math.nan}
    held = {"longest_step": 0.3, "threshold": 3.0, "peak_lr": 0.1, "clip_fraction": 0.2, "clip_mode": "shadow"}
    trace = recorded(pd.concat([lawful(80), lawful(30, estimator="local_clip", **held)]))
    trace.extend([{**row, "step": step, "clip_benefit": 0.1 * step - 1, "clip_share": 0.5} for step in (5, 15, 25)])
    page = page_of(trace, tmp_path)
    assert "Was clipping worth it?" in page.text
    assert "could not be drawn" not in page.text
