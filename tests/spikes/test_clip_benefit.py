"""spikes: what clipping would have been worth at a spike, on the batches that can judge it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bowl import Bowl, noises, value
from matplotlib import pyplot as plt

import smoothdiag as sd

LR, SPIKE = 0.05, 60


class Guarded:
    """Gradient descent on the quadratic, with one batch that is far from all others."""

    def __init__(self, *, guarded: bool = True, **options: Any) -> None:
        self.model = Bowl()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR)
        self.probe = sd.Probe(
            self.model, self.optimizer, lambda model, noise: model(noise), estimators=(), schedule=lambda step: False
        )
        self.guard = sd.SpikeGuard(self.optimizer, self.probe, **options) if guarded else None
        self.drawn, self.points = noises(70), [self.model.x.detach().clone()]
        self.drawn[SPIKE] *= 40
        for noise in self.drawn:
            self.probe.observe(noise)
            loss = self.model(noise)
            self.optimizer.zero_grad()
            loss.backward()
            if self.guard is not None:
                self.guard.observe(loss)
            self.optimizer.step()
            self.points.append(self.model.x.detach().clone())


def test_on_held_out_batches_it_is_the_mean_difference_of_the_losses_at_both_ends() -> None:
    apart = noises(4, seed=3)
    run = Guarded(keep="parameters", held_out=(noise for noise in apart))
    (event,) = [event for event in run.guard.events if event.step == SPIKE]
    start, end = run.points[SPIKE : SPIKE + 2]
    shorter = start + (end - start) * event.usual["grad_norm"] / event.values["grad_norm"]
    wanted = {
        "clip_benefit": value(end, run.drawn[SPIKE]) - value(shorter, run.drawn[SPIKE]),
        "clip_benefit_before": value(end, run.drawn[SPIKE - 1]) - value(shorter, run.drawn[SPIKE - 1]),
        "clip_benefit_held_out": sum(value(end, noise) - value(shorter, noise) for noise in apart) / 4,
    }
    answer = run.guard.explain(event)
    (row,) = [row for row in run.probe.trace if row["step"] == SPIKE]
    for name, benefit in wanted.items():
        assert answer.evidence[name] == pytest.approx(float(benefit), rel=1e-6)
        assert row[name] == answer.evidence[name]
    assert wanted["clip_benefit"] < 0 < wanted["clip_benefit_held_out"], "a bad batch is good for itself alone"
    (noted,) = run.guard.history[run.guard.history["step"] == SPIKE].drop_duplicates("step").itertuples()
    assert noted.clip_benefit == answer.evidence["clip_benefit_before"]
    assert noted.clip_benefit_held_out == answer.evidence["clip_benefit_held_out"]
    said = f"{float(wanted['clip_benefit_held_out']):.3g} lower on held-out batches."
    assert str(answer).endswith(said)
    assert row["explanation"].endswith(said)
    for data, number in ((run.guard, 2), (run.probe.trace, 3)):
        ax = sd.plot_benefit(data, ax=plt.subplots()[1])
        assert len(ax.get_legend_handles_labels()[1]) == number
    plt.close("all")


def test_without_held_out_batches_nothing_is_said_of_them() -> None:
    run = Guarded(keep="parameters")
    answer = run.guard.explain(next(event for event in run.guard.events if event.step == SPIKE))
    assert "clip_benefit_held_out" not in answer.evidence
    assert "held-out" not in str(answer)
    assert run.guard.history["clip_benefit_held_out"].isna().all()


def test_batches_that_cannot_be_evaluated_cost_a_warning_and_no_run() -> None:
    with pytest.warns(sd.SmoothdiagWarning, match="could not be measured, perhaps because `held_out`"):
        run = Guarded(keep="parameters", held_out=["no batch"])
    assert run.guard.explain(next(event for event in run.guard.events if event.step == SPIKE)).cause == "data"
    assert torch.equal(run.points[-1], Guarded(guarded=False).points[-1])


def test_judging_changes_no_bit_of_the_run() -> None:
    torch.manual_seed(3)
    judged, draws = Guarded(keep="parameters", held_out=noises(2)).points, torch.get_rng_state()
    torch.manual_seed(3)
    bare = Guarded(guarded=False).points
    assert all(torch.equal(a, b) for a, b in zip(judged, bare, strict=True))
    assert torch.equal(draws, torch.get_rng_state())


@pytest.mark.parametrize("options", [{}, {"keep": "batches"}, {"keep": "parameters", "action": "skip"}])
def test_held_out_batches_need_both_ends_of_a_step(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Parameter `held_out` should be left out unless `keep=.parameters.`"):
        Guarded(held_out=noises(1), **options)
    with pytest.raises(ValueError, match="Parameter `held_out` should hold at least one batch"):
        Guarded(keep="parameters", held_out=[])
