"""spikes.modules: each module has a norm of its own, judged alone, and chance makes hardly more spikes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from asserts import assert_identical
from matplotlib import pyplot as plt
from networks import mlp
from torch import Tensor, nn
from torch.nn import functional as F

import smoothdiag as sd
from smoothdiag.plots.spikes import recorded
from smoothdiag.spikes.robust import Alone
from smoothdiag.spikes.rules import statistics_of
from smoothdiag.tails import QUANTILES, RANGES_OF_NORMAL, raised

STEPS, SPIKE = 40, 30
FIRST, LAST = "grad_norm of 0", "grad_norm of 2"


class Loop:
    """A regression; at some steps the gradient of the last module is far too long, and the whole hardly longer."""

    def __init__(self, *, guarded: bool = True, fused: bool = False, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = mlp(4, 16, 2).double()
        with torch.no_grad():  # the last module is a small part of the gradient
            self.model[2].weight *= 20
        self.optimizer = torch.optim.SGD(self.model.named_parameters(), lr=1e-4, fused=fused)
        self.guard = sd.SpikeGuard(self.optimizer, **{"modules": True, **options}) if guarded else None
        self.source = torch.Generator().manual_seed(1)

    def over(self, steps: int, spikes: dict[int, float] | None = None, begin: int = 0, clip: float = 0.0) -> Loop:
        for k in range(begin, steps):
            x = torch.randn(16, 4, generator=self.source, dtype=torch.float64)
            self.optimizer.zero_grad()
            F.mse_loss(self.model(x), x[:, :2].sin()).backward()
            for p in self.model[2].parameters():
                p.grad *= (spikes or {}).get(k, 0.05)
            self.before = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]
            if self.guard is not None and clip:
                self.guard.observe(grad_norm=nn.utils.clip_grad_norm_(self.model.parameters(), clip))
            self.optimizer.step()
        return self

    def norm(self, module: int) -> float:
        return float(sd.Euclidean().norm([p.grad for p in self.model[module].parameters()]))

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def test_a_module_spikes_where_the_whole_does_not() -> None:
    loop = Loop().over(SPIKE + 1, {SPIKE: 2.0})
    (event,) = loop.guard.events
    assert (event.step, event.spiked, event.done) == (SPIKE, (LAST,), "logged")
    assert event.values[LAST] == pytest.approx(loop.norm(2), rel=1e-12)
    assert event.values[FIRST] == pytest.approx(loop.norm(0), rel=1e-12)
    parts = math.hypot(event.values[FIRST], event.values[LAST])
    assert parts == pytest.approx(event.values["grad_norm"], rel=1e-12)
    assert f"step {SPIKE}: {LAST} {event.values[LAST]:.4g}, usually " in str(event)
    assert loop.guard.history[["step", "signal"]].to_numpy().tolist() == [[SPIKE, LAST]]
    assert Loop(modules=False).over(SPIKE + 1, {SPIKE: 2.0}).guard.events == []


def test_clip_scales_that_module_alone() -> None:
    loop = Loop(action="clip", clip_to=1.5).over(SPIKE + 1, {SPIKE: 2.0})
    (event,) = loop.guard.events
    assert loop.norm(2) == pytest.approx(1.5 * event.usual[LAST], rel=1e-12)
    assert [torch.equal(p.grad, b) for p, b in zip(loop.model.parameters(), loop.before, strict=True)] == [
        *(True, True),
        *(False, False),
    ]


@pytest.mark.parametrize("fused", [False, True])
def test_skip_leaves_out_the_step(fused: bool) -> None:
    loop = Loop(action="skip", fused=fused).over(SPIKE)
    before = loop.weights()
    assert_identical(loop.over(SPIKE + 1, {SPIKE: 2.0}, begin=SPIKE).weights(), before)
    assert loop.guard.events[0].done == "skipped"


@pytest.mark.parametrize("action", ["log", "clip", "skip"])
def test_a_run_without_spikes_stays_as_it_is(action: Any) -> None:
    loop = Loop(action=action).over(STEPS)
    assert_identical(loop.weights(), Loop(guarded=False).over(STEPS).weights())
    assert loop.guard.events == []


def test_norms_are_those_from_before_the_loop_clipped() -> None:
    loop = Loop().over(SPIKE + 1, {SPIKE: 2.0}, clip=1e-3)
    (event,) = loop.guard.events
    assert event.spiked == (LAST,)
    expected = float(sd.Euclidean().norm(loop.before[2:]))
    assert event.values[LAST] == pytest.approx(expected, rel=1e-4), "clip_grad_norm_ adds 1e-6 to the norm"


def test_modules_by_name_and_one_without_a_gradient() -> None:
    loop = Loop(modules=["2"])
    loop.over(SPIKE + 1, {SPIKE: 2.0})
    (event,) = loop.guard.events
    assert set(event.values) == {"grad_norm", LAST}
    whole = Loop(modules=True)
    for p in whole.model[0].parameters():
        p.requires_grad_(False)
    whole.over(SPIKE + 1, {SPIKE: 2.0})
    assert set(whole.guard.events[0].values) == {"grad_norm", LAST}, "a module without a gradient has no value"


def test_a_module_that_is_not_finite_is_named() -> None:
    (event,) = Loop().over(4, {3: math.inf}).guard.events
    assert set(event.spiked) == {"grad_norm", LAST}


def squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


class Heads(nn.Module):
    """Two heads, of which the second has next to no weight in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = mlp(4, 8, 2), mlp(4, 8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.large(x), 0.01 * self.small(x)], dim=1)


def test_the_cause_of_a_module_that_spikes_is_found() -> None:
    torch.manual_seed(0)
    model = Heads().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    probe = sd.Probe(model, optimizer, squares, estimators=(), schedule=lambda step: False)
    guard = sd.SpikeGuard(optimizer, probe, modules=["large", "small"])
    source = torch.Generator().manual_seed(1)
    batches = []
    for k in range(60):
        x = torch.randn(64, 4, generator=source, dtype=torch.float64)
        y = torch.cat([3 + x[:, :2], (0.2 if k == 50 else 0.01) * (2 + x[:, 2:].sin())], dim=1)
        batches.append((x, y))
    for batch in probe.watch(batches):
        optimizer.zero_grad()
        loss = squares(model, batch)
        loss.backward()
        guard.observe(loss)
        optimizer.step()
    event = guard.events[0]
    assert (event.step, event.spiked) == (50, ("grad_norm of small",))
    found = guard.explain(event)
    assert found.cause == "data"
    said = "The gradients of these modules spiked: `small`. On this batch the gradient norm of the first is"
    assert said in found.text
    assert found.evidence["share_of_batch"] > 0.5
    assert found.evidence["module_norm"] == pytest.approx(event.values["grad_norm of small"], rel=1e-9)
    table = recorded(probe.trace.to_frame())
    assert table["signal"].tolist()[:1] == ["grad_norm of small"]
    ax = sd.plot_spikes(guard, signal="grad_norm of small", ax=plt.subplots()[1])
    assert ax.get_lines()[0].get_ydata()[0] == event.values["grad_norm of small"]


def test_an_event_names_the_loudest_modules() -> None:
    names = tuple(f"grad_norm of {i}" for i in range(6))
    away = {name: float(i) for i, name in enumerate(names)}
    event = sd.SpikeEvent(7, ("loss", *names), {"loss": 2.0, **dict.fromkeys(names, 9.0)}, {"loss": 1.0}, away)
    assert [name[-1] for name in event.loudest()] == ["5", "4", "3"]
    assert str(event).endswith("; 3 further modules; logged")


def test_a_resumed_run_goes_on_and_other_modules_are_refused() -> None:
    whole = Loop().over(STEPS, {SPIKE: 2.0})
    first, second = Loop().over(25), Loop()
    second.model.load_state_dict(first.model.state_dict())
    second.guard.load_state_dict(first.guard.state_dict())
    second.source = first.source
    second.over(STEPS, {SPIKE: 2.0}, begin=25)
    assert second.guard.events == whole.guard.events
    with pytest.raises(ValueError, match="the same signals"):
        Loop(modules=["0"]).guard.load_state_dict(first.guard.state_dict())


WRONG: dict[str, tuple[Any, str]] = {
    "number": (1, "should be True, or a list of names of modules"),
    "name": ("0", "should be True, or a list of names of modules"),
    "unknown": (["3"], "should name modules whose parameters the optimizer moves. Found '3', and parameters in 0, 2"),
    "nested": (["2", "2.weight"], "should name modules of which none is part of another"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_modules(name: str) -> None:
    modules, message = WRONG[name]
    with pytest.raises(ValueError, match=f"Parameter `modules` {message}"):
        Loop(modules=modules)


def test_modules_need_names_and_the_rule_that_is_not_published() -> None:
    with pytest.raises(ValueError, match="nobody knows the names"):
        sd.SpikeGuard(torch.optim.SGD(mlp(2, 2).parameters(), lr=0.1), modules=True)
    with pytest.raises(ValueError, match="unless the rule is a SpikeRule"):
        Loop(rule=sd.SixSigma())


def windows(values: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns median and robust deviation of many windows of standard normal values."""
    draws = np.random.default_rng(0).standard_normal((number, values))
    q10, q25, q50, q75, q90 = np.quantile(draws, QUANTILES, axis=1)
    return q50, np.maximum((q75 - q25) / RANGES_OF_NORMAL[0], (q90 - q10) / RANGES_OF_NORMAL[1])


def chance(away: float, values: int) -> float:
    """Returns how often a further value lies this far away: exact for each window, and so also where it is rare."""
    middle, deviation = windows(values, 40_000)
    return float(np.mean([math.erfc(x / math.sqrt(2)) / 2 for x in middle + away * deviation]))


@pytest.mark.parametrize("number", [1, 20, 100])
@pytest.mark.parametrize("values", [20, 50])
def test_many_norms_and_few_values_make_spikes_by_chance_as_seldom_as_one_norm(values: int, number: int) -> None:
    together = number * chance(raised(6.0, values, 50, number), values)
    assert 0.3 < together / chance(6.0, 50) < 2


def test_one_norm_alone_is_judged_as_ever() -> None:
    assert raised(6.0, 50, 50) == pytest.approx(6.0)
    draw = np.random.default_rng(3)
    norms = np.exp(0.3 * draw.standard_normal(200))
    norms[[60, 90, 150]] *= [5.0, 9.0, np.nan]
    alone = Alone(1, 0, torch.device("cpu"), sd.SpikeRule(), 1.0)
    plain = statistics_of(sd.SpikeRule(), 1.0)(1, 0, torch.device("cpu"))
    for norm in norms:
        value = torch.tensor([norm], dtype=torch.float64)
        mine, theirs = alone.judge(value, None), plain.judge(value, None)
        assert bool(mine.fired) == (bool(theirs.fired) or math.isnan(norm))
