"""integrations.loggers: spikes, and what clipping would have been worth, are numbers at their steps alone."""

import math

import torch
from bowl import Bowl, noises
from logged_runs import Recorder, law

import smoothdiag as sd
from smoothdiag.integrations.latest import Latest
from smoothdiag.integrations.loggers import TraceWriter
from smoothdiag.rows import CLIP_BENEFIT

SPIKE = 40


def spiking(sink: Recorder, value: float) -> tuple[sd.SpikeGuard, sd.Probe]:
    model = Bowl()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    probe = sd.Probe(model, optimizer, lambda model, noise: model(noise), schedule=sd.every(10))
    guard = sd.SpikeGuard(optimizer, probe)
    drawn = noises(SPIKE + 6)
    drawn[SPIKE] *= value
    with TraceWriter(probe, lambda: sink):
        for noise in drawn:
            probe.observe(noise)
            loss = model(noise)
            optimizer.zero_grad()
            loss.backward()
            guard.observe(loss)
            optimizer.step()
    return guard, probe


def test_a_spike_is_logged_at_its_step_and_at_no_other() -> None:
    sink = Recorder()
    guard, _ = spiking(sink, 40.0)
    by_step = {step: {n: v for n, v in values.items() if "spike" in n} for step, values in sink.of("scalars")}
    events = guard.events
    assert {step for step, values in by_step.items() if values} == {event.step for event in events}
    event = next(event for event in events if event.step == SPIKE)
    assert "grad_norm" in event.spiked
    assert by_step[SPIKE]["spike/signals"] == len(event.spiked)
    for name in event.spiked:
        assert by_step[SPIKE][f"spike/{name}"] == event.values[name]
        assert by_step[SPIKE][f"spike/{name}_deviations"] == event.deviations[name]
    texts = [(step, text) for step, name, text in sink.of("text") if name == "spike/explanation"]
    assert texts[0] == (SPIKE, str(guard.explain(event)))
    assert "spike/figure" in [name for _, name, _ in sink.of("image")]


def test_a_spike_that_is_not_finite_has_a_number_too() -> None:
    sink = Recorder()
    spiking(sink, math.inf)
    (values,) = [values for step, values in sink.of("scalars") if step == SPIKE]
    assert values["spike/signals"] >= 1
    assert all(math.isfinite(value) for value in values.values())
    assert not [name for name in values if name.startswith("spike/") and name != "spike/signals"]


def test_a_run_without_spikes_logs_none() -> None:
    sink = Recorder()
    trace = sd.Trace()
    trace.extend(law(range(70)))
    TraceWriter(trace, lambda: sink).close()
    assert not [name for _, values in sink.of("scalars") for name in values if "spike" in name]
    assert [name for _, name, _ in sink.of("image")] == ["smoothness/figure"]


def note(step: int, **values: object) -> dict[str, object]:
    known = {"grad_norm": math.nan, "smoothness": math.nan, "status": "not_measured"}
    return {"step": step, **known, **values}


def test_one_line_for_many_steps_has_the_worst_spike() -> None:
    trace = sd.Trace()
    latest = Latest(trace, None)
    assert latest.worst() == {}
    small = {"estimator": "spike", "spiked": "loss", "loss_value": 3.0, "loss_usual": 1.0, "loss_deviations": 7.0}
    benefit = {"estimator": CLIP_BENEFIT, "clip_benefit": 0.25}
    trace.extend([note(3, **small), note(5, **small | {"loss_deviations": 9.0}), note(6, **benefit)])
    assert latest.metrics() == {}
    assert latest.worst() == {
        "smoothdiag/spike/step": 5,
        "smoothdiag/spike/number": 2,
        "smoothdiag/spike/signals": 1,
        "smoothdiag/spike/loss": 3.0,
        "smoothdiag/spike/loss_deviations": 9.0,
        "smoothdiag/clipping/benefit": 0.25,
    }
    trace.append(note(8, **small | {"loss_value": math.inf, "loss_deviations": math.nan}))
    trace.append(note(9, **small))
    latest.metrics()
    assert latest.worst()["smoothdiag/spike/step"] == 8, "what is not finite is the worst"
    latest.metrics()
    assert latest.worst() == {}, "each is logged once"
