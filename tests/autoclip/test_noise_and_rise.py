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


def held(rises=True, **options) -> Calibration:
    state = calibrated(1.0, StepRule(**options))
    state.advance(30)
    state.rises = rises
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
    ("rises", "length", "taken"),
    [(True, 1.99, 1.2), (True, 9.0, 1.0), (False, 9.0, 1.2)],
    ids=["curvature has adapted", "below the cap", "updates are shortened"],
)
def test_otherwise_it_never_rises(rises, length, taken) -> None:
    state = held(rises)
    found = [state.add(Measurement(step, length, 1.0, taken=taken)) for step in range(40, 60)]
    assert set(found) == {""}
    assert state.longest == 1.2


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
