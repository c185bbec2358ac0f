"""integrations.loggers.verdicts, integrations.loggers.writer: the verdict so far is the fit of the rows so far."""

import random

import numpy as np
import pytest
import torch
from logged_runs import Recorder, Run, law, row

from smoothdiag import SmoothdiagWarning, Trace, Verdict, fit_smoothness
from smoothdiag.integrations.loggers import TraceWriter

VERDICTS = {f"fit/verdict/{verdict.name}" for verdict in Verdict}


def logged(rows: list[dict], trace: Trace | None = None) -> Recorder:
    """What a sink gets if each row is written as soon as it is measured."""
    sink, trace = Recorder(), Trace() if trace is None else trace
    with TraceWriter(trace, lambda: sink) as writer:
        for one in rows:
            trace.append(one)
            writer.update()
    return sink


def test_verdicts_come_after_64_and_128_steps_and_at_the_end() -> None:
    rows = law(range(150))
    sink = logged(rows)
    judged = [(step, values) for step, values in sink.of("scalars") if values.keys() >= VERDICTS]
    assert [step for step, _ in judged] == [63, 127, 149]
    texts = sink.of("text")
    for (step, values), (at, name, text) in zip(judged, texts, strict=True):
        trace = Trace()
        trace.extend(rows[: step + 1])
        fit = fit_smoothness(trace)
        assert {name for name in VERDICTS if values[name]} == {f"fit/verdict/{fit.verdict.name}"}
        assert (at, name) == (step, "fit/verdict")
        assert text.startswith(f"{fit.verdict.name} after {step + 1} rows. ")
        assert text.endswith(fit.verdict_reason)
    (_, early), _, (_, last) = judged
    assert early["fit/verdict/NOT_IDENTIFIED"] == 1
    assert not {"fit/L0", "fit/L1"} & early.keys()
    assert last["fit/verdict/L0L1"] == 1
    np.testing.assert_allclose([last["fit/L0"], last["fit/L1"]], [1, 2], rtol=1e-9)
    assert [name for _, name, _ in sink.of("image")] == ["smoothness/figure"]


def test_rows_that_no_fit_may_use_bring_no_verdict_closer() -> None:
    useless = [{"status": "failed"}, {"estimator": "local_clip"}, {"group": "head"}]
    rows = [row(step, **values) for step in range(64) for values in useless]
    assert logged(rows).of("text") == []


def test_where_no_fit_is_possible_rows_are_logged_without_a_verdict() -> None:
    rows = [row(step, estimator=name) for step in range(64) for name in ("mine", "yours")]
    trace = Trace()
    trace.extend(rows)
    with pytest.raises(ValueError, match="estimator") as refused:
        fit_smoothness(trace)
    sink = Recorder()
    writer = TraceWriter(trace, lambda: sink)
    writer.update()
    assert [step for step, _ in sink.of("scalars")] == list(range(64))
    assert sink.of("text") == [(63, "fit/verdict", f"No verdict. {refused.value}")]


def test_a_fit_that_fails_ends_the_verdicts_alone(monkeypatch) -> None:
    def fail(trace: Trace) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr("smoothdiag.fits.fit_smoothness", fail)
    with pytest.warns(SmoothdiagWarning, match="no further verdicts.*MemoryError.*no room") as caught:
        sink = logged(law(range(130)))
    assert len(caught) == 1
    assert [step for step, _ in sink.of("scalars")] == list(range(130))
    assert (sink.of("text"), len(sink.of("image"))) == ([], 1)


def test_a_resumed_run_repeats_no_verdict() -> None:
    run, sink = Run(), Recorder()
    run.probe.trace.extend(law(range(100), data="fixed"))
    run.probe.load_state_dict({"steps": 100, "next": None})
    with TraceWriter(run.probe, lambda: sink):
        run.train(8)
        assert sink.of("text") == []
    assert [name for _, name, _ in sink.of("text")] == ["fit/verdict"]


@pytest.mark.parametrize("failing", ["start close", "scalars", "text", "image close", "close"])
def test_a_sink_that_fails_anywhere_is_closed_after_one_warning(failing: str) -> None:
    trace, sink = Trace(), Recorder(failing)
    writer = TraceWriter(trace, lambda: sink)
    with pytest.warns(SmoothdiagWarning, match="Logging has stopped: ConnectionError.*server is gone") as caught:
        for one in law(range(20)):
            trace.append(one)
            writer.update()
        writer.close()
        writer.close()
    assert len(caught) == 1
    kinds = [call[0] for call in sink.calls]
    assert kinds[kinds.index(failing.split()[0]) :] == [*dict.fromkeys([*failing.split(), "close"])]


def test_a_sink_that_draws_random_numbers_changes_none_of_the_users() -> None:
    class Drawing(Recorder):
        def _keep(self, *call: object) -> None:
            super()._keep(*call)
            drawn()

    def drawn() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), torch.rand(()).item()

    def make() -> Drawing:
        drawn()
        return Drawing()

    def after(writer: bool) -> tuple[float, float, float]:
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        trace = Trace()
        trace.extend(law(range(3)))
        if writer:
            TraceWriter(trace, make).update()
        return drawn()

    assert after(writer=True) == after(writer=False)


def test_the_figures_show_the_fit_and_the_clipping(monkeypatch) -> None:
    drawn = {}
    for name in ("plot_smoothness", "plot_clipping"):
        keep = lambda data, name=name, **options: drawn.update({name: options})  # noqa: E731
        monkeypatch.setattr(f"smoothdiag.plots.{name}", keep)
    run, sink, trace = Run(autoclip=True), Recorder(), Trace()
    run.train(4)
    trace.extend(law(range(70)))
    TraceWriter(trace, lambda: sink, autoclip=run.clipper).close()
    assert drawn["plot_smoothness"]["fit"].num_points == 70
    assert drawn.keys() == {"plot_smoothness", "plot_clipping"}
    assert [(name, pixels.shape) for _, name, pixels in sink.of("image")] == [
        ("smoothness/figure", (720, 960, 4)),
        ("clipping/figure", (720, 960, 4)),
    ]
