"""benchmarks/autoclip: a fit with a verdict sets threshold or rate by its formula; without one, AutoClip acts."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from benched import give, modules, quadratic, set_up

import smoothdiag as sd

pytestmark = pytest.mark.thorough

L0, L1 = 1.0, 2.0


@pytest.fixture(scope="module")
def bench():
    return modules()


def fit_of(smoothness) -> sd.SmoothnessFit:
    """A fit of rows over two decades of gradient norms, in an order that says nothing of time."""
    norms = 10 ** torch.arange(200.0).sin().double()
    table = {"grad_norm": norms.numpy(), "smoothness": smoothness(norms), "saturation": 0.1}
    return sd.fit_smoothness(pd.DataFrame(table), num_boot=50)


@pytest.fixture(scope="module")
def by_line():
    """A fit of points of a landscape that follows the law exactly."""
    problem = sd.problems.exponential(L0, L1)

    def at(norm):
        return problem.hessian_norm(torch.log1p(norm * L1 / L0).reshape(1) / L1)

    fit = fit_of(lambda norms: np.array([float(at(norm)) for norm in norms]))
    assert fit.verdict is sd.Verdict.L0L1
    return fit


@pytest.fixture
def scanned(bench, monkeypatch):
    """Returns a run of the arm ``law_scan`` whose scan had this fit."""

    def begin(fit, optimizer="momentum", schedule="constant", lr=0.1):
        workload = quadratic(bench, optimizer, schedule)
        monkeypatch.setitem(bench.law._scans, (workload.task, 0), (fit, 7))
        return set_up(bench, workload, lr, "law_scan")

    return begin


def run(bench, loop, clipper, steps) -> None:
    for batch, _ in zip(bench.training.data_of(loop.workload).batches(1), range(steps), strict=False):
        bench.training.step(loop, clipper, batch)


# A scan


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize(("optimizer", "lr"), [("momentum", 0.004), ("plain", 0.1), ("momentum", 0.1), ("plain", 1.0)])
def test_threshold_is_that_of_the_law_at_the_peak_rate(bench, scanned, by_line, optimizer, lr, schedule) -> None:
    loop, clipper = scanned(by_line, optimizer, schedule, lr)
    rate = lr * (10 if optimizer == "momentum" else 1)  # SGD adds gradients up, ClippedMomentum averages them
    expected = (1 / rate - L0) / L1 if rate <= 1 / (2 * L0) else 1 / (2 * L1) / rate
    (group,) = loop.optimizers[0].param_groups
    assert group["initial_lr" if schedule == "cosine" else "lr"] == pytest.approx(rate)
    assert group["threshold"] == pytest.approx(expected, rel=0.01)
    low, high = sd.clip_rule(by_line, lr=rate).threshold_interval
    assert low - 1e-9 <= expected * 1.01
    assert high + 1e-9 >= expected * 0.99
    run(bench, loop, clipper, 3)
    clipper.finish()
    assert clipper.reason.startswith(f"L0L1: threshold {group['threshold']:.4g} from step 0; L0 1 [")
    assert clipper.longest_step == pytest.approx(rate * expected, rel=0.01)
    assert clipper.probe_gradients == 7, "those of the scan; AutoClip measures nothing any more"


def test_steps_have_the_length_of_the_threshold(bench, scanned, by_line) -> None:
    loop, clipper = scanned(by_line, "plain", lr=1.0)
    start = loop.parameters[0].detach().clone()
    run(bench, loop, clipper, 1)
    assert float((loop.parameters[0].detach() - start).norm()) == pytest.approx(1 / (2 * L1), rel=0.01)
    assert clipper.shortened == 1


def test_a_constant_bounds_the_rate_and_clips_nothing(bench, scanned) -> None:
    fit = fit_of(lambda norms: np.full(200, 4.0))
    assert fit.verdict is sd.Verdict.CONSTANT
    loop, clipper = scanned(fit, "plain", "cosine", lr=1.0)
    (group,) = loop.optimizers[0].param_groups
    rates = []
    loop.optimizers[0].register_step_pre_hook(lambda *_: rates.append(group["lr"]))
    run(bench, loop, clipper, 5)
    clipper.finish()
    planned = [bench.workloads.cosine(taken / 5) for taken in range(1, 6)]
    assert rates == pytest.approx([min(rate, 0.25) for rate in planned], abs=1e-9)
    assert (group["threshold"], clipper.clipped) == (math.inf, 0)
    assert clipper.reason.startswith("CONSTANT: rate at most 0.25 from step 0")


def test_a_steep_power_shortens_every_gradient_to_its_rate(bench, scanned) -> None:
    fit = fit_of(lambda norms: 1 + norms.numpy() ** 1.8)
    assert fit.verdict is sd.Verdict.POWER
    loop, clipper = scanned(fit, "plain", lr=1.0)
    give(loop, [3.0, 4.0])
    clipper.before()
    v = np.linspace(0, 1, 100_001)
    rate = np.mean(1 / (1 + (5 * (1 + v)) ** 1.8))
    torch.testing.assert_close(loop.parameters[0].grad, rate * torch.tensor([3.0, 4.0]), rtol=0.01, atol=0)
    give(loop, [3e-4, 4e-4])
    clipper.before()
    assert float(loop.parameters[0].grad.norm()) <= 5e-4 + 1e-9
    assert clipper.shortened >= 1
    clipper.finish()
    assert clipper.reason.startswith("POWER: rate by the norm from step 0")


def test_without_a_verdict_the_run_is_that_of_autoclip(bench, scanned) -> None:
    loop, law = scanned("no row is usable", schedule="cosine")
    other, autoclip = set_up(bench, quadratic(bench, schedule="cosine"), arm="autoclip_set")
    for each, clipper in ((loop, law), (other, autoclip)):
        run(bench, each, clipper, 5)  # down to a rate of zero
        clipper.finish()
    torch.testing.assert_close(loop.parameters[0], other.parameters[0], rtol=0, atol=0)
    assert law.longest_step == autoclip.longest_step
    assert law.reason == f"NO_FIT: AutoClip; no row is usable; {autoclip.reason}"
    assert law.probe_gradients == autoclip.probe_gradients + 7


def test_a_scan_is_made_once_for_all_runs_that_begin_alike(bench, monkeypatch) -> None:
    monkeypatch.setattr(bench.law, "SCAN_GRADIENTS", 200)
    workload = quadratic(bench, "plain")
    (loop, clipper), (_, same), (_, other) = (set_up(bench, workload, arm="law_scan", seed=seed) for seed in (0, 0, 1))
    batches = [next(bench.training.data_of(workload).batches(seed)) for seed in (1, 2)]
    first, second = (1 / float(each.mean()) for each in batches)  # the curvature is the mean of the batch
    assert [each.largest_rate for each in (clipper, same, other)] == pytest.approx([first, first, second], rel=1e-3)
    assert clipper.scan_gradients > 10
    assert loop.parameters[0].tolist() == [3.0, 4.0]


# The running fit


def test_autoclip_acts_until_the_running_fit_has_a_verdict(bench, monkeypatch, by_line) -> None:
    asked = []

    def fitted(trace, **options):
        asked.append((len([row for row in trace if row["estimator"] == "local"]), options["estimator"]))
        return by_line if len(asked) == 2 else "no row is usable"

    monkeypatch.setattr(bench.law, "fitted", fitted)
    loop, clipper = set_up(bench, quadratic(bench, "plain"), lr=0.4, arm="law_run")
    (group,) = loop.optimizers[0].param_groups
    run(bench, loop, clipper, 90)
    assert asked == [(20, "local")]
    assert group["threshold"] == pytest.approx(clipper.clip.longest_step / 0.4)
    assert clipper.said == "NO_FIT: AutoClip; no row is usable"
    rows = len(clipper.probe.trace)
    run(bench, loop, clipper, 60)
    assert asked == [(20, "local"), (30, "local")]
    assert group["threshold"] == pytest.approx((1 / 0.4 - L0) / L1, rel=0.01)
    assert len(clipper.probe.trace) == rows, "nothing is measured after the verdict"
    clipper.finish()
    assert clipper.reason.startswith("L0L1: threshold 0.75 from step 90")
