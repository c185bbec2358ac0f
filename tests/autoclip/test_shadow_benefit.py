"""autoclip.benefit: what clipping would have been worth, on a quadratic whose losses are known at both ends."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from autoclip_runs import LOCAL, Run, adamw, batches, never, sgd
from bowl import Bowl, gradient, noises, value
from matplotlib import pyplot as plt

import smoothdiag as sd

LR = 0.05
RULE = sd.StepRule(multiple=None, relative=0.02)


class Shadow:
    """Gradient descent on the quadratic beside an AutoClip that only watches."""

    def __init__(self, *, schedule: Any = None, mode: Any = "shadow", probe: Any = None, **options: Any) -> None:
        self.model = Bowl()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR)
        self.probe = sd.Probe(
            self.model, self.optimizer, lambda model, noise: model(noise), estimators=LOCAL,
            schedule=schedule or sd.every(1), **(probe or {}),
        )  # fmt: skip
        self.clipper = sd.AutoClip(self.optimizer, self.probe, mode=mode, rule=RULE, **options)
        self.wanted: dict[int, tuple[float, torch.Tensor, torch.Tensor]] = {}

    def over(self, drawn: list[torch.Tensor]) -> Shadow:
        for noise in drawn:
            start, step = self.model.x.detach().clone(), self.probe.steps
            self.probe.observe(noise)
            self.optimizer.zero_grad()
            self.model(noise).backward()
            self.optimizer.step()
            g = gradient(start, noise)
            share = self.clipper.longest_step / (LR * float(g.norm()))
            if share < 1:
                self.wanted[step] = share, start - LR * g, start - LR * share * g
        return self


def test_the_benefit_is_the_difference_of_the_losses_at_both_ends() -> None:
    drawn, apart = noises(41), noises(3, seed=7)
    run = Shadow(held_out=apart).over(drawn)
    found = run.clipper.benefits
    assert found["step"].tolist() == [step for step in range(0, 41, 10) if step in run.wanted]
    assert len(found) >= 3
    for row in found.itertuples():
        share, end, shorter = run.wanted[row.step]
        own = value(end, drawn[row.step]) - value(shorter, drawn[row.step])
        held_out = sum(value(end, noise) - value(shorter, noise) for noise in apart) / 3
        assert row.share == pytest.approx(share, rel=1e-9)
        assert row.clip_benefit == pytest.approx(float(own), rel=1e-6, abs=1e-12)
        assert row.clip_benefit_held_out == pytest.approx(float(held_out), rel=1e-6, abs=1e-12)
    last = run.clipper.history["clip_benefit"].iloc[-1]
    before = found[found["step"] < run.clipper.history["step"].iloc[-1]]["clip_benefit_held_out"]
    assert last == pytest.approx(before.mean()) or (math.isnan(last) and before.empty)


def test_the_reason_and_the_figure_count_where_clipping_would_have_lowered_the_loss() -> None:
    run = Shadow(held_out=noises(3, seed=7)).over(noises(41))
    found = run.clipper.benefits
    for column, data in (("clip_benefit", "the step's own batch"), ("clip_benefit_held_out", "held-out batches")):
        mean = found[column].mean()
        side = f"{abs(mean):.3g} {'lower' if mean > 0 else 'higher'}"
        said = f"at {(found[column] > 0).sum()} of {len(found)} on {data} (on average it would be {side})"
        assert said in run.clipper.reason
    for data in (run.clipper, found, run.probe.trace):
        ax = sd.plot_benefit(data, ax=plt.subplots()[1])
        drawn = {label: line.get_ydata().tolist() for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        number = (found["clip_benefit"] > 0).sum()
        assert drawn[f"the step's own batch: lower at {number} of {len(found)}"] == found["clip_benefit"].tolist()
        assert len(drawn) == 2
    plt.close("all")


def test_a_step_that_is_short_enough_costs_no_row_and_no_forward_pass() -> None:
    run = Shadow(held_out=noises(3, seed=7))
    calls = []
    run.optimizer.param_groups[0]["lr"] = 1e-6
    run.model.register_forward_hook(lambda *_: calls.append(1))
    run.over(noises(1))
    with_shadow = len(calls)
    assert run.clipper.benefits.empty
    other = Shadow(mode="shadow")
    other.clipper.detach()
    other.model.register_forward_hook(lambda *_: calls.append(1))
    calls.clear()
    other.over(noises(1))
    assert len(calls) == with_shadow
    with pytest.raises(ValueError, match="Parameter `data` should have steps at which clipping was judged"):
        sd.plot_benefit(run.clipper)
    with pytest.raises(ValueError, match="Parameter `data` should be an AutoClip, a SpikeGuard"):
        sd.plot_benefit([1])


@pytest.mark.parametrize(
    ("make", "options"),
    [(sgd(4.0), {}), (sgd(1.0, 0.9), {}), (adamw(0.3), {}), (adamw(0.3), {"data": "step"})],
    ids=["sgd", "momentum", "adamw", "step"],
)
def test_a_shadow_that_judges_changes_no_bit_of_the_run(make: Any, options: Any) -> None:
    known = {"schedule": sd.every(3), **options}
    judging = Run(make, mode="shadow", held_out=(b for b in batches(2, seed=9)), **known).over(batches(60))
    bare = Run(make, clipped=False, schedule=never).over(batches(60))
    assert len(judging.clipper.benefits) >= 2
    assert torch.equal(judging.weights(), bare.weights())
    assert judging.losses == bare.losses


def test_it_looks_at_most_at_one_step_in_ten_and_only_where_something_is_measured() -> None:
    run = Shadow(schedule=sd.every(7))
    run.optimizer.param_groups[0]["lr"] = 0.2
    run.over(noises(60))
    steps = run.clipper.benefits["step"].tolist()
    assert steps
    assert all(step % 7 == 0 for step in steps)
    assert all(b - a >= 10 for a, b in pairwise(steps))
    assert Shadow(schedule=never).over(noises(20)).clipper.benefits.empty


def test_on_a_probe_with_held_out_batches_there_is_no_own_batch() -> None:
    apart = noises(2, seed=5)
    run = Shadow(probe={"probe_batches": apart}).over(noises(11))
    (row, *_) = run.clipper.benefits.itertuples()
    _, end, shorter = run.wanted[row.step]
    assert math.isnan(row.clip_benefit)
    held_out = sum(float(value(end, noise) - value(shorter, noise)) for noise in apart) / 2
    assert row.clip_benefit_held_out == pytest.approx(held_out, rel=1e-6, abs=1e-12)


def test_a_resumed_shadow_looks_at_the_same_steps() -> None:
    drawn = noises(45)
    whole = Shadow(schedule=sd.every(3)).over(drawn)
    begun = Shadow(schedule=sd.every(3)).over(drawn[:20])
    resumed = Shadow(schedule=sd.every(3))
    resumed.model.load_state_dict(begun.model.state_dict())
    resumed.probe.load_state_dict(begun.probe.state_dict())
    resumed.clipper.load_state_dict(begun.clipper.state_dict())
    resumed.over(drawn[20:])
    wanted = whole.clipper.benefits
    late = wanted[wanted["step"] >= 20].reset_index(drop=True)
    assert len(late)
    assert resumed.clipper.benefits.equals(late)


def test_held_out_batches_are_for_the_shadow_alone() -> None:
    with pytest.raises(ValueError, match=r"Parameter `held_out` should be left out unless the mode is .shadow."):
        Shadow(mode="clip", held_out=noises(1))
    with pytest.raises(ValueError, match="Parameter `held_out` should hold at least one batch"):
        Shadow(held_out=[])
    assert Shadow(mode="clip").over(noises(20)).clipper.benefits.empty
    shadow = Shadow().over(noises(5))
    number = len(shadow.clipper.benefits)
    shadow.clipper.detach()
    assert len(shadow.over(noises(30)).clipper.benefits) == number
