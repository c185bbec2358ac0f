"""spikes: planted causes are found on problems where the truth is known, and finding them changes no bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from asserts import assert_identical, state_of
from matplotlib import pyplot as plt
from networks import mlp
from torch import Tensor, nn
from torch.nn import functional as F

import smoothdiag as sd

never = lambda step: False  # noqa: E731
SPIKE = 60


def squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def batches(number: int, seed: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    source = torch.Generator().manual_seed(seed)
    for _ in range(number):
        x = torch.randn(32, 4, generator=source)
        yield x, x[:, :2].sin() + 0.1 * torch.randn(32, 2, generator=source)


class Run:
    """A guarded run of a small network with dropout.

    Args:
        make: Makes the optimizer.
        model: The network.
        options: Options of the guard.
    """

    def __init__(
        self, make: Callable[[Any], torch.optim.Optimizer], model: nn.Module | None = None, **options: Any
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(mlp(4, 16, 16), nn.Dropout(0.1), mlp(16, 2)) if model is None else model
        self.optimizer = make(self.model.parameters())
        self.probe = sd.Probe(self.model, self.optimizer, squares, estimators=(), schedule=never)
        self.guard = sd.SpikeGuard(self.optimizer, self.probe, **options)

    def over(self, batches: Any, before_step: Callable[[int], None] = lambda step: None) -> Run:
        for k, batch in enumerate(self.probe.watch(batches)):
            before_step(k)
            loss = squares(self.model, batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.guard.observe(loss)
            self.optimizer.step()
        return self

    def first(self) -> sd.Explanation:
        return self.guard.explain(self.guard.events[0])


def sgd(lr: float = 0.05) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda p: torch.optim.SGD(p, lr=lr, momentum=0.5)


def adamw(p: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(p, lr=3e-3)


def corrupted(number: int, at: int) -> list[tuple[Tensor, Tensor]]:
    found = list(batches(number))
    found[at] = found[at][0], found[at][1] + 20
    return found


@pytest.mark.parametrize("keep", ["batches", "parameters"])
@pytest.mark.parametrize("make", [sgd(), adamw])
def test_a_corrupted_batch(make: Any, keep: Any) -> None:
    run = Run(make, keep=keep).over(corrupted(SPIKE + 3, SPIKE))
    found = run.first()
    assert (found.event.step, found.cause, found.step, found.exclude) == (SPIKE, "data", SPIKE, (SPIKE,))
    assert found.evidence["share_of_batch"] > 0.9
    assert found.evidence["grad_norm"] == pytest.approx(found.event.values["grad_norm"], rel=1e-5), "dropout as it was"
    assert sum(found.modules.values()) == pytest.approx(1)
    assert "unlike the others" in found.text


def test_a_batch_that_holds_no_numbers() -> None:
    data = list(batches(30))
    data[20][0][3, 1] = math.nan
    found = Run(sgd(), action="skip").over(data).first()
    assert (found.cause, found.exclude) == ("data", (20,))
    assert "not finite" in found.text


@pytest.mark.parametrize(("make", "factor"), [(sgd(), 100.0), (adamw, 400.0)])
def test_a_rate_far_too_large_for_one_step(make: Any, factor: float) -> None:
    run = Run(make, keep="parameters")

    def jump(step: int) -> None:
        run.optimizer.param_groups[0]["lr"] *= {SPIKE: factor, SPIKE + 1: 1 / factor}.get(step, 1.0)

    run.over(batches(SPIKE + 4), jump)
    assert {run.guard.explain(event).cause for event in run.guard.events} == {"optimizer"}
    assert {run.guard.explain(event).step for event in run.guard.events} == {SPIKE}
    assert "rate of" in run.first().text


class Bowl(nn.Module):
    """The quadratic 2 x^2 + y^2 / 2, with a gradient that is noisy from batch to batch."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.ones(2))
        self.register_buffer("curvature", torch.tensor([4.0, 1.0]))

    def forward(self, noise: Tensor) -> Tensor:
        return (self.curvature * self.x.square()).sum() / 2 + (noise * self.x).sum() + 1


def test_a_rate_that_crosses_the_edge_of_stability() -> None:
    torch.manual_seed(0)
    model = Bowl()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    probe = sd.Probe(model, optimizer, lambda model, noise: model(noise), estimators=(), schedule=never)
    guard = sd.SpikeGuard(optimizer, probe, keep="parameters")
    source = torch.Generator().manual_seed(1)
    for k in range(400):
        noise = 0.1 * torch.randn(2, generator=source)
        optimizer.param_groups[0]["lr"] = min(0.3 + 0.003 * k, 0.7)  # 2 / 4 is the limit
        probe.observe(noise)
        loss = model(noise)
        optimizer.zero_grad()
        loss.backward()
        guard.observe(loss)
        optimizer.step()
        if guard.events:
            break
    found = guard.explain(guard.events[0])
    assert found.cause == "edge", found
    lr = optimizer.param_groups[0]["lr"]
    assert found.evidence["sharpness"] == pytest.approx(4 * lr / 2, rel=0.02)
    assert found.evidence["critical"] < 1
    assert found.step == guard.events[0].step - 1


@pytest.mark.slow
def test_a_stale_second_moment_after_a_quiet_phase() -> None:
    quiet = range(151, 330)
    data = [(x, y) if k not in quiet else (0 * x, 0 * y) for k, (x, y) in enumerate(batches(333))]
    model = mlp(4, 16, 2)
    for p in model.parameters():
        p.data = p.data - (p.data if p.ndim == 1 else 0)
    run = Run(lambda p: torch.optim.AdamW(p, lr=3e-3, betas=(0.9, 0.98)), model, keep="parameters").over(data)
    found = next(run.guard.explain(event) for event in run.guard.events if event.step >= 330)
    assert found.cause == "optimizer", found
    assert found.evidence["staleness_now"] > 2


class Narrow(nn.Module):
    """A layer that computes in a narrow dtype once ``dtype`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.dtype = mlp(4, 16), mlp(16, 2), torch.float32
        self.offset = 0.0

    def forward(self, x: Tensor) -> Tensor:
        hidden = (self.inner(x) + self.offset).to(self.dtype)
        return self.outer((hidden - self.offset).float())


@pytest.mark.parametrize(("dtype", "offset"), [(torch.float16, 1e5), (torch.bfloat16, 5e3)])
def test_a_narrow_dtype_that_overflows_or_rounds(dtype: torch.dtype, offset: float) -> None:
    run = Run(sgd(), Narrow(), action="skip", rule=sd.SpikeRule(deviations=4.0))
    model: Any = run.model

    def narrow(step: int) -> None:
        if step == SPIKE:
            model.dtype, model.offset = dtype, offset

    run.over(batches(SPIKE + 1), narrow)
    found = run.first()
    assert found.cause == "numerics", found
    assert ("overflows" in found.text) == (dtype == torch.float16)


def test_without_a_probe_the_answer_says_what_is_missing() -> None:
    torch.manual_seed(0)
    model = mlp(4, 8, 2)
    optimizer = sgd()(model.parameters())
    guard = sd.SpikeGuard(optimizer)
    for batch in corrupted(40, 38):
        loss = squares(model, batch)
        optimizer.zero_grad()
        loss.backward()
        guard.observe(loss)
        optimizer.step()
    found = guard.explain(guard.events[0])
    assert found.cause == "unknown"
    assert "has no probe" in found.text
    with pytest.raises(ValueError, match="one of `guard.events`"):
        guard.explain(sd.SpikeEvent(7, ("loss",), {"loss": 1.0}, {}, {}))


@pytest.mark.parametrize("keep", ["batches", "parameters"])
def test_to_find_the_cause_changes_no_bit(keep: Any) -> None:
    def state(run: Run) -> dict[str, Any]:
        kept = run.optimizer.state_dict()["state"]
        return state_of(run.model) | {f"optimizer {k} {i}": v for k, s in kept.items() for i, v in s.items()}

    def network() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 2))

    data = corrupted(70, 60)
    watched = Run(adamw, network(), keep=keep).over(data)
    assert watched.guard.events
    assert watched.first().cause == "data"
    bare = Run(adamw, network())
    bare.guard.detach()
    bare.over(data)
    assert_identical(state(watched), state(bare))


def test_answers_are_saved() -> None:
    run = Run(sgd()).over(corrupted(SPIKE + 1, SPIKE))
    other = Run(sgd())
    other.guard.load_state_dict(run.guard.state_dict())
    assert other.first() == run.first()


def test_a_replay_that_is_not_the_trained_step_says_so() -> None:
    run = Run(sgd())
    for k, batch in enumerate(run.probe.watch(batches(40))):
        loss = squares(run.model, batch) * (30.0 if k == 38 else 1.0)  # outside loss_fn
        run.optimizer.zero_grad()
        loss.backward()
        run.guard.observe(loss)
        run.optimizer.step()
    found = run.first()
    assert found.cause == "unknown"
    assert "does not repeat" in found.text


def test_spikes_are_rows_of_the_trace_that_fits_leave_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = mlp(4, 16, 2)
    optimizer = adamw(model.parameters())
    path = tmp_path / "run.jsonl"
    with sd.Probe(model, optimizer, squares, estimators=[sd.LocalSmoothness()], trace=path) as probe:
        guard = sd.SpikeGuard(optimizer, probe)
        for batch in probe.watch(corrupted(SPIKE + 1, SPIKE)):
            loss = squares(model, batch)
            optimizer.zero_grad()
            loss.backward()
            guard.observe(loss)
            optimizer.step()
    trace = sd.Trace.read(path)
    (row,) = [row for row in trace if row["estimator"] == "spike"]
    assert (row["step"], row["spiked"], row["cause"], row["done"]) == (SPIKE, "grad_norm loss", "data", "logged")
    assert row["loss_deviations"] > 6
    assert sd.fit_smoothness(trace, num_boot=20).num_points == sum(row["estimator"] == "local" for row in trace)
    ax = sd.plot_spikes(trace, ax=plt.subplots()[1])
    assert ax.get_legend_handles_labels()[1] == ["loss", "data (1)"], "the curve is that of the other rows"
    plt.close("all")


def test_what_clipping_would_have_been_worth() -> None:
    """On a quadratic the loss at both ends is known: f(x) = 2 x^2 + y^2 / 2 + noise x."""
    torch.manual_seed(0)
    model = Bowl()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    probe = sd.Probe(model, optimizer, lambda model, noise: model(noise), estimators=(), schedule=never)
    guard = sd.SpikeGuard(optimizer, probe, keep="parameters")
    source = torch.Generator().manual_seed(1)
    drawn = [F.normalize(torch.randn(2, generator=source), dim=0) for _ in range(61)]
    drawn[60] *= 40
    for noise in drawn:
        start = model.x.detach().clone()
        probe.observe(noise)
        loss = model(noise)
        optimizer.zero_grad()
        loss.backward()
        guard.observe(loss)
        optimizer.step()
    event = guard.events[-1]
    assert event.step == 60
    end = model.x.detach().clone()
    clipped = start + (end - start) * event.usual["grad_norm"] / event.values["grad_norm"]
    answer = guard.explain(event)
    for noise, name in ((drawn[60], "clip_benefit"), (drawn[59], "clip_benefit_before")):
        losses = []
        for point in (end, clipped):
            model.x.data.copy_(point)
            losses.append(float(model(noise).detach()))
        assert answer.evidence[name] == pytest.approx(losses[0] - losses[1], rel=1e-4, abs=1e-4)
    assert guard.history["clip_benefit"].iloc[-1] == answer.evidence["clip_benefit_before"] > 0
    assert "would have left the loss" in str(answer)


def test_a_guard_that_is_detached_or_has_failed_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for end in ("detached", "failed"):
        run = Run(sgd(), keep="parameters").over(batches(30))
        recent = run.guard._inquiry.recent
        assert len(recent._steps) == 2
        assert len(recent._references) == 1
        if end == "detached":
            run.guard.detach()
        else:
            monkeypatch.setattr(run.guard._stepping, "_note", lambda begun: 1 / 0)
            with pytest.warns(sd.SmoothdiagWarning, match="goes on without it"):
                run.over(batches(1))
        run.over(batches(5))
        assert [len(kept) for kept in (recent._steps, recent._references, recent._batches, recent._memory)] == [0] * 4
