"""autoclip: gradients, updates and options change as they do when the same is done by hand."""

import copy
import math
from contextlib import nullcontext
from statistics import median
from types import SimpleNamespace

import pytest
import torch
from asserts import assert_identical, state_of
from autoclip_runs import Run, adamw, batches, network, never, sgd, two_groups
from losses import cross_entropy
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.testing import assert_close

from smoothdiag import (
    GGNC,
    AutoClip,
    ClippedMomentum,
    ClippedScion,
    DirectionalCurvature,
    LocalSmoothness,
    Probe,
    SmoothdiagWarning,
    StepRule,
)
from smoothdiag.autoclip.rows import Arrivals
from smoothdiag.geometry import Euclidean, Sign
from smoothdiag.measure.loss.selftest import SelfTest

FIXED = StepRule(multiple=None, relative=0.02)


def relative(model: nn.Module, share: float) -> float:
    return share * math.sqrt(sum(float(p.detach().double().square().sum()) for p in model.parameters()))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_are_those_of_clip_grad_norm(dtype, momentum) -> None:
    run = Run(sgd(3.0, momentum), dtype=dtype, rule=FIXED)
    (batch,) = batches(1, dtype=dtype)
    twin = copy.deepcopy(run.model)
    cross_entropy(twin, batch).backward()
    longest = relative(twin, 0.02)
    norm = clip_grad_norm_(twin.parameters(), longest / (3.0 / (1 - momentum)))
    assert norm > 2 * longest / (3.0 / (1 - momentum)), "otherwise nothing is clipped"
    run.step(batch)
    rtol = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for p, q in zip(run.model.parameters(), twin.parameters(), strict=True):
        assert_close(p.grad, q.grad, rtol=rtol, atol=1e-8)  # clip_grad_norm_ divides by norm + 1e-6
    assert run.clipper.longest_step == pytest.approx(longest, rel=1e-6 if dtype != torch.bfloat16 else 1e-5)


def test_a_clipped_step_is_as_long_as_the_longest_step() -> None:
    run = Run(sgd(3.0), dtype=torch.float64, rule=FIXED)
    before = run.weights()
    (batch,) = batches(1, dtype=torch.float64)
    run.step(batch)
    assert float((run.weights() - before).norm()) == pytest.approx(run.clipper.longest_step, rel=1e-12)


def test_groups_with_different_rates_share_one_length() -> None:
    run = Run(two_groups((2.0, 0.5), momentum=0.5), rule=FIXED, dtype=torch.float64)
    (batch,) = batches(1, dtype=torch.float64)
    twin = copy.deepcopy(run.model)
    cross_entropy(twin, batch).backward()
    length = math.hypot(
        *(float(p.grad.norm()) * rate * 2 for part, rate in ((twin[0], 2.0), (twin[2], 0.5)) for p in part.parameters())
    )
    scale = relative(twin, 0.02) / length
    assert scale < 0.5
    run.step(batch)
    for p, q in zip(run.model.parameters(), twin.parameters(), strict=True):
        assert_close(p.grad, q.grad * scale, rtol=1e-12, atol=0)
    assert math.isnan(run.clipper.threshold)
    assert "max_norm" not in run.clipper.reason


def test_missing_gradients_are_left_out() -> None:
    run = Run(sgd(5.0), rule=FIXED, dtype=torch.float64)
    (batch,) = batches(1, dtype=torch.float64)
    cross_entropy(run.model, batch).backward()
    run.model[0].weight.grad = None
    rest = [p for p in run.model.parameters() if p.grad is not None]
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in rest))
    expected = [p.grad * relative(run.model, 0.02) / (5.0 * norm) for p in rest]
    run.optimizer.step()
    assert run.model[0].weight.grad is None
    assert_close([p.grad for p in rest], expected, rtol=1e-12, atol=0)
    run.optimizer.zero_grad()
    before = run.weights()
    run.optimizer.step()  # and none at all
    assert torch.equal(run.weights(), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_updates_are_shortened_as_by_hand(dtype) -> None:
    run = Run(adamw(0.1), rule=FIXED, dtype=dtype)
    twin = copy.deepcopy(run.model)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.1)
    for k, batch in enumerate(batches(3, dtype=dtype)):
        longest = relative(twin, 0.02)
        start = [p.detach().clone().double() for p in twin.parameters()]
        optimizer.zero_grad()
        cross_entropy(twin, batch).backward()
        optimizer.step()
        moved = [p.detach().double() - x for p, x in zip(twin.parameters(), start, strict=True)]
        length = math.sqrt(sum(float(m.square().sum()) for m in moved))
        assert length > 1.5 * longest
        with torch.no_grad():
            for p, x, m in zip(twin.parameters(), start, moved, strict=True):
                p.copy_(x + m * longest / length)
        run.step(batch)
        tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
        for p, q in zip(run.model.parameters(), twin.parameters(), strict=True):
            assert_close(p, q, rtol=tolerance, atol=tolerance)
        if k == 0 and dtype == torch.bfloat16:  # rounded once, at the end
            assert float((run.weights() == torch.cat([q.flatten() for q in twin.parameters()])).double().mean()) > 0.98
    assert "100% of steps clipped" in run.clipper.reason
    assert math.isnan(run.clipper.threshold)


OPTIMIZERS = {
    "sgd": sgd(0.1),
    "momentum": sgd(0.1, 0.9, nesterov=True, weight_decay=0.01),
    "groups": two_groups((0.1, 0.3), momentum=0.9),
    "adamw": adamw(),
    "maximize": sgd(0.1, maximize=True),
    "tensor": lambda m: torch.optim.Adam(m.parameters(), lr=torch.tensor(0.01)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_where_nothing_is_clipped_the_run_is_bit_identical(name, dtype) -> None:
    def state(**options):
        rule = {"rule": StepRule(multiple=None, relative=100.0)} if options["clipped"] else {}
        run = Run(OPTIMIZERS[name], dtype=dtype, **options, **rule).over(batches(8, dtype=dtype))
        return state_of(run.model, run.optimizer)

    assert_identical(state(clipped=True), state(clipped=False))


@pytest.mark.parametrize("name", [*OPTIMIZERS, "clipped"])
def test_a_shadow_changes_no_bit(name) -> None:
    make = {**OPTIMIZERS, "clipped": lambda m: ClippedMomentum(m.parameters(), lr=3.0, threshold=0.3)}[name]
    loader = batches(8)
    loader[4] = (loader[4][0] * math.inf, loader[4][1])

    def state(**options):
        run = Run(make, **options)
        if not options["clipped"]:
            return state_of(run.over(loader).model, run.optimizer)
        with pytest.warns(SmoothdiagWarning, match="not finite"):
            run.over(loader)
        assert "would have been clipped" in run.clipper.reason or name == "clipped"
        return state_of(run.model, run.optimizer)

    ours, theirs = state(clipped=True, mode="shadow", rule=StepRule(multiple=None, relative=1e-6)), state(clipped=False)
    for key in list(theirs):
        if isinstance(theirs[key], torch.Tensor) and theirs[key].is_floating_point():
            ours[key], theirs[key] = ours[key].nan_to_num(7.0), theirs[key].nan_to_num(7.0)
    assert_identical(ours, theirs)


def test_a_shadow_counts_what_it_would_have_clipped() -> None:
    acting = Run(sgd(3.0), rule=FIXED).over(batches(1))
    shadow = Run(sgd(3.0), rule=FIXED, mode="shadow").over(batches(1))
    did, would = ([run.clipper.reason.split("\n")[place] for place in (0, 2)] for run in (acting, shadow))
    did = [said.replace("clipped so far", "would have been clipped so far") for said in did]
    acts = 'nothing is clipped in shadow mode; mode="clip" would keep steps within'
    assert [said.replace("no step is longer than", acts) for said in did] == would
    assert 'mode="clip" makes it act' in shadow.clipper.reason


def test_clip_fraction_is_the_share_of_steps_that_were_too_long() -> None:
    run = Run(sgd(0.5), rule=FIXED, mode="shadow")
    assert math.isnan(run.clipper.clip_fraction), "before any step"
    (weight, *others) = run.model.parameters()
    for factor, found in ((0.9, 0.0), (1.1, 1 / 2), (0.9, 1 / 3), (1.1, 2 / 4)):
        longest = relative(run.model, 0.02)
        for p in others:
            p.grad = torch.zeros_like(p)
        weight.grad = torch.full_like(weight, factor * longest / 0.5 / weight.numel() ** 0.5)
        run.optimizer.step()
        assert run.clipper.clip_fraction == found
    cap = Run(CAPS["longest_step"], mode="set").over(batches(2))
    assert math.isnan(cap.clipper.clip_fraction), "the optimizer clips by itself"


@pytest.mark.parametrize("name", ["groups", "adamw"])
def test_a_gradient_that_was_clipped_before_is_noticed(name) -> None:
    run = Run(OPTIMIZERS[name])
    norms = []
    for (x, y), factor in zip(batches(3), (1.0, 1.0, 50.0), strict=True):
        run.optimizer.zero_grad()
        run.probe.observe((factor * x, y))
        cross_entropy(run.model, (factor * x, y)).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.5 * norms[0] if norms else 1e9)))
        run.optimizer.step()
    said = f"at step 2 had the norm {1.5 * norms[0]:.3g}, but the probe measured {norms[2]:.3g}. "
    with pytest.warns(SmoothdiagWarning, match=said):
        assert run.clipper.longest_step > 0


CAPS = {
    "threshold": lambda m: ClippedMomentum(m.parameters(), lr=4.0, threshold=math.inf, momentum=0.8),
    "longest_step": lambda m: ClippedMomentum(m.parameters(), lr=4.0, longest_step=7.0, momentum=0.8, nu=0.7),
    "ggnc": lambda m: GGNC(m.parameters(), lr=4.0, threshold=7.0, geometry=Euclidean(), momentum=0.8),
}


@pytest.mark.parametrize("clip", ["hard", "soft", "normalize"])
@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["number", "tensor"])
def test_a_schedule_may_end_at_the_rate_zero(clip, kind) -> None:
    def make(model):
        return ClippedMomentum(model.parameters(), lr=kind(4.0), longest_step=7.0, clip=clip)

    run = Run(make, mode="set", rule=FIXED)
    group = run.optimizer.param_groups[0]
    for rate in (4.0, 0.0, 2.0, 0.0):
        group["lr"] = kind(rate)
        before = run.weights()
        run.over(batches(1))
        assert bool((run.weights() != before).any()) == (rate > 0)


@pytest.mark.parametrize("name", CAPS)
def test_set_writes_the_cap_of_the_average(name) -> None:
    run = Run(CAPS[name], mode="set", rule=FIXED, dtype=torch.float64)
    group = run.optimizer.param_groups[0]
    nu = group.get("nu", 1.0)
    share = nu * math.sqrt((1 - 0.8) / (1 + 0.8)) + 1 - nu
    cap = relative(run.model, 0.02) * share
    run.over(batches(1, dtype=torch.float64))
    assert group["threshold" if name != "longest_step" else "longest_step"] == pytest.approx(
        cap if name == "longest_step" else cap / 4.0, rel=1e-12
    )
    assert run.clipper.threshold == pytest.approx(cap / 4.0, rel=1e-12)
    assert "a threshold on the averaged gradient" in run.clipper.reason
    group["lr"] = 1.0  # a decay shortens the longest step in either way of saying it
    cap = relative(run.model, 0.02) * share
    run.over(batches(1, dtype=torch.float64))
    step = group["longest_step"] if name == "longest_step" else group["lr"] * group["threshold"]
    assert step == pytest.approx(cap / 4, rel=1e-12)


def test_set_makes_steps_of_the_length_that_is_written() -> None:
    run = Run(lambda m: ClippedMomentum(m.parameters(), lr=1e3, threshold=1.0, momentum=0.0), mode="set", rule=FIXED,
              dtype=torch.float64)  # fmt: skip
    before = run.weights()
    run.over(batches(1, dtype=torch.float64))
    assert float((run.weights() - before).norm()) == pytest.approx(run.clipper.longest_step, rel=1e-9)


REFUSED = [
    (lambda m: GGNC(m.parameters(), lr=1.0, threshold=1.0, geometry=Sign()), "set", "Euclidean norm"),
    (lambda m: GGNC(m.parameters(), lr=1.0, threshold=1.0, geometry=Euclidean(), radius=2.0), "set", "radius"),
    (lambda m: ClippedScion([m[0].weight, m[2].weight], lr=1.0, threshold=1.0, radius=1.0), "set", "Euclidean norm"),
    (lambda m: ClippedMomentum([{"params": m[0].parameters()}, {"params": m[2].parameters()}], lr=1.0, threshold=1.0,
                               norm_scope="group"), "set", "norm_scope"),
    (lambda m: ClippedMomentum(m.parameters(), lr=1.0, threshold=1.0), "clip", "clips by itself"),
    (sgd(), "set", "no threshold of its own"),
    (sgd(), "both", "should be one of"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "mode", "message"), REFUSED)
def test_what_does_not_fit_is_refused(make, mode, message) -> None:
    with pytest.raises(ValueError, match=message):
        Run(make, mode=mode)


def test_probes_that_do_not_fit_are_refused() -> None:
    model = network()
    optimizer, other = sgd()(model), sgd()(model)
    probe = Probe(model, optimizer, cross_entropy)
    with pytest.raises(ValueError, match="a probe of one SGD, and AutoClip was given another SGD"):
        AutoClip(other, probe)
    with pytest.raises(ValueError, match="should be a Probe"):
        AutoClip(optimizer, probe.trace)
    with pytest.raises(ValueError, match="should be a StepRule"):
        AutoClip(optimizer, probe, rule=1.5)
    with pytest.raises(ValueError, match="Parameter `estimator` should be an estimator"):
        AutoClip(optimizer, probe, estimator=LocalSmoothness)
    with pytest.raises(ValueError, match='Parameter `set_lr` should be False in the mode "shadow"'):
        AutoClip(optimizer, probe, mode="shadow", set_lr=True)
    first = AutoClip(optimizer, probe)
    with pytest.raises(ValueError, match="should serve one AutoClip"):
        AutoClip(optimizer, probe)
    first.detach()
    AutoClip(optimizer, probe).detach()
    probe.close()
    with pytest.raises(ValueError, match="should be open"):
        AutoClip(optimizer, probe)


@pytest.mark.parametrize("momentum", [-0.1, 1.0, math.nan])
def test_a_momentum_that_adds_up_without_end_has_no_rule(momentum) -> None:
    with pytest.raises(ValueError, match="Parameter `momentum` should be in"):
        StepRule.for_momentum(momentum)


@pytest.mark.parametrize("field", ["multiple", "relative"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_factors_of_a_rule_are_positive(field, value) -> None:
    with pytest.raises(ValueError, match=f"Parameter `{field}` should be positive and finite"):
        StepRule(**{field: value})


def test_one_part_of_an_update_that_is_not_a_number_does_not_spread() -> None:
    class Broken(torch.optim.Adam):
        def step(self, closure=None):
            super().step(closure)
            with torch.no_grad():
                self.param_groups[0]["params"][0][0, 0] = math.nan

    run = Run(lambda m: Broken(m.parameters(), lr=0.1), rule=FIXED).over(batches(1))
    assert int(run.weights().isnan().sum()) == 1


def test_sparse_gradients_are_refused() -> None:
    model = nn.Embedding(4, 2, sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    AutoClip(optimizer, Probe(model, optimizer, cross_entropy, schedule=never), rule=FIXED)
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="dense gradients"):
        optimizer.step()


class Nested(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


def test_nested_steps_count_once() -> None:
    nested = Run(lambda m: Nested(m.parameters(), lr=3.0), rule=FIXED).over(batches(4))
    plain = Run(sgd(3.0), rule=FIXED).over(batches(4))
    assert torch.equal(nested.weights(), plain.weights())
    assert nested.clipper.reason == plain.clipper.reason


def test_accumulated_gradients_are_clipped_together() -> None:
    whole = Run(sgd(3.0), rule=FIXED, dtype=torch.float64)
    parts = Run(sgd(3.0), rule=FIXED, dtype=torch.float64)
    (batch,) = batches(1, dtype=torch.float64)
    whole.step(batch)
    for x, y in zip(batch[0].chunk(4), batch[1].chunk(4), strict=True):
        parts.probe.observe((x, y))
        (cross_entropy(parts.model, (x, y)) / 4).backward()
    parts.optimizer.step()
    assert_close(parts.weights(), whole.weights(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_is_seen_through(fused) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled = Run(sgd(3.0, 0.9, fused=fused), rule=FIXED)
    plain = Run(sgd(3.0, 0.9, fused=fused), rule=FIXED)
    for batch in batches(4):
        plain.step(batch)
        scaled.optimizer.zero_grad()
        scaled.probe.observe(batch)
        scaler.scale(cross_entropy(scaled.model, batch)).backward()
        scaler.step(scaled.optimizer)
        scaler.update()
    assert_close(scaled.weights(), plain.weights(), rtol=1e-5, atol=1e-6)
    assert "100% of steps clipped" in plain.clipper.reason


def test_the_peak_of_the_rate_counts_when_it_decays() -> None:
    run = Run(sgd(3.0), rule=FIXED, dtype=torch.float64)
    loader = batches(2, dtype=torch.float64)
    run.step(loader[0])
    threshold, longest = run.clipper.threshold, run.clipper.longest_step
    assert threshold == pytest.approx(longest / 3.0, rel=1e-12)
    run.optimizer.param_groups[0]["lr"] = 0.3
    before = run.weights()
    run.step(loader[1])
    assert float((run.weights() - before).norm()) == pytest.approx(run.clipper.longest_step / 10, rel=1e-9)
    assert list(run.clipper.history["event"]) == ["started"]


def test_a_warm_up_from_zero_is_calibrated_in_its_first_steps() -> None:
    run = Run(sgd(1.0))
    schedule = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda k: min(k / 20, 1.0))
    for batch in batches(60):
        run.step(batch)
        schedule.step()
    (held,) = run.clipper.history.query("event == 'held'")["step"]
    assert held == 30
    assert list(run.clipper.history["event"]) == ["started", "measured", "held"]
    steps = run.probe.trace.to_frame()["step"]
    assert list(steps) == [0, 1, 2, 3, 4, 5, 6, 8, 10, 13, 17, 22, 29]
    assert list(run.clipper.history["lr"]) == [1.0, 1.0, 1.0], "the peak of the schedule counts from the start"
    assert run.clipper.threshold == pytest.approx(run.clipper.longest_step), "at the peak of the rate"


def test_a_slow_warm_up_is_one_rise() -> None:
    run = Run(sgd(0.5))
    for batch in batches(120):
        run.step(batch)
        run.optimizer.param_groups[0]["lr"] += 1 / 4000  # 0.05% a step, and no schedule says how far
    assert list(run.clipper.history["event"]) == ["started", "rate rose", "measured", "held"]
    assert run.clipper.threshold == pytest.approx(run.clipper.longest_step / (0.5 + 119 / 4000))


def test_four_times_the_rate_in_mid_run_leaves_the_longest_step() -> None:
    run = Run(sgd(1.0)).over(batches(40))
    threshold, longest = run.clipper.threshold, run.clipper.longest_step
    run.optimizer.param_groups[0]["lr"] *= 4
    run.over(batches(20, seed=6))
    assert run.clipper.longest_step == longest
    assert run.clipper.threshold == pytest.approx(threshold / 4, rel=1e-12)
    last = run.clipper.history.iloc[-1]
    assert (last["event"], last["step"], last["lr"]) == ("rate rose", 40, 4.0)
    assert last["threshold"] == pytest.approx(threshold / 4)
    assert median(run.losses[-10:]) < run.losses[0]


@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_a_tensor_rate_is_a_rate(kind) -> None:
    lr = 3.0 if kind == "number" else torch.tensor(3.0)
    run = Run(lambda m: torch.optim.SGD(m.parameters(), lr=lr, momentum=0.5)).over(batches(40))
    twin = Run(sgd(3.0, 0.5)).over(batches(40))
    assert torch.equal(run.weights(), twin.weights())
    assert run.clipper.reason == twin.clipper.reason


def test_a_group_that_joins_later_is_clipped_with_the_others() -> None:
    run = Run(lambda m: torch.optim.SGD(m[0].parameters(), lr=3.0), rule=FIXED, dtype=torch.float64)
    loader = batches(2, dtype=torch.float64)
    run.step(loader[0])
    run.optimizer.add_param_group({"params": list(run.model[2].parameters()), "lr": 0.3})
    before = run.weights()
    run.step(loader[1])
    assert float((run.weights() - before).norm()) == pytest.approx(run.clipper.longest_step, rel=1e-9)
    assert list(run.clipper.history["event"]) == ["started", "rate rose"]


def test_parameters_that_are_all_zero_do_not_stop_the_run() -> None:
    run = Run(sgd(0.1))
    with torch.no_grad():
        for p in run.model.parameters():
            p.zero_()
    assert math.isnan(run.clipper.longest_step), "before the first step"
    run.over(batches(3))
    assert run.clipper.history["longest_step"].iloc[0] == math.inf
    assert float(run.weights().norm()) > 0


def test_detached_it_does_nothing_and_measures_nothing() -> None:
    run = Run(sgd(3.0), rule=StepRule(relative=1e-6)).over(batches(2))
    run.clipper.detach()
    num_rows = len(run.probe.trace)
    free = Run(sgd(3.0), clipped=False)
    free.model.load_state_dict(run.model.state_dict())
    run.over(batches(5, seed=9)[:1])
    num_rows = len(run.probe.trace)  # the step that was due already
    run.over(batches(5, seed=9)[1:])
    free.over(batches(5, seed=9))
    assert torch.equal(run.weights(), free.weights())
    assert len(run.probe.trace) == num_rows


def test_a_probe_that_stops_is_not_passed_over_in_silence() -> None:
    run = Run(sgd(3.0)).over(batches(40))
    longest = run.clipper.longest_step
    run.probe.close()
    with pytest.warns(SmoothdiagWarning, match="The probe has stopped"):
        run.over(batches(5, seed=8))
    assert run.clipper.longest_step == longest
    assert run.clipper.history["event"].iloc[-1] == "probe stopped"
    assert "the probe has stopped" in run.clipper.reason
    run.over(batches(5, seed=8))  # one warning is enough


def test_a_run_that_is_joined_late_is_calibrated_then() -> None:
    run = Run(sgd(3.0), clipped=False).over(batches(100))
    run.clipper = AutoClip(run.optimizer, run.probe)
    run.over(batches(40, seed=7))
    history = run.clipper.history
    assert list(history["event"]) == ["started", "measured", "held"]
    assert list(history["step"]) == [100, 105, 130]
    assert "13 measurements in steps 100-129" in run.clipper.reason
    assert 0 < history["clipped"].iloc[-1] <= 30


def test_the_smaller_of_both_caps_holds_where_one_bounds_the_other() -> None:
    run = Run(sgd(3.0), rule=StepRule(relative=0.01, bounded=True)).over(batches(40))
    cap = run.clipper.longest_step
    assert cap == pytest.approx(0.01 * float(run.weights().norm()), rel=0.05)
    assert cap < 0.5 * Run(sgd(3.0)).over(batches(40)).clipper.longest_step
    assert "and at most 0.01 ||x||" in run.clipper.reason


def test_rows_of_an_earlier_run_in_the_trace_do_not_count() -> None:
    first = Run(sgd(3.0)).over(batches(40))
    second = Run(sgd(3.0), trace=first.probe.trace)
    second.over(batches(1))
    assert "AutoClip has 0 of the 5 valid measurements" in second.clipper.history["note"].iloc[0]
    assert "1 of the 5 valid measurements" in second.clipper.reason


def test_measurements_along_updates_set_the_cap_too() -> None:
    run = Run(adamw(0.1), rule=StepRule(0.5), estimator=DirectionalCurvature("update")).over(batches(34))
    rows = run.probe.trace.to_frame().query("estimator == 'curvature_update_clip' and step < 30")
    lengths = -rows["slope"] / rows["smoothness"]
    rows = rows[lengths > 0][-13:]
    expected = 0.5 * lengths[rows.index].median() * math.sqrt(rows["signal"].mean() / 0.5)
    assert run.clipper.longest_step == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("make", [adamw(0.1), lambda m: torch.optim.RMSprop(m.parameters(), lr=0.1, momentum=0.9)])
def test_updates_are_capped_by_lengths_along_the_gradient_whatever_the_momentum(make) -> None:
    run = Run(make).over(batches(34))
    rows = run.probe.trace.to_frame().query("estimator == 'local_clip' and step < 30")
    lengths = rows["grad_norm"] / rows["smoothness"]
    expected = 1.2 * lengths.median() * math.sqrt(rows["signal"].mean() / 0.5)
    assert run.clipper.longest_step == pytest.approx(expected, rel=1e-12)
    before = run.weights()
    run.over(batches(1))
    assert float((run.weights() - before).norm()) <= run.clipper.longest_step * (1 + 1e-5)


def test_no_schedule_of_its_own_where_nothing_is_measured() -> None:
    run = Run(adamw(), schedule=never, rule=FIXED).over(batches(10))
    assert len(run.probe.trace) == 0


@pytest.mark.parametrize(("angle", "is_noticed"), [(0.0, True), (math.nan, False)])
def test_clipping_before_is_noticed_where_gradients_are_mostly_rounding(angle: float, is_noticed: bool) -> None:
    # A gradient in bfloat16 is off by a tenth, but its repetition is off by the same tenth.
    test = SelfTest(gradient_error=0.11, angle=angle)
    arrivals = Arrivals(SimpleNamespace(self_test=test), acts=True)
    arrivals.take(0, 0.5)
    with pytest.warns(SmoothdiagWarning, match="Something else seems to clip") if is_noticed else nullcontext():
        arrivals.check({"step": 0, "data": "step", "grad_norm": 1.0})
