"""spikes.elements: the rule SPAM clips what the released code clips, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from asserts import assert_identical
from networks import mlp
from torch import Tensor
from torch.nn import functional as F

import smoothdiag as sd

Make = Callable[[Any], torch.optim.Optimizer]
STEPS, HARD = 45, {24: 8.0, 33: 1e4, 41: 30.0}
RULE = sd.SPAM()

OPTIMIZERS: dict[str, Make] = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adamw, amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


class Released:
    """The step of the released ``galore_torch/SPAM.py`` without momentum reset: a slow twin, one number at a time.

    Its moments are lists of floats. ``denom`` is written as torch has it, sqrt(v / correction) + eps.
    """

    def __init__(self, numbers: list[float], lr: float, theta: float, first: int = 20) -> None:
        self.x, self.lr, self.theta, self.first = numbers, lr, theta, first
        self.m, self.v, self.steps = [0.0] * len(numbers), [0.0] * len(numbers), 0
        self.clipped: list[int] = []

    def step(self, gradient: list[float], b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> None:
        self.steps += 1
        number = 0
        for i, g in enumerate(gradient):
            if self.steps >= self.first and g * g > self.theta * self.v[i]:
                g = math.copysign(math.sqrt(self.theta * self.v[i]), g)
                number += 1
            self.m[i] = b1 * self.m[i] + (1 - b1) * g
            self.v[i] = b2 * self.v[i] + (1 - b2) * g * g
            corrected = self.m[i] / (1 - b1**self.steps), self.v[i] / (1 - b2**self.steps)
            self.x[i] -= self.lr * corrected[0] / (math.sqrt(corrected[1]) + eps)
        self.clipped.append(number)


class Loop:
    """A regression whose targets are far too large at some steps."""

    def __init__(self, make: Make, *, guarded: bool = True, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = mlp(4, 8, 2).double()
        self.optimizer = make(list(self.model.parameters()))
        self.guard = sd.SpikeGuard(self.optimizer, **{"rule": RULE, **options}) if guarded else None
        self.source = torch.Generator().manual_seed(1)

    def gradient(self, hard: float = 1.0) -> list[float]:
        x = torch.randn(16, 4, generator=self.source, dtype=torch.float64)
        self.optimizer.zero_grad()
        F.mse_loss(self.model(x), hard * (1 + x[:, :2].sin())).backward()
        return flat([p.grad for p in self.model.parameters()])

    def over(self, steps: int, hard: dict[int, float] | None = None, begin: int = 0) -> Loop:
        for k in range(begin, steps):
            self.gradient((hard or {}).get(k, 1.0))
            self.optimizer.step()
        return self

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def flat(tensors: Any) -> list[float]:
    return [float(x) for tensor in tensors for x in tensor.detach().flatten()]


def test_clip_is_the_released_code() -> None:
    loop = Loop(lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0), action="clip")
    twin = Released(flat(loop.model.parameters()), 0.01, RULE.theta)
    for k in range(STEPS):
        twin.step(loop.gradient(HARD.get(k, 1.0)))
        loop.optimizer.step()
        torch.testing.assert_close(flat(loop.model.parameters()), twin.x, rtol=1e-11, atol=1e-13)
    seconds = [loop.optimizer.state[p]["exp_avg_sq"] for p in loop.model.parameters()]
    torch.testing.assert_close(flat(seconds), twin.v, rtol=1e-11, atol=0.0)
    found = {event.step: event.values["elements"] for event in loop.guard.events}
    assert found == {step: number for step, number in enumerate(twin.clipped) if number}
    assert {24, 33, 41} <= found.keys()
    assert 0 < found[24] < 58, "some elements are spikes, and not all"


@pytest.mark.parametrize("action", ["log", "clip", "skip"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_without_spikes_stays_as_it_is(name: str, action: Any) -> None:
    guarded = Loop(OPTIMIZERS[name], action=action, rule=sd.SPAM()).over(STEPS)
    assert_identical(guarded.weights(), Loop(OPTIMIZERS[name], guarded=False).over(STEPS).weights())
    assert guarded.guard.events == []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_second_moment_is_found(name: str) -> None:
    loop = Loop(OPTIMIZERS[name], action="clip").over(30)
    entry = "square_avg" if name == "rmsprop" else "exp_avg_sq"
    bounds = [(RULE.theta * loop.optimizer.state[p][entry]).sqrt() for p in loop.model.parameters()]
    loop.gradient(1e4)
    before = [p.grad.clone() for p in loop.model.parameters()]
    loop.optimizer.step()
    for p, g, bound in zip(loop.model.parameters(), before, bounds, strict=True):
        expected = torch.where(g.square() > bound.square(), g.sign() * bound, g)
        torch.testing.assert_close(p.grad, expected, rtol=1e-14, atol=0.0)
    (event,) = loop.guard.events
    share = max(float((g / bound).abs().max()) for g, bound in zip(before, bounds, strict=True))
    assert event.values["largest_element"] == pytest.approx(math.sqrt(RULE.theta) * share, rel=1e-12)
    assert str(event).startswith(f"step 30: elements {int(event.values['elements'])}, usually 0, ")
    assert (event.spiked, event.done) == (("elements",), "clipped")


def test_log_and_skip() -> None:
    logged = Loop(OPTIMIZERS["adam"]).over(31, {30: 1e4})
    assert_identical(logged.weights(), Loop(OPTIMIZERS["adam"], guarded=False).over(31, {30: 1e4}).weights())
    assert [event.done for event in logged.guard.events] == ["logged"]
    loop = Loop(OPTIMIZERS["adam"], action="skip").over(30)
    before = loop.weights()
    loop.over(31, {30: 1e4}, begin=30)
    assert_identical(loop.weights(), before)
    assert loop.guard.history[["step", "signal", "done"]].to_numpy().tolist() == [[30, "elements", "skipped"]]


def test_nothing_is_a_spike_in_the_warm_up() -> None:
    assert Loop(OPTIMIZERS["adam"]).over(19, {18: 1e4}).guard.events == []
    assert [e.step for e in Loop(OPTIMIZERS["adam"]).over(20, {19: 1e4}).guard.events] == [19]


def test_an_element_without_a_second_moment_is_left_alone() -> None:
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([x], lr=0.1)
    guard = sd.SpikeGuard(optimizer, rule=sd.SPAM(), action="clip")
    for k in range(30):
        x.grad = torch.tensor([1.0, -1.0, float(k == 25)], dtype=torch.float64)
        optimizer.step()
    assert guard.events == []
    assert x.detach()[2] < 1, "a weight that sees its first gradient late is trained"


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_clipped_or_made_zero(value: float) -> None:
    loop = Loop(OPTIMIZERS["adam"], action="clip").over(30)
    loop.gradient()
    loop.model[0].weight.grad[0, 0] = value
    bound = (RULE.theta * loop.optimizer.state[loop.model[0].weight]["exp_avg_sq"][0, 0]).sqrt()
    loop.optimizer.step()
    found = float(loop.model[0].weight.grad[0, 0])
    assert found == (0.0 if math.isnan(value) else pytest.approx(math.copysign(float(bound), value)))
    (event,) = loop.guard.events
    assert "grad_norm" in event.spiked


def test_a_resumed_run_goes_on() -> None:
    whole = Loop(OPTIMIZERS["adam"], action="clip").over(STEPS, HARD)
    first = Loop(OPTIMIZERS["adam"], action="clip").over(10)
    second = Loop(OPTIMIZERS["adam"], action="clip")
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.guard.load_state_dict(first.guard.state_dict())
    second.source = first.source
    second.over(STEPS, HARD, begin=10)
    assert_identical(second.weights(), whole.weights())
    assert repr(second.guard.events) == repr(whole.guard.events), "as text, where NaN equals NaN"
    with pytest.raises(ValueError, match=r"the same signals. This guard watches grad_norm, loss. Found .*elements"):
        Loop(OPTIMIZERS["adam"], rule=sd.SpikeRule()).guard.load_state_dict(first.guard.state_dict())


def test_the_factor_of_a_scaler_does_not_count() -> None:
    found = []
    for factor in (1.0, 2.0**10):
        loop = Loop(lambda p: torch.optim.AdamW(p, lr=0.01, fused=True), action="clip")
        scaler = torch.amp.GradScaler("cpu", init_scale=factor)
        for k in range(35):
            loop.gradient(HARD.get(k, 1.0))
            for p in loop.model.parameters():
                p.grad *= factor
            scaler.scale(torch.ones(()))
            scaler.step(loop.optimizer)
            scaler.update()
        found.append((loop.guard.events, flat(loop.model.parameters())))
    assert [e.values["elements"] for e in found[0][0]] == [e.values["elements"] for e in found[1][0]]
    assert found[0][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-9, atol=1e-12)


REFUSED: dict[str, tuple[Make, str]] = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.1), "Found SGD, which has no state yet"),
    "adagrad": (lambda p: torch.optim.Adagrad(p, lr=0.1), "Found Adagrad, whose state holds step, sum"),
    "ours": (lambda p: sd.ClippedMomentum(p, lr=0.1, threshold=1.0), "Found ClippedMomentum, which has no state yet"),
    "one of a list": (
        lambda p: [torch.optim.Adam(p[:2]), torch.optim.SGD(p[2:], lr=0.1)],
        "Found SGD, which has no state yet",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_optimizers_without_a_second_moment_are_refused(name: str) -> None:
    make, found = REFUSED[name]
    with pytest.raises(ValueError, match=f"Parameter `optimizer` should keep a second moment.*{found}"):
        Loop(make)


@pytest.mark.parametrize(("options", "name"), [({"theta": 0}, "theta"), ({"warm_up": -1}, "warm_up")])
def test_wrong_options(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"Parameter `{name}` should be"):
        sd.SPAM(**options)
