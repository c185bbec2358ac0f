"""autoclip: no fault inside AutoClip or around it ends a run, and a passing lack of memory changes no run."""

import copy
import math
import sys
import warnings
from typing import Any

import pytest
import torch
from asserts import assert_identical, state_of
from autoclip_runs import Run, adamw, batches, by_closure, network, sgd, two_groups
from losses import cross_entropy
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from smoothdiag import AutoClip, ClippedMomentum, Probe, SmoothdiagWarning, StepRule
from smoothdiag.autoclip import step as hooks
from smoothdiag.autoclip.rows import Rows

pytestmark = pytest.mark.usefixtures("without_collecting")

BINDING = StepRule(multiple=None, relative=0.02)


class Failing(TorchDispatchMode):
    """Raises an out-of-memory error at operations that AutoClip makes, counted from 0."""

    def __init__(self, *, at: int, ever_after: bool = False) -> None:
        super().__init__()
        self.at, self.ever_after, self.count = at, ever_after, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        frame = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename != hooks.__file__:
            frame = frame.f_back
        if frame is not None:
            self.count += 1
            if self.count - 1 == self.at or (self.ever_after and self.count > self.at):
                raise torch.OutOfMemoryError("CUDA out of memory (injected).")
        return function(*args, **(kwargs or {}))


FAULTY = {
    "sgd": (sgd(3.0, 0.9), {"rule": BINDING}),
    "sgd, two groups": (two_groups(momentum=0.9), {"rule": BINDING}),
    "sgd, measured": (sgd(3.0), {}),
    "adamw": (adamw(0.1), {"rule": BINDING}),
    "adamw, measured": (adamw(0.1), {}),
    "adamw, shadow": (adamw(0.1), {"rule": BINDING, "mode": "shadow"}),
    "set": (lambda m: ClippedMomentum(m.parameters(), lr=3.0, threshold=1.0), {"rule": BINDING, "mode": "set"}),
}


def faulty_run(name, dtype, *, after=0, steps=2, closures=False, not_finite=True, **fault):
    """Returns a run whose operations fail from step ``after`` on, and how many operations there were."""
    make, options = FAULTY[name]
    run = Run(make, dtype=dtype, **options)
    loader = batches(steps, dtype=dtype)
    if not_finite and "mode" not in options:
        loader[after] = (loader[after][0] * math.nan, loader[after][1])  # gradients that become zero
    step = (lambda batch: by_closure(run, batch)) if closures else run.step
    for batch in loader[:after]:
        step(batch)
    with Failing(**fault) as failing:
        for batch in loader[after:]:
            step(batch)
    return run, failing.count


def cases() -> list[Any]:
    """Returns every faulty run with both dtypes, and with and without a closure; half of the pairs are slow."""
    pairs = [(torch.float32, False), (torch.bfloat16, True), (torch.float32, True), (torch.bfloat16, False)]
    return [
        pytest.param(
            name, dtype, closures, id=f"{name}, {dtype}, {'closure' if closures else 'no closure'}",
            marks=pytest.mark.slow if place > 1 else (),
        )
        for name in FAULTY for place, (dtype, closures) in enumerate(pairs)
    ]  # fmt: skip


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:The gradient of step")
@pytest.mark.parametrize(("name", "dtype", "closures"), cases())
def test_memory_that_runs_out_once_changes_no_bit(name, dtype, closures) -> None:
    every_one = name in ("sgd", "adamw") and not closures
    after = 1 if every_one else 0
    expected, number = faulty_run(name, dtype, after=after, closures=closures, at=-1)
    assert number > 30
    for n in range(0, number, 1 if every_one else 11):
        run, _ = faulty_run(name, dtype, after=after, closures=closures, at=n)
        assert_identical(state_of(run.model, run.optimizer), state_of(expected.model, expected.optimizer))
        assert run.clipper.reason == expected.clipper.reason
        assert run.clipper.history.equals(expected.clipper.history)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in FAULTY),
        ("adamw, measured", torch.bfloat16),
        *(pytest.param(name, torch.bfloat16, marks=pytest.mark.slow) for name in FAULTY if name != "adamw, measured"),
    ],
    ids=str,
)
def test_memory_that_stays_out_ends_no_run(name, dtype) -> None:
    for after in (0, 1):
        for n in range(0, 40, 4):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SmoothdiagWarning)
                run, _ = faulty_run(name, dtype, after=after, not_finite=False, at=n, ever_after=True)
                assert torch.isfinite(run.weights()).all()
                events = set(run.clipper.history["event"])
                assert run.clipper.reason
                assert math.isfinite(run.clipper.longest_step) or after == 0
                resumed = Run(FAULTY[name][0], dtype=dtype, **FAULTY[name][1])
                resumed.clipper.load_state_dict(run.clipper.state_dict())
                assert events <= {"started", "not clipped", "not read", "not finite"}


def test_a_step_that_went_unclipped_is_warned_of_once_and_listed() -> None:
    run = Run(adamw(0.1), rule=BINDING).over(batches(2))
    free = Run(adamw(0.1), clipped=False)
    free.model.load_state_dict(run.model.state_dict())
    free.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    loader = batches(4, seed=8)
    with (
        pytest.warns(
            SmoothdiagWarning, match="took this step unclipped.*Memory ran out.*smaller micro-batches"
        ) as said,
        Failing(at=0, ever_after=True),
    ):
        run.over(loader[:3])
    free.over(loader[:3])
    assert len(said) == 1
    assert torch.equal(run.weights(), free.weights())
    assert list(run.clipper.history["event"]) == ["started", "not clipped"]
    before = run.weights()
    run.step(loader[3])
    assert float((run.weights() - before).norm()) == pytest.approx(run.clipper.longest_step, rel=1e-4)


def test_errors_of_the_set_up_end_the_first_step() -> None:
    run = Run(adamw(0.1), rule=BINDING)
    cross_entropy(run.model, *batches(1)).backward()
    run.model[0].weight.grad = run.model[0].weight.grad.to_sparse()
    with pytest.raises(RuntimeError, match="dense gradients"):
        run.optimizer.step()


class Twice(torch.optim.SGD):
    """Evaluates its closure twice in later steps."""

    times = 1

    def step(self, closure):
        for _ in range(self.times - 1):
            closure()
        return super().step(closure)


class Climbing(torch.optim.AdamW):
    """Moves before it evaluates its closure, once it has begun to climb; ``hidden`` from torch's count of writes."""

    climbs = False

    @torch.no_grad()
    def step(self, closure):
        held = self.param_groups[0]["params"]
        before = [p.clone() for p in held]
        for p in held if self.climbs else []:
            p.add_(0.1 * torch.ones_like(p))
        with torch.enable_grad():
            loss = closure()
        for p, x in zip(held, before, strict=True):
            p.copy_(x)
        super().step()
        return loss


def sparse(run, batch) -> None:
    cross_entropy(run.model, batch).backward()
    run.model[0].weight.grad = run.model[0].weight.grad.to_sparse()
    for p in run.model.parameters():
        if p is not run.model[0].weight:
            p.grad = None
    run.optimizer.step()


def in_mid_step(change):
    """Changes something between the hooks before a step and those after it."""

    def act(run, batch):
        handle = run.optimizer.register_step_pre_hook(lambda *_: change(run) and None)
        run.step(batch)
        handle.remove()

    return act


def group_leaves(run, batch) -> None:
    del run.optimizer.param_groups[0]
    run.step(batch)


def group_joins(run, batch) -> None:
    run.extra = nn.Parameter(torch.ones(3))
    run.extra.grad = torch.ones(3)
    run.optimizer.add_param_group({"params": [run.extra], "lr": 0.7})
    run.step(batch)


def assigned(run, batch) -> None:
    run.model.load_state_dict({k: v.clone() for k, v in run.model.state_dict().items()}, assign=True)
    run.step(batch)


def as_bfloat16(run, batch) -> None:
    run.model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        run.step((batch[0].bfloat16(), batch[1]))


def tensor_rate(run, batch) -> None:
    run.optimizer.param_groups[0]["lr"] = torch.tensor(0.05)
    run.step(batch)


def freeze(run, batch) -> None:
    run.model[0].requires_grad_(False)
    run.step(batch)


def no_gradient(run, batch) -> None:
    run.optimizer.zero_grad()
    run.optimizer.step()


def evaluated_twice(run, batch) -> None:
    type(run.optimizer).times = 2
    by_closure(run, batch)
    type(run.optimizer).times = 1


def climbing(run, batch) -> None:
    run.optimizer.climbs = True
    by_closure(run, batch)


def close_probe(run, batch) -> None:
    run.probe.close()
    run.step(batch)


def replaced(run) -> None:
    for p in run.model.parameters():
        p.data = p.data.clone()


CHANGES = {  # what happens once, how to make the optimizer, and the event that it makes
    "group leaves": (group_leaves, two_groups(momentum=0.9), None),
    "group joins": (group_joins, adamw(0.1), "rate rose"),
    "group joins sgd": (group_joins, sgd(0.1), "rate rose"),
    "frozen": (freeze, adamw(0.1), None),
    "frozen sgd": (freeze, sgd(0.5), None),
    "frozen in mid-step": (in_mid_step(lambda r: r.model[0].requires_grad_(False)), adamw(0.1), None),
    "replaced in mid-step": (in_mid_step(replaced), adamw(0.1), None),
    "half in mid-step": (
        in_mid_step(lambda r: r.model.bfloat16()),
        lambda m: torch.optim.Rprop(m.parameters(), lr=0.01),
        None,
    ),
    "group joins in mid-step": (
        in_mid_step(lambda r: r.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})),
        adamw(0.1),
        "rate rose",
    ),
    "detached in mid-step": (in_mid_step(lambda r: r.clipper.detach()), adamw(0.1), None),
    "parameters assigned": (assigned, adamw(0.1), None),
    "bfloat16": (as_bfloat16, lambda m: torch.optim.Rprop(m.parameters(), lr=0.01), None),
    "bfloat16 sgd": (as_bfloat16, sgd(0.5), None),
    "rate is a tensor": (tensor_rate, adamw(0.1), None),
    "rate is a tensor sgd": (tensor_rate, sgd(0.5, 0.9), None),
    "no gradient": (no_gradient, adamw(0.1), None),
    "no gradient sgd": (no_gradient, sgd(0.5), None),
    "sparse gradient": (sparse, sgd(0.5), "not clipped"),
    "one closure": (by_closure, adamw(0.1), None),
    "closure evaluated twice": (evaluated_twice, lambda m: Twice(m.parameters(), lr=0.5), "not clipped"),
    "closure not evaluated": (
        lambda run, batch: torch.optim.SGD.step(run.optimizer, lambda: None),
        sgd(0.5),
        None,
    ),
    "closure after a climb": (climbing, lambda m: Climbing(m.parameters(), lr=0.1), "stopped"),
    "probe closed": (close_probe, adamw(0.1), "probe stopped"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_in_mid_run_ends_no_run(name) -> None:
    change, make, event = CHANGES[name]
    run = Run(make, rule=BINDING)
    needs_closure = isinstance(run.optimizer, Twice | Climbing)
    step = (lambda batch: by_closure(run, batch)) if needs_closure else run.step
    loader = batches(9)
    for batch in loader[:3]:
        step(batch)
    noted = len(run.clipper.history)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        change(run, loader[3])
        is_half = run.model[0].weight.dtype == torch.bfloat16
        for x, y in loader[4:]:
            step((x.bfloat16() if is_half else x, y))
    events = list(run.clipper.history["event"])[noted:]
    assert events == ([event] if event else []), events
    ours = [str(w.message) for w in said if "AutoClip" in str(w.message) and "has stopped:" not in str(w.message)]
    assert len(ours) == (event in ("not clipped", "stopped")), ours
    assert torch.isfinite(run.weights()).all()
    assert run.clipper.reason
    assert run.clipper.longest_step > 0
    assert run.clipper.state_dict()["steps"] == (9 if "detached" not in name else 3)


def test_after_a_climb_it_leaves_the_steps_alone_for_good() -> None:
    run = Run(lambda m: Climbing(m.parameters(), lr=0.1), rule=BINDING)
    loader = batches(8)
    for batch in loader[:3]:
        by_closure(run, batch)
    run.optimizer.climbs = True
    with pytest.warns(SmoothdiagWarning, match="AutoClip stops acting.*Climbing had moved the parameters before"):
        by_closure(run, loader[3])
    state = run.clipper.state_dict()
    free = Run(lambda m: Climbing(m.parameters(), lr=0.1), clipped=False)
    resumed = Run(lambda m: Climbing(m.parameters(), lr=0.1), rule=BINDING)
    for other in (free, resumed):
        other.model.load_state_dict(run.model.state_dict())
        other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
        other.optimizer.climbs = True
    resumed.clipper.load_state_dict(state)
    resumed.probe.load_state_dict(run.probe.state_dict())
    for batch in loader[4:]:
        for other in (run, free, resumed):
            by_closure(other, batch)
    assert torch.equal(run.weights(), free.weights())
    assert torch.equal(resumed.weights(), free.weights())
    assert "AutoClip has stopped acting" in resumed.clipper.reason
    assert run.clipper._history.counts.num_acted == 3 + 0


@pytest.mark.parametrize("hidden", [False, True], ids=["seen by torch", "hidden"])
def test_a_climb_before_the_closure_is_refused_after_a_whole_step(hidden) -> None:
    class Hidden(Climbing):
        climbs = True

        @torch.no_grad()
        def step(self, closure):
            if not hidden:
                return super().step(closure)
            held = self.param_groups[0]["params"]
            before = [p.clone() for p in held]
            for p in held:
                p.data.add_(0.1)
            with torch.enable_grad():
                closure()
            for p, x in zip(held, before, strict=True):
                p.data.copy_(x)
            return torch.optim.AdamW.step(self)

    run, free = (Run(lambda m: Hidden(m.parameters(), lr=0.1), rule=BINDING, clipped=c) if c else
                 Run(lambda m: Hidden(m.parameters(), lr=0.1), clipped=c) for c in (True, False))  # fmt: skip
    (batch,) = batches(1)
    with pytest.raises(RuntimeError, match="Found that Hidden had moved the parameters before, as SAM does. Clip"):
        by_closure(run, batch)
    by_closure(free, batch)
    assert torch.equal(run.weights(), free.weights()), "neither half a step nor a shortened one"


def test_a_group_that_is_taken_out_leaves_the_others_their_peaks() -> None:
    run = Run(two_groups((2.0, 0.5)), rule=BINDING).over(batches(2))
    del run.optimizer.param_groups[0]
    run.over(batches(2))
    assert run.clipper.threshold == pytest.approx(run.clipper.longest_step / 0.5)


def test_a_row_that_cannot_be_read_is_one_measurement_less(monkeypatch) -> None:
    run = Run(sgd(3.0)).over(batches(6))
    original = Rows.measured

    def measured(row):
        if row["step"] == 6:
            raise KeyError("smoothness")
        return original(row)

    monkeypatch.setattr(Rows, "measured", staticmethod(measured))
    run.over(batches(20))
    assert "1 row could not be used: 1 unreadable (KeyError)" in run.clipper.reason


def states():
    return Run(sgd(3.0)).over(batches(8)).clipper.state_dict()


def without(state, *path):
    *outer, last = path
    found = state
    for name in outer:
        found = found[name]
    del found[last]
    return state


DAMAGED = {
    "newer": (lambda s: {**s, "version": 99}, "Found version 99"),
    "version of another kind": (lambda s: {**s, "version": "1.0"}, "Found version '1.0'"),
    "no mapping": (lambda s: list(s), "Found a list"),
    "no action": (lambda s: without(s, "action"), "Found no `action`:"),
    "no peaks": (lambda s: without(s, "peaks"), "Found no `peaks`:"),
    "no rule": (lambda s: without(s, "calibration", "rule"), "Found no `rule` in its `calibration`:"),
    "rule of another version": (lambda s: without(s, "calibration", "rule", "bounded"), "no `bounded` in its `calibr"),
    "further constant": (lambda s: s["calibration"].update(mood=1) or s, "Found `mood` besides in its `calibration`"),
    "events of another version": (lambda s: without(s, "events", 0, "note"), "Found no `note` in its `events`"),
    "measurements of another version": (
        lambda s: s["calibration"].update(measurements=[(1, 2.0)]) or s,
        "measurements of 7 numbers each",
    ),
    "state of a probe": (lambda s: {"steps": 3, "next": None}, "Found no `action`, `alone`,"),
    "empty": (lambda s: {}, "Found no `action`,"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_state_of_another_version_is_refused_by_what_is_missing(name) -> None:
    damage, message = DAMAGED[name]
    run = Run(sgd(3.0))
    before = run.clipper.state_dict()
    with pytest.raises(ValueError, match="Parameter `state` should") as found:
        run.clipper.load_state_dict(damage(states()))
    assert message in str(found.value)
    assert str(run.clipper.state_dict()) == str(before), "nothing of it was loaded"


def test_a_state_without_a_version_goes_on() -> None:
    state = states()
    for name in ("version", "stopped", "num_faults", "groups", "warm_ups"):
        del state[name]
    calibration = state["calibration"]
    del calibration["rule"]["noise"], calibration["raised_at"], calibration["raise_by"], calibration["confirms"]
    calibration["measurements"] = [each[:5] for each in calibration["measurements"]]
    run = Run(sgd(3.0), rule=StepRule())
    run.clipper.load_state_dict(state)
    assert run.clipper.state_dict()["calibration"]["rule"]["noise"] == 0.0, "a run goes on by the rule it began with"
    assert run.clipper.state_dict()["steps"] == 8
    assert run.clipper.state_dict()["version"] == 3


@pytest.mark.parametrize(("rises", "expected"), [(True, 2.0), (False, math.inf)])
def test_a_state_of_version_2_goes_on_by_its_rule(rises, expected) -> None:
    state = states()
    state["version"] = 2
    calibration = state["calibration"]
    del calibration["raise_by"], calibration["confirms"]
    calibration["rises"] = rises
    run = Run(sgd(3.0))
    run.clipper.load_state_dict(state)
    found = run.clipper.state_dict()["calibration"]
    assert (found["raise_by"], found["confirms"]) == (expected, False)


def test_rates_of_updates_are_unknown_where_an_earlier_version_kept_the_curvature() -> None:
    state = Run(adamw(1e-3)).over(batches(8)).clipper.state_dict()
    old, new = Run(adamw(1e-3)), Run(adamw(1e-3))
    old.clipper.load_state_dict({**state, "version": 2})
    new.clipper.load_state_dict(state)
    assert math.isnan(old.clipper.suggest_lr())
    assert new.clipper.suggest_lr() > 0
    assert old.clipper.longest_step == new.clipper.longest_step


def test_a_closed_file_of_optimizers_is_told_by_class() -> None:
    model = network()
    optimizer = torch.optim.ASGD(model.parameters())
    probe = Probe(model, optimizer, cross_entropy)
    with pytest.raises(ValueError, match='Found ASGD. Clip gradients by hand, or pass `mode="shadow"`'):
        AutoClip(optimizer, probe)
    AutoClip(optimizer, probe, mode="shadow").detach()
