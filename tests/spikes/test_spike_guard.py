"""spikes.guard: what a guard notes, skips and clips, and that a run without spikes stays as it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from asserts import assert_identical, state_of
from networks import mlp
from torch import Tensor, nn
from torch.nn import functional as F

import smoothdiag as sd
from smoothdiag.spikes.events import ROOM

Make = Callable[[Any], Any]
STEPS, SPIKE = 40, 30

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "sgd, fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True, amsgrad=True),
    "adagrad, fused": lambda p: torch.optim.Adagrad(p, lr=0.01, fused=True),
    "ours": lambda p: sd.ClippedMomentum(p, lr=0.05, threshold=5.0, weight_decay=0.1),
}


class Loop:
    """A loop over noisy batches; some of them are so hard that the gradient spikes."""

    def __init__(self, make: Make, *, guarded: bool = True, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = mlp(4, 8, 2).double()
        self.optimizer = make(list(self.model.parameters()))
        self.guard = sd.SpikeGuard(self.optimizer, **options) if guarded else None
        self.source = torch.Generator().manual_seed(1)

    def loss(self, hard: float) -> Tensor:
        x = torch.randn(16, 4, generator=self.source, dtype=torch.float64)
        return F.mse_loss(self.model(x), hard * x[:, :2].sin())

    def over(self, steps: int, spikes: dict[int, float] | None = None, begin: int = 0) -> Loop:
        for k in range(begin, steps):
            loss = self.loss((spikes or {}).get(k, 1.0))
            self.optimizer.zero_grad()
            loss.backward()
            if self.guard is not None:
                self.guard.observe(loss)
            self.optimizer.step()
        return self

    def state(self) -> dict[str, Any]:
        kept = self.optimizer.state_dict()
        return state_of(self.model) | {f"optimizer {k} {i}": v for k, s in kept["state"].items() for i, v in s.items()}


@pytest.mark.parametrize("action", ["log", "skip", "clip"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_without_spikes_stays_as_it_is(name: str, action: Any) -> None:
    guarded = Loop(OPTIMIZERS[name], action=action, update_norm=True).over(STEPS)
    assert_identical(guarded.state(), Loop(OPTIMIZERS[name], guarded=False).over(STEPS).state())
    assert guarded.guard.events == []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_leaves_parameters_and_optimizer_as_they_were(name: str) -> None:
    loop = Loop(OPTIMIZERS[name], action="skip").over(SPIKE)
    before = {name: x for name, x in loop.state().items() if not name.startswith("grad")}
    groups = [{k: v for k, v in g.items() if k != "params"} for g in loop.optimizer.param_groups]
    loop.over(SPIKE + 1, {SPIKE: 50.0}, begin=SPIKE)
    after = loop.state()
    assert_identical({name: after[name] for name in before}, before)
    assert groups == [{k: v for k, v in g.items() if k != "params"} for g in loop.optimizer.param_groups]
    assert all(p.grad is not None for p in loop.model.parameters())
    assert not hasattr(loop.optimizer, "found_inf")
    (event,) = loop.guard.events
    assert (event.step, event.done, event.spiked) == (SPIKE, "skipped", ("grad_norm", "loss"))
    loop.over(SPIKE + 2, begin=SPIKE + 1)
    assert not torch.equal(loop.state()["parameter 0.weight"], after["parameter 0.weight"])


def test_a_long_gradient_is_clipped_to_the_usual_norm() -> None:
    loop = Loop(OPTIMIZERS["sgd"], action="clip", clip_to=1.5).over(SPIKE)
    loop.over(SPIKE + 1, {SPIKE: 50.0}, begin=SPIKE)
    (event,) = loop.guard.events
    length = math.sqrt(sum(float(p.grad.square().sum()) for p in loop.model.parameters()))
    assert length == pytest.approx(1.5 * event.usual["grad_norm"], rel=1e-9)
    assert event.done == "clipped"
    assert event.values["grad_norm"] > 5 * event.usual["grad_norm"]


def test_a_gradient_that_is_not_long_is_not_made_longer() -> None:
    loop = Loop(OPTIMIZERS["sgd"], action="clip", clip_to=3.0).over(SPIKE)
    loss = loop.loss(1.0)
    loop.optimizer.zero_grad()
    loss.backward()
    before = [p.grad.clone() for p in loop.model.parameters()]
    loop.guard.observe(loss + 100)  # only the loss spikes
    loop.optimizer.step()
    assert loop.guard.events[0].spiked == ("loss",)
    assert all(torch.equal(p.grad, b) for p, b in zip(loop.model.parameters(), before, strict=True))


@pytest.mark.parametrize("action", ["log", "skip", "clip"])
def test_what_is_not_finite_is_an_event_at_any_age(action: Any) -> None:
    loop = Loop(OPTIMIZERS["adamw"], action=action).over(3)
    loop.over(4, {3: math.inf}, begin=3)
    (event,) = loop.guard.events
    assert event.step == 3
    assert "loss" in event.spiked
    finite = all(p.isfinite().all() for p in loop.model.parameters())
    assert finite == (action != "log")
    if action != "log":
        assert loop.over(STEPS, begin=4).guard.events == [event], "it does not poison what is usual"


def test_the_update_is_measured_after_the_step() -> None:
    loop = Loop(OPTIMIZERS["adamw"], update_norm=True).over(SPIKE)
    before = [p.detach().clone() for p in loop.model.parameters()]
    for kept in loop.optimizer.state.values():
        kept["exp_avg"] *= 50
    loop.over(SPIKE + 1, begin=SPIKE)
    (event,) = loop.guard.events
    moved = [p - b for p, b in zip(loop.model.parameters(), before, strict=True)]
    assert event.spiked == ("update_norm",)
    assert event.values["update_norm"] == pytest.approx(float(sd.Euclidean().norm(moved)), rel=0.02), (
        "a bound that is close"
    )
    assert event.done == "logged"


def test_a_rate_that_jumps_is_no_spike_of_the_update() -> None:
    loop = Loop(lambda p: torch.optim.AdamW(p, lr=1e-4), update_norm=True).over(SPIKE)
    loop.optimizer.param_groups[0]["lr"] = 1e-3
    assert loop.over(SPIKE + 3, begin=SPIKE).guard.events == []


def test_a_rate_that_falls_is_no_spike() -> None:
    loop = Loop(OPTIMIZERS["adamw"], update_norm=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(loop.optimizer, 80)
    for k in range(80):
        loop.over(k + 1, begin=k)
        schedule.step()
    assert loop.guard.events == []


def test_a_norm_from_before_clipping_can_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("smoothdiag.spikes.signals.gradient_norm")  # the gradients need not be read once more
    loop = Loop(OPTIMIZERS["sgd"], action="skip")
    for k in range(STEPS):
        loss = loop.loss(50.0 if k == SPIKE else 1.0)
        loop.optimizer.zero_grad()
        loss.backward()
        loop.guard.observe(grad_norm=nn.utils.clip_grad_norm_(loop.model.parameters(), 1e-3))
        loop.optimizer.step()
    assert [event.step for event in loop.guard.events] == [SPIKE]
    assert list(loop.guard.events[0].values) == ["grad_norm"]


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips_are_no_spikes(fused: bool) -> None:
    loop = Loop(lambda p: torch.optim.AdamW(p, lr=0.01, fused=fused), action="skip")
    loop.model.float()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    losses = []
    for k in range(STEPS):
        x = torch.randn(16, 4, generator=loop.source)
        loss = F.mse_loss(loop.model(x), {SPIKE: 50.0}.get(k, 1.0) * x[:, :2].sin())
        loop.optimizer.zero_grad()
        scaler.scale(loss * (math.inf if k == 25 else 1)).backward()
        loop.guard.observe(loss)
        before = loop.model[0].weight.detach().clone()
        scaler.step(loop.optimizer)
        scaler.update()
        if k in (25, SPIKE):
            assert torch.equal(before, loop.model[0].weight)
        losses.append(loss.item())
    (event,) = loop.guard.events
    assert event.spiked == ("grad_norm", "loss")
    assert event.values["loss"] == pytest.approx(losses[SPIKE])
    assert event.usual["grad_norm"] < 2, "without the factor of the scaler"


@pytest.mark.parametrize("kinds", [("adamw", "sgd"), ("adamw, fused", "sgd, fused"), ("adamw, fused", "sgd")])
def test_a_list_of_optimizers_takes_one_step(kinds: tuple[str, str]) -> None:
    loop = Loop(lambda p: [OPTIMIZERS[kinds[0]](p[:2]), OPTIMIZERS[kinds[1]](p[2:])], action="skip")
    for k in range(STEPS):
        loss = loop.loss(50.0 if k == SPIKE else 1.0)
        for optimizer in loop.optimizer:
            optimizer.zero_grad()
        loss.backward()
        loop.guard.observe(loss)
        before = [p.detach().clone() for p in loop.model.parameters()]
        for optimizer in loop.optimizer:
            optimizer.step()
        stayed = [torch.equal(p, b) for p, b in zip(loop.model.parameters(), before, strict=True)]
        assert stayed == [k == SPIKE] * 4
    assert [event.step for event in loop.guard.events] == [SPIKE]


def test_the_loss_of_a_closure_is_seen() -> None:
    loop = Loop(OPTIMIZERS["adamw"], action="skip")
    for k in range(STEPS):

        def closure(hard: float = 50.0 if k == SPIKE else 1.0) -> Tensor:
            loop.optimizer.zero_grad()
            loss = loop.loss(hard)
            loss.backward()
            return loss

        before = loop.model[0].weight.detach().clone()
        loop.optimizer.step(closure)
        assert torch.equal(before, loop.model[0].weight) == (k == SPIKE)
    (event,) = loop.guard.events
    assert event.spiked == ("grad_norm", "loss")


def test_accumulated_losses_count_as_their_mean() -> None:
    loop = Loop(OPTIMIZERS["sgd"])
    for k in range(STEPS):
        loop.optimizer.zero_grad()
        losses = [loop.loss(50.0 if k == SPIKE and part else 1.0) for part in range(2)]
        for loss in losses:
            loss.backward()
            loop.guard.observe(loss)
        loop.optimizer.step()
        if k == SPIKE:
            expected = sum(losses).item() / 2
    assert loop.guard.events[0].values["loss"] == pytest.approx(expected)


@pytest.mark.parametrize("rule", [sd.SpikeRule(), sd.SixSigma(16), sd.ZClip()])
def test_a_resumed_guard_goes_on_exactly(rule: Any) -> None:
    options = {"action": "clip", "update_norm": True, "rule": rule}
    whole = Loop(OPTIMIZERS["adamw"], **options).over(STEPS, {25: 50.0, SPIKE: 20.0})
    first = Loop(OPTIMIZERS["adamw"], **options).over(27, {25: 50.0})
    second = Loop(OPTIMIZERS["adamw"], **options)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.guard.load_state_dict(first.guard.state_dict())
    second.source.set_state(first.source.get_state())
    second.over(STEPS, {SPIKE: 20.0}, begin=27)
    assert_identical(second.state(), whole.state())
    for mine, theirs in zip(second.guard.events, whole.guard.events, strict=True):
        assert (mine.step, mine.spiked, mine.done) == (theirs.step, theirs.spiked, theirs.done)
        assert mine.values == pytest.approx(theirs.values, rel=1e-12), "an update may be told in two ways"
    assert {event.step for event in whole.guard.events} >= ({25} if isinstance(rule, sd.SixSigma) else {25, SPIKE})
    assert second.guard.steps == STEPS
    with pytest.raises(ValueError, match="the same rule and the same signals"):
        Loop(OPTIMIZERS["adamw"], rule=sd.SpikeRule(window=33)).over(1).guard.load_state_dict(first.guard.state_dict())


def test_a_guard_that_has_stepped_takes_the_state_of_one_that_has_not() -> None:
    loop = Loop(OPTIMIZERS["sgd"]).over(SPIKE + 1, {SPIKE: 50.0})
    loop.guard.load_state_dict(Loop(OPTIMIZERS["sgd"]).guard.state_dict())
    assert (loop.guard.steps, loop.guard.events) == (0, [])
    loop.over(5)
    assert loop.guard.steps == 5


def test_events_beyond_the_room_of_the_device_are_counted() -> None:
    loop = Loop(OPTIMIZERS["sgd"])
    loop.guard._stepping._bring = lambda: None  # as on a device that nobody waits for
    loop.over(2 * ROOM, dict.fromkeys(range(10, 10 + ROOM + 7), math.inf))
    events, first = loop.guard.events, 10 + loop.guard.lost
    assert loop.guard.lost >= 7
    assert [event.step for event in events] == list(range(first, first + ROOM))


def test_an_error_of_the_guard_ends_it_and_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(OPTIMIZERS["sgd"]).over(3)
    monkeypatch.setattr(loop.guard._stepping, "_note", lambda begun: 1 / 0)
    with pytest.warns(sd.SmoothdiagWarning, match="at step 3, and the run goes on without it"):
        loop.over(5, begin=3)
    assert loop.guard.steps == 5


def test_history_has_a_row_for_each_signal() -> None:
    history = Loop(OPTIMIZERS["sgd"]).over(STEPS, {SPIKE: 50.0}).guard.history
    assert history[["step", "signal", "done"]].iloc[:2].to_numpy().tolist() == [
        [SPIKE, "grad_norm", "logged"],
        [SPIKE, "loss", "logged"],
    ]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "action": ({"action": "stop"}, "Parameter `action` should be one of"),
    "rule": ({"rule": 6}, "Parameter `rule` should be a SpikeRule, SixSigma, ZClip or SPAM"),
    "clip_to": ({"clip_to": 0}, "Parameter `clip_to` should be positive"),
    "update_norm": ({"update_norm": 1}, "Parameter `update_norm` should be True or False"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_of_a_guard(name: str) -> None:
    options, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        Loop(OPTIMIZERS["sgd"], **options)


def test_lbfgs_is_only_watched() -> None:
    with pytest.raises(ValueError, match="several gradients in a step"):
        Loop(lambda p: torch.optim.LBFGS(p), action="skip")
    loop = Loop(lambda p: torch.optim.LBFGS(p, max_iter=3))

    def closure() -> Tensor:
        loop.optimizer.zero_grad()
        loss = F.mse_loss(loop.model(torch.ones(3, 4, dtype=torch.float64)), torch.ones(3, 2, dtype=torch.float64))
        loss.backward()
        return loss

    for _ in range(3):
        loop.optimizer.step(closure)
    assert loop.guard.steps == 3


def test_a_loss_is_one_number() -> None:
    with pytest.raises(ValueError, match=r"Parameter `loss` should be one number.*Found shape \(2,\)"):
        Loop(OPTIMIZERS["sgd"]).guard.observe(torch.ones(2))
    with pytest.raises(ValueError, match="Parameter `loss` should be a number. Found `loss = 'low'`"):
        Loop(OPTIMIZERS["sgd"]).guard.observe("low")


def test_a_rate_of_0_ends_no_guard() -> None:
    loop = Loop(lambda p: torch.optim.AdamW(p, lr=0.0)).over(4, {2: math.inf})
    assert [event.step for event in loop.guard.events][:1] == [2]
