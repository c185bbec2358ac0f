"""autoclip.calibration: noise shortens the longest step, and curvature that stays as it was lets it rise."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from smoothdiag import AutoClip, Probe, StepRule
from smoothdiag.autoclip.calibration import Calibration, Measurement

FIRST = [0, 1, 2, 3, 4, 5, 6, 8, 10, 13, 17, 22, 29]


def calibrated(length: float, rule: StepRule) -> Calibration:
    state = Calibration(rule)
    for step in FIRST:
        state.add(Measurement(step, length, 1.0))
    return state


def held(raise_by=2.0, **options) -> Calibration:
    state = calibrated(1.0, StepRule(**options))
    state.advance(30)
    state.raise_by = raise_by
    return state


def test_noise_shortens_the_longest_step_by_a_power_of_the_signal_share() -> None:
    half = math.sqrt(0.5)
    for noise, mean, factor in ((0.5, 0.25, half), (1.0, 0.25, 0.5), (0.0, 0.1, 1.0), (0.5, -0.3, math.sqrt(0.4))):
        state = Calibration(StepRule(noise=noise))
        for step, difference in zip(FIRST, itertools.cycle((0.2, -0.2)), strict=False):
            signal = mean + difference if step else mean
            state.add(Measurement(step, 2.0, 1.0, signal=signal))
        assert state.longest == pytest.approx(1.2 * 2.0 * factor)
    unknown = calibrated(2.0, StepRule())
    assert unknown.longest == pytest.approx(2.4), "without halves, noise is left out"


def test_a_longest_step_rises_where_two_steps_at_the_cap_were_far_too_short() -> None:
    state = held()
    long = Measurement(64, 3.0, 1.0, taken=1.2)
    assert state.add(long) == ""
    assert state.add(replace(long, step=141, length=2.5)) == "raised"
    assert state.longest == pytest.approx(1.2 * 2.5)
    assert state.raised_at == 141
    assert state.add(replace(long, step=200, length=9.0, taken=3.0)) == "", "a rise needs two new rows"
    state.add(replace(long, step=300, length=90.0, taken=3.0))
    assert state.longest == pytest.approx(1.2 * 9.0)
    state.add(replace(long, step=400, length=900.0, taken=10.8))
    state.add(replace(long, step=500, length=900.0, taken=10.8))
    assert state.longest == pytest.approx(1.2 * 90.0), "at most tenfold"


@pytest.mark.parametrize(
    ("raise_by", "length", "taken"),
    [(2.0, 1.99, 1.2), (2.0, 9.0, 1.0), (4.0, 3.99, 1.2), (math.inf, 9.0, 1.2)],
    ids=["curvature has adapted", "below the cap", "updates need more", "the optimizer clips"],
)
def test_otherwise_it_never_rises(raise_by, length, taken) -> None:
    state = held(raise_by)
    found = [state.add(Measurement(step, length, 1.0, taken=taken)) for step in range(40, 60)]
    assert set(found) == {""}
    assert state.longest == 1.2


def test_a_row_that_would_raise_it_is_confirmed_soon() -> None:
    state = held()
    assert [step for step in range(64, 251) if state.due(step)] == [64, 140, 200]
    state.add(Measurement(64, 9.0, 1.0, taken=1.2))
    assert [step for step in range(66, 251) if state.due(step)] == [83, 100, 108, 140, 150, 182, 200, 237, 250]
    assert not state.due(65), "the probe asks before the row of the step before is read"
    state.add(Measurement(83, 1.5, 1.0, taken=1.2))
    assert not state.due(100), "it was not confirmed"
    state.confirms = False
    state.add(Measurement(140, 9.0, 1.0, taken=1.2))
    assert not state.due(150)


def test_rows_that_would_lower_it_stay_far_apart() -> None:
    state = held()
    state.add(Measurement(64, 0.1, 1.0, taken=1.2))
    assert [step for step in range(66, 251) if state.due(step)] == [140, 200]


def test_shortened_updates_rise_where_they_are_far_too_short() -> None:
    module = nn.Module()
    module.x = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e3)
    probe = Probe(module, optimizer, lambda model, target: 0.5 * (model.x - target).square().sum(), estimators=())
    clipper = AutoClip(optimizer, probe)
    generator = torch.Generator().manual_seed(0)
    for step in range(150):
        # ||g||/L of this loss is the distance from the minimum, which jumps ahead of the run for ever.
        far = (1.0 if step < 60 else 100.0) * torch.randn(3, dtype=torch.float64, generator=generator)
        target = module.x.detach() + far
        probe.observe(target)
        optimizer.zero_grad()
        (0.5 * (module.x - target).square().sum()).backward()
        optimizer.step()
    found = clipper.history
    raised = found[found["event"] == "raised"]
    assert list(raised["step"]) == [84], "the second row is read at the step after it"
    held_at = found.loc[found["event"] == "held", "longest_step"].item()
    assert raised["longest_step"].item() == pytest.approx(10 * held_at)


def test_the_signal_share_is_that_of_a_slow_twin() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    x, y = torch.randn(8, 3, dtype=torch.float64), 1 + torch.randn(8, 1, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = Probe(model, optimizer, lambda m, b: (m(b[0]) - b[1]).square().mean(), estimators=())
    AutoClip(optimizer, probe)

    def gradient(rows):
        loss = (model(x[rows]) - y[rows]).square().mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    a, b = gradient(slice(0, 4)), gradient(slice(4, 8))
    expected = float(a @ b / ((a + b) / 2).square().sum())
    for _ in probe.watch([(x, y)]):
        (model(x) - y).square().mean().backward()
        optimizer.step()
    (row,) = probe.trace
    assert 0.1 < expected < 0.99
    assert row["signal"] == pytest.approx(expected, rel=1e-9)
    assert row["num_grads"] == 2, "one along the gradient, and two on half of the data"


def test_a_loss_that_wants_whole_batches_is_measured_without_a_signal() -> None:
    def loss_fn(model, batch):
        if len(batch) != 8:
            raise ValueError("eight examples")
        return model(batch).square().mean()

    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = Probe(model, optimizer, loss_fn, estimators=())
    clipper = AutoClip(optimizer, probe)
    for batch in probe.watch([torch.randn(8, 3)] * 7):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    assert "train on" in clipper.reason.split("\n")[1]
    assert {"signal"}.isdisjoint(probe.trace.to_frame().columns)
    assert [row["status"] for row in probe.trace] == ["ok"] * 7
    assert "halves" not in clipper.reason


def test_the_longest_step_rises_with_a_minimum_that_moves_further_away() -> None:
    curvature = torch.tensor([3.0, 1.5, 0.8], dtype=torch.float64)  # the rate 0.1 is stable by itself
    module = nn.Module()
    module.x = nn.Parameter(torch.zeros(3, dtype=torch.float64) + 0.5)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)

    def loss_fn(model, target):
        return 0.5 * (curvature * (model.x - target).square()).sum()

    probe = Probe(module, optimizer, loss_fn, estimators=())
    clipper = AutoClip(optimizer, probe)
    generator = torch.Generator().manual_seed(1)
    late = []
    for step in range(300):
        if step % 10 == 0:
            target = (0.5 if step < 60 else 5.0) * torch.randn(3, dtype=torch.float64, generator=generator)
        probe.observe(target)
        optimizer.zero_grad()
        loss_fn(module, target).backward()
        late += [float(module.x.grad.norm()) > clipper.threshold] if step >= 200 else []
        optimizer.step()
    assert "raised" in list(clipper.history["event"])
    assert "||g||/L was at least" in clipper.reason
    assert sum(late) <= 10
