"""autoclip: runs that are interrupted, disturbed or badly configured go on as they should."""

import io
import math
import re
from functools import cache
from statistics import median

import pandas as pd
import pytest
import torch
from asserts import assert_identical, state_of
from autoclip_runs import Run, adamw, batches, never, sgd
from losses import cross_entropy
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from smoothdiag import (
    AutoClip,
    ClippedMomentum,
    DirectionalCurvature,
    LocalSmoothness,
    PathSmoothness,
    Probe,
    SmoothdiagWarning,
    StepRule,
    Trace,
    by_module,
    every,
)
from smoothdiag.autoclip.calibration import Calibration


def saved(*objects):
    """States as they come back from a file that may hold tensors and plain values alone."""
    file = io.BytesIO()
    torch.save([o.state_dict() for o in objects], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def warm(run: Run) -> LambdaLR:
    return LambdaLR(run.optimizer, lambda k: min((k + 1) / 10, 1.0, 40 / (k + 1)))


RESUMED = {
    "sgd": (sgd(4.0, 0.9), {}),
    "adamw": (adamw(0.1), {}),
    "measured": (adamw(0.1), {"rule": StepRule(0.5)}),
    "set": (lambda m: ClippedMomentum(m.parameters(), lr=9.0, longest_step=1.0), {"mode": "set"}),
    "bounded": (sgd(4.0), {"rule": StepRule(bounded=True)}),
}


FORTH, BACK = (0, 1, 2, 3), (3, 2, 1, 0)
CASES = [
    *(("sgd", stop, order, in_file) for stop, order, in_file in
      [(0, FORTH, True), (3, BACK, False), (17, FORTH, False), (40, BACK, True), (60, FORTH, True)]),
    *((name, 17, BACK, True) for name in ("adamw", "set")),
    *((name, 60, BACK, False) for name in RESUMED),
]  # fmt: skip


def started(name, trace=None):
    make, options = RESUMED[name]
    run = Run(make, schedule=every(7), data="step", trace=trace, **options)
    return run, warm(run)


def go(run, schedule, part) -> None:
    for batch in part:
        run.step(batch)
        schedule.step()


@cache
def whole_run(name) -> Run:
    """Returns the run that nothing interrupts."""
    run, schedule = started(name)
    go(run, schedule, batches(80, seed=11))
    return run


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:AutoClip lowered")
@pytest.mark.parametrize(("name", "stop", "order", "in_file"), CASES)
def test_a_resumed_run_goes_on_bit_for_bit(name, stop, order, in_file, tmp_path) -> None:
    loader, whole = batches(80, seed=11), whole_run(name)
    trace = tmp_path / "resumed.jsonl" if in_file else None
    first, schedule = started(name, trace)
    go(first, schedule, loader[:stop])
    states = saved(first.model, first.optimizer, first.probe, first.clipper, schedule)
    go(first, schedule, loader[stop : stop + 2])  # steps that are lost with the process
    first.probe.trace.close()
    second, schedule = started(name, trace)
    parts = [second.model, second.optimizer, second.probe, second.clipper]
    for i in order:
        parts[i].load_state_dict(states[i])
    schedule.load_state_dict(states[4])
    go(second, schedule, loader[stop:])
    assert_identical(state_of(second.model, second.optimizer), state_of(whole.model, whole.optimizer))
    assert second.clipper.reason == whole.clipper.reason
    pd.testing.assert_frame_equal(second.clipper.history, whole.clipper.history)
    if in_file:
        kept, expected = Trace.read(trace), whole.probe.trace
        assert [(r["step"], r["smoothness"]) for r in kept] == [(r["step"], r["smoothness"]) for r in expected]


@pytest.mark.parametrize("forgotten", [2, 3])
def test_a_state_that_was_not_loaded_is_missed(forgotten) -> None:
    first = Run(sgd()).over(batches(3))
    states = saved(first.model, first.optimizer, first.probe, first.clipper)
    second = Run(sgd())
    for i, part in enumerate([second.model, second.optimizer, second.probe, second.clipper]):
        if i != forgotten:
            part.load_state_dict(states[i])
    before = second.weights()
    with pytest.raises(ValueError, match="load the saved states of both"):
        second.over(batches(1))
    assert torch.equal(second.weights(), before)


def test_a_state_of_another_kind_or_rule_is_refused() -> None:
    state = Run(sgd(1.0)).over(batches(3)).clipper.state_dict()
    for make, options, message in (
        (adamw(), {}, "acts by ScaleGradients; this one acts by ShortenUpdate"),
        (sgd(1.0), {"rule": StepRule(0.7)}, "made with the given rule"),
    ):
        with pytest.raises(ValueError, match=message):
            Run(make, **options).clipper.load_state_dict(state)


def test_a_run_with_cycled_momentum_goes_on_bit_for_bit_by_the_rule_it_began_with() -> None:
    def start(loader):
        run = Run(sgd(0.1, 0.9))
        schedule = torch.optim.lr_scheduler.OneCycleLR(run.optimizer, max_lr=3.0, total_steps=90)
        return run, schedule, loader

    def go(run, schedule, loader):
        for batch in loader:
            run.step(batch)
            schedule.step()
        return run

    loader = batches(80, seed=11)
    whole = go(*start(loader))
    first, schedule, _ = start(loader)
    go(first, schedule, loader[:45])
    states = saved(first.model, first.optimizer, first.probe, first.clipper, schedule)
    second, schedule, _ = start(loader)
    schedule.load_state_dict(states[4])
    for part, state in zip([second.model, second.optimizer, second.probe, second.clipper], states, strict=False):
        part.load_state_dict(state)
    go(second, schedule, loader[45:])
    assert_identical(state_of(second.model, second.optimizer), state_of(whole.model, whole.optimizer))
    assert second.clipper.reason == whole.clipper.reason
    assert "times 3 (for momentum 0.95) and (" in whole.clipper.reason, "the cycle begins with that momentum"


def test_a_reloaded_optimizer_is_clipped_on() -> None:
    run = Run(sgd(3.0, 0.9), rule=StepRule(None)).over(batches(3))
    run.optimizer.load_state_dict(saved(run.optimizer)[0])
    before = run.clipper._history.counts.clipped
    run.over(batches(2))
    assert int(run.clipper._history.counts.clipped) == int(before) + 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "make", [sgd(0.5, 0.9), sgd(0.5), adamw(), lambda m: ClippedMomentum(m.parameters(), 1.0, threshold=1.0)]
)
def test_a_gradient_that_is_not_finite_counts_as_zero(make, value) -> None:
    mode = "set" if isinstance(make(nn.Linear(1, 1)), ClippedMomentum) else "clip"
    run, twin = (Run(make, rule=StepRule(multiple=None, relative=0.05), mode=mode) for _ in range(2))
    loader = batches(6)
    for k, batch in enumerate(loader):
        if k != 3:
            run.step(batch)
            twin.step(batch)
            continue
        run.optimizer.zero_grad()
        cross_entropy(run.model, batch).backward()
        run.model[0].weight.grad[1, 2] = value
        with pytest.warns(SmoothdiagWarning, match="The gradient of step 3 was not finite"):
            run.optimizer.step()
        for p in twin.model.parameters():
            p.grad = torch.zeros_like(p)
        twin.optimizer.step()
    assert_identical(state_of(run.model, run.optimizer), state_of(twin.model, twin.optimizer))
    assert torch.isfinite(run.weights()).all()
    (event,) = run.clipper.history.query("event == 'not finite'").to_dict("records")
    assert (event["step"], event["skipped"]) == (3, 1)
    assert "1 gradient was not finite" in run.clipper.reason


def test_batches_that_are_not_finite_leave_calibration_alone() -> None:
    run = Run(sgd(4.0, 0.9))
    loader = batches(60)
    for k in (2, 5, 13, 40, 41):
        loader[k] = (loader[k][0] * math.inf, loader[k][1])
    with pytest.warns(SmoothdiagWarning, match="The gradient of step 2 was not finite"):
        run.over(loader)
    events = run.clipper.history.query("event == 'not finite'")
    assert list(events["step"]) == [2, 5, 13, 41], "of some in a row the last"
    assert list(events["skipped"]) == [1, 2, 3, 5]
    assert "3 rows could not be used: 3 non_finite" in run.clipper.reason
    assert "10 measurements" in run.clipper.reason
    assert math.isfinite(run.losses[-1])
    assert median(run.losses[-10:]) < 0.5 * run.losses[0]


def test_a_bad_batch_moves_the_weights_by_no_more_than_the_longest_step() -> None:
    loader = batches(60)
    loader[40] = (loader[40][0] * 5, (loader[40][1] + 1) % 3)

    def ends(clipped):
        run = Run(sgd(5.0), clipped=clipped)
        run.over(loader[:40])
        before = run.weights()
        run.step(loader[40])
        moved = float((run.weights() - before).norm())
        run.over(loader[41:])
        return moved, median(run.losses[-10:]), run

    free, clipped = ends(False), ends(True)
    assert clipped[0] == pytest.approx(clipped[2].clipper.longest_step, rel=1e-5)
    assert free[0] > 5 * clipped[0]
    assert clipped[1] < free[1]


@pytest.mark.filterwarnings("ignore:AutoClip lowered")
def test_a_rate_far_too_large_trains_where_it_diverges_without() -> None:
    loader = batches(150)
    clipped, free = (
        median(Run(sgd(60.0, 0.9), clipped=c, schedule=never).over(loader).losses[-20:]) for c in (True, False)
    )
    assert clipped < 0.7
    assert not free < 5.0


@pytest.mark.thorough
def test_curvature_that_grows_late_lowers_the_longest_step() -> None:
    """On a bowl that becomes 50 times as steep at step 60, the same gradient needs a step 50 times shorter."""
    model = nn.Linear(1, 4, bias=False).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    centre = torch.tensor([[3.0], [1.0], [-2.0], [4.0]], dtype=torch.float64)

    def loss(net, batch):
        scale, here = batch  # g stays: the more the curvature grows, the nearer is the centre
        return (scale * 0.5 * (net.weight - here + centre / scale) ** 2).sum()

    probe = Probe(model, optimizer, loss, schedule=never)
    clipper = AutoClip(optimizer, probe)
    with pytest.warns(SmoothdiagWarning, match="lowered the longest step"):
        for k in range(1000):
            batch = (1.0 if k < 60 else 50.0, model.weight.detach().clone())
            probe.observe(batch)
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
    events = clipper.history.set_index("event")
    size = float(centre.norm())
    assert events.loc["held", "longest_step"] == pytest.approx(1.2 * size, rel=1e-6)
    assert clipper.longest_step == pytest.approx(1.2 * size / 50, rel=1e-6)
    steps = [row["step"] for row in probe.trace]
    third = [step for step in steps if step >= 60][2]
    assert events.loc["lowered", "step"] == third + 1, "three measurements say so"
    assert third <= 400, "they never become rarer than one in 200 steps"
    assert f"lowered at step {third}" in clipper.reason


@pytest.mark.thorough
def test_gradients_that_become_small_lower_nothing() -> None:
    """The Hessian is constant and the rate is stable: 4,000 times smaller gradients need no shorter steps."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 10, generator=generator)
    targets = [inputs @ torch.randn(10, 1, generator=generator) for _ in range(2)]

    def loss(net, batch):
        return (net(inputs) - batch).square().mean()

    torch.manual_seed(0)
    model = nn.Linear(10, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = Probe(model, optimizer, loss, schedule=never)
    clipper = AutoClip(optimizer, probe)
    losses = []
    for target in probe.watch([targets[0]] * 700 + [targets[1]] * 700):
        optimizer.zero_grad()
        value = loss(model, target)
        losses.append(value.item())
        value.backward()
        optimizer.step()
    assert "lowered" not in set(clipper.history["event"])
    assert losses[699] < 1e-6 < 0.1 < losses[700]
    assert losses[-1] < 1e-6


FORM = (
    r"longest step [\d.]+ from 13 measurements in steps 1-29: median \|\|g\|\|/L [\d.]+ \[[\d.]+, [\d.]+\], times 1.2"
    r"( and \([\d.]+ / 0.5\)\^0.5, because halves of a batch share [\d.]+ of the squared gradient)?; "
    r"at lr 4 this is max_norm [\d.]+; held since step 30; \d+% of steps clipped so far\."
)


def test_the_reason_is_a_sentence_of_numbers() -> None:
    run = Run(sgd(4.0), schedule=every(7))
    assert "no step taken yet" in run.clipper.reason
    assert "0.03 ||x||, because AutoClip has 0 of the 5 valid measurements that it needs" in run.clipper.reason
    run.over(batches(31))
    head, todo, reason = run.clipper.reason.split("\n")
    assert re.fullmatch(r"AutoClip: no step is longer than [\d.]+, which is max_norm=[\d.]+ at lr=4; \d+% of .*", head)
    assert todo.startswith("NEXT: nothing to do")
    assert re.fullmatch(FORM.replace("1-29", r"\d-29"), reason), reason
    (share,) = re.findall(r"(\d+)% of steps", reason)
    assert int(share) == round(100 * int(run.clipper._history.counts.clipped) / 31)
    rows = run.probe.trace.to_frame().query("estimator == 'local_clip' and step < 30")
    lengths = (rows["grad_norm"] / rows["smoothness"])[-13:]
    expected = 1.2 * lengths.median() * math.sqrt(rows["signal"][-13:].mean() / 0.5)
    assert run.clipper.longest_step == pytest.approx(expected, rel=1e-12)
    assert f"median ||g||/L {lengths.median():.3g}" in reason


def test_without_measurements_it_says_what_it_goes_by() -> None:
    run = Run(sgd(4.0))
    for batch in batches(40):  # nobody shows the probe a batch
        run.optimizer.zero_grad()
        cross_entropy(run.model, batch).backward()
        if run.probe.steps == 0:
            with pytest.warns(SmoothdiagWarning, match="has seen no batch"):
                run.optimizer.step()
        else:
            run.optimizer.step()
    assert "from 0.03 ||x||, because AutoClip has 0 of the 5 valid measurements" in run.clipper.reason
    assert run.clipper.longest_step == pytest.approx(0.03 * float(run.weights().norm()), rel=0.2)


def test_rows_of_other_estimators_and_groups_do_not_count() -> None:
    estimators = (PathSmoothness(), LocalSmoothness(), LocalSmoothness(direction="random"))
    runs = [Run(sgd(4.0), schedule=schedule, estimators=estimators).over(batches(40)) for schedule in (every(1), never)]
    assert runs[0].clipper.reason == runs[1].clipper.reason
    names = set(runs[0].probe.trace.to_frame()["estimator"])
    assert names == {"path", "local", "local_random", "local_clip"}
    assert set(runs[1].probe.trace.to_frame()["estimator"]) == {"local_clip"}
    grouped = Run.__new__(Run)
    Run.__init__(grouped, sgd(4.0), clipped=False)
    probe = Probe(grouped.model, grouped.optimizer, cross_entropy, estimators=[LocalSmoothness()], schedule=never,
                  group_by=by_module())  # fmt: skip
    grouped.probe.close()
    grouped.probe, grouped.clipper = probe, AutoClip(grouped.optimizer, probe)
    assert grouped.over(batches(40)).clipper.reason == runs[1].clipper.reason


@pytest.mark.parametrize(("make", "gain"), [(sgd(1e-3, 0.9), 10.0), (adamw(1e-5), 1.0)])
def test_set_lr_raises_a_rate_that_is_too_small(make, gain) -> None:
    run, rates = Run(make, set_lr=True), []
    for batch in batches(60):
        run.step(batch)
        rates.append(run.optimizer.param_groups[0]["lr"])
    calibration, first = run.clipper._calibration, rates[0]
    known = Calibration(calibration.rule)
    expected = []
    for found in calibration.early:
        known.add(found)
        rates_found = [m.rate for m in known.early]
        reached = known.factor * min(median(rates_found), *rates_found[-2:]) / gain if len(rates_found) >= 5 else first
        before = expected[-1] if expected else first
        expected.append(max(before, min(reached, 4 * before)))
    assert rates[:5] == [first] * 5, "four measurements are too few"
    assert rates[5] == pytest.approx(4 * first), "at most fourfold at once"
    assert rates[30] > 10 * first
    assert rates[30:] == [rates[30]] * 30, "it is held when S is"
    assert [rates[m.step + 1] for m in calibration.early] == pytest.approx(expected, rel=1e-12)
    history = run.clipper.history
    raises = history[history["event"] == "set lr"]
    assert raises["lr"].tolist() == pytest.approx([rates[step] for step in raises["step"]], rel=1e-12), "the new rate"
    told = f"`set_lr` raised the learning rate from {first:.3g} to {rates[30]:.3g} (step {raises['step'].iloc[-1]})"
    assert told in run.clipper.reason.split("\n")[0]
    assert ("(for momentum 0.9)" in run.clipper.reason) == (gain == 10.0)
    small = Run(make).over(batches(60))
    assert median(run.losses[-10:]) < 0.7 * median(small.losses[-10:])


@pytest.mark.parametrize("make", [sgd(100.0, 0.9), adamw(10.0)])
def test_set_lr_never_lowers_a_rate(make) -> None:
    run = Run(make, set_lr=True)
    before = run.optimizer.param_groups[0]["lr"]
    assert run.over(batches(40)).optimizer.param_groups[0]["lr"] == before


@pytest.mark.parametrize("stop", [3, 9])
def test_a_resumed_run_goes_on_raising_its_rate(stop) -> None:
    loader = batches(35, seed=11)
    whole = Run(adamw(1e-5), set_lr=True).over(loader)
    first, second = (Run(adamw(1e-5), set_lr=True) for _ in range(2))
    first.over(loader[:stop])
    states = saved(first.model, first.optimizer, first.probe, first.clipper)
    for part, state in zip([second.model, second.optimizer, second.probe, second.clipper], states, strict=True):
        part.load_state_dict(state)
    second.over(loader[stop:])
    assert_identical(state_of(second.model, second.optimizer), state_of(whole.model, whole.optimizer))
    assert second.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]


def test_a_rate_is_not_set_under_a_schedule_or_without_measurements() -> None:
    def scheduled(model):
        optimizer = sgd()(model)
        LambdaLR(optimizer, lambda k: 1.0)
        return optimizer

    with pytest.raises(ValueError, match="Parameter `set_lr` should be False under a schedule"):
        Run(scheduled, set_lr=True)
    late = Run(sgd(), set_lr=True)
    LambdaLR(late.optimizer, lambda k: 1.0)
    with pytest.raises(ValueError, match="Parameter `set_lr` should be False under a schedule"):
        late.over(batches(1))
    with pytest.raises(ValueError, match="only if its rule measures"):
        Run(adamw(), set_lr=True, rule=StepRule(multiple=None))
    assert math.isnan(Run(sgd()).clipper.suggest_lr())


def test_rows_are_read_once_however_long_the_trace(monkeypatch) -> None:
    run = Run(sgd(0.1), schedule=every(1))
    read = []
    original = Trace.__getitem__
    monkeypatch.setattr(Trace, "__getitem__", lambda self, i: read.append(i) or original(self, i))
    run.over(batches(50))
    assert run.clipper.longest_step > 0
    assert len(run.probe.trace) > 50
    assert read == list(range(len(run.probe.trace)))


def test_the_slope_of_a_direction_says_how_far_to_go() -> None:
    """On a quadratic f(x + s v/||v||) is lowest at s = -<g, v> ||v|| / v'Hv."""
    values = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)
    model = nn.Linear(3, 1, bias=False).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.3)

    def loss(net, _):
        return 0.5 * (values * net.weight**2).sum()

    probe = Probe(model, optimizer, loss, estimators=[DirectionalCurvature("update")], schedule=every(1))
    x = model.weight.detach().clone()[0]
    probe.observe(torch.zeros(1))
    loss(model, None).backward()
    optimizer.step()
    v = model.weight.detach()[0] - x
    row = next(r for r in probe.trace if r["estimator"] == "curvature_update")
    assert row["slope"] == pytest.approx(float((values * x) @ v / v.norm()), rel=1e-9)
    best = -float((values * x) @ v) * float(v.norm()) / float(v @ (values * v))
    assert -row["slope"] / row["smoothness"] == pytest.approx(best, rel=1e-9)
