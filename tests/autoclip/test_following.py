"""autoclip.following: updates that follow from the optimizer's state are shortened as those between copies."""

import copy
import math

import pytest
import torch
from asserts import assert_identical, state_of
from autoclip_runs import Run, batches
from losses import cross_entropy
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.testing import assert_close

from smoothdiag import AutoClip, Probe, SmoothdiagWarning, StepRule
from smoothdiag.adapters import adapter_of
from smoothdiag.adapters.updates import Stretch
from smoothdiag.autoclip import acting, following, stretches

BINDING, LOOSE = (StepRule(multiple=None, relative=share) for share in (0.02, 100.0))


def of(name: str, **options):
    return lambda m: getattr(torch.optim, name)(m.parameters(), lr=0.05, **options)


FOLLOWED = {
    "adam": of("Adam", weight_decay=0.1),
    "amsgrad": of("Adam", amsgrad=True, maximize=True),
    "adamw": of("AdamW", weight_decay=0.5),
    "adamw fused": of("AdamW", fused=True),
    "adamw foreach": of("AdamW", foreach=True, maximize=True),
    "adamw groups": lambda m: torch.optim.AdamW(
        [{"params": m[0].parameters(), "weight_decay": 0.0}, {"params": m[2].parameters(), "lr": 0.1}], lr=0.02
    ),
    "nadam": of("NAdam"),
    "nadam decoupled": of("NAdam", weight_decay=0.1, decoupled_weight_decay=True),
    "rmsprop": of("RMSprop", centered=True),
    "rmsprop momentum": of("RMSprop", momentum=0.9, weight_decay=0.1),
    "adagrad": of("Adagrad", lr_decay=0.1),
}
COPIED = {
    "adagrad decay": of("Adagrad", weight_decay=0.1),
    "nadam decay": of("NAdam", weight_decay=0.1),
    "rprop": of("Rprop"),
    "decay takes all": lambda m: torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=10.0),
}


def copies(run: Run, loader) -> list[bool]:
    """Takes steps, and returns whether AutoClip kept a copy in each."""
    found: list[bool] = []
    handle = run.optimizer.register_step_pre_hook(lambda *_: found.append(bool(run.clipper._action._start)))
    run.over(loader)
    handle.remove()
    return found


@pytest.mark.parametrize("name", FOLLOWED)
def test_one_copy_is_enough(name) -> None:
    assert copies(Run(FOLLOWED[name], rule=BINDING), batches(4)) == [True, False, False, False]


@pytest.mark.parametrize("name", COPIED)
def test_where_updates_do_not_follow_copies_are_kept(name) -> None:
    assert copies(Run(COPIED[name], rule=BINDING), batches(3)) == [True] * 3


def test_parameters_of_sixteen_bits_are_copied() -> None:
    run = Run(FOLLOWED["adamw"], rule=BINDING, dtype=torch.bfloat16)
    assert copies(run, batches(3, dtype=torch.bfloat16)) == [True] * 3


def by_hand(optimizer: torch.optim.Optimizer, model: nn.Module, loader, share: float) -> list[float]:
    """Steps of a twin, shortened between copies; returns their lengths before that."""
    lengths = []
    for batch in loader:
        held = [p for p in model.parameters() if p.requires_grad]
        start = [p.detach().clone() for p in held]
        size = math.sqrt(sum(float(x.square().sum()) for x in start))
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()
        moved = [p.detach() - x for p, x in zip(held, start, strict=True)]
        length, longest = math.sqrt(sum(float(m.square().sum()) for m in moved)), share * size
        with torch.no_grad():
            for p, x, m in zip(held, start, moved, strict=True):
                p.copy_(x + m * min(1.0, longest / length))
        lengths.append(length / longest)
    return lengths


@pytest.mark.parametrize("numbers", [(stretches.ON_CPU, following.KEPT), (20, 50)], ids=["together", "in parts"])
@pytest.mark.parametrize("name", FOLLOWED)
def test_shortened_steps_are_those_between_copies(name, numbers, monkeypatch) -> None:
    monkeypatch.setattr(stretches, "ON_CPU", numbers[0])
    monkeypatch.setattr(following, "KEPT", numbers[1])
    run = Run(FOLLOWED[name], rule=BINDING, dtype=torch.float64)
    twin = copy.deepcopy(run.model)
    optimizer = FOLLOWED[name](twin)
    loader = batches(6, dtype=torch.float64)
    assert min(by_hand(optimizer, twin, loader, 0.02)[1:]) > 1.1, "otherwise nothing is shortened"
    run.over(loader)
    assert_close(run.weights(), torch.cat([p.detach().flatten() for p in twin.parameters()]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", FOLLOWED)
def test_where_nothing_is_shortened_no_bit_changes(name) -> None:
    plain = Run(FOLLOWED[name], clipped=False).over(batches(5))
    clipped = Run(FOLLOWED[name], rule=LOOSE).over(batches(5))
    assert_identical(state_of(clipped.model, clipped.optimizer), state_of(plain.model, plain.optimizer))


@pytest.mark.parametrize("name", ["adam", "amsgrad", "adamw", "adamw groups"])
def test_a_bound_on_an_update_is_close_and_on_the_safe_side(name) -> None:
    run = Run(FOLLOWED[name], clipped=False, dtype=torch.float64)
    loader = batches(5, dtype=torch.float64)
    run.over(loader[:4])
    before = [p.detach().clone() for p in run.model.parameters()]
    run.step(loader[4])
    for group in run.optimizer.param_groups:
        formula = adapter_of(run.optimizer).update(group)
        for p in group["params"]:
            (start,) = (x for q, x in zip(run.model.parameters(), before, strict=True) if q is p)
            length = float((p.detach() - start).norm())
            most = math.sqrt(formula.most(Stretch([p], [run.optimizer.state[p]])))
            decayed = (
                group["lr"] * group["weight_decay"] * float(p.detach().norm()) if name.startswith("adamw") else 0.0
            )
            assert length * (1 - 1e-12) <= most <= (1 + 1e-5) * length + 2.1 * decayed


def test_a_bound_is_the_length_where_step_and_decay_point_the_same_way() -> None:
    p = nn.Parameter(torch.full((10,), 3.0, dtype=torch.float64))
    optimizer = torch.optim.AdamW([p], lr=0.1, weight_decay=0.5, eps=1e-30)
    p.grad = torch.ones_like(p)
    optimizer.step()
    most = adapter_of(optimizer).update(optimizer.param_groups[0]).most(Stretch([p], [optimizer.state[p]]))
    assert math.sqrt(most) == pytest.approx((0.1 + 0.05 * 3) * math.sqrt(10), rel=1e-12)


def test_bounds_shorten_the_same_steps_as_lengths(monkeypatch) -> None:
    monkeypatch.setattr(acting, "is_in_progression", lambda step: False)
    run = Run(of("AdamW", weight_decay=0.1), rule=StepRule(multiple=None, relative=0.18), dtype=torch.float64)
    twin = copy.deepcopy(run.model)
    loader = batches(7, dtype=torch.float64)  # as long as the length of x is measured in every step
    lengths = by_hand(of("AdamW", weight_decay=0.1)(twin), twin, loader, 0.18)
    found: list[float | torch.Tensor] = []
    run.optimizer.register_step_post_hook(lambda *_: found.append(run.clipper._action._length))
    run.over(loader)
    is_bound = [isinstance(length, float) for length in found]
    assert is_bound.count(True) > 1
    assert max(length for length, bound in zip(lengths, is_bound, strict=True) if bound) <= 1
    assert sum(length > 1 for length in lengths) > 1, "otherwise nothing is shortened"
    assert run.clipper.clip_fraction == sum(length > 1 for length in lengths) / 7
    assert_close(run.weights(), torch.cat([p.detach().flatten() for p in twin.parameters()]), rtol=1e-9, atol=1e-12)


def test_gradients_that_were_zero_so_far_have_a_length_of_zero() -> None:
    run = Run(of("AdamW", weight_decay=0.0), rule=LOOSE)
    run.model[0].weight.register_hook(torch.zeros_like)
    run.over(batches(9))
    assert math.isfinite(run.clipper._action._length)
    assert run.clipper.clip_fraction == 0


def test_many_small_tensors_are_one_stretch() -> None:
    def many() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(6, 6) for _ in range(40)), nn.Linear(6, 3)).double()

    model, twin = many(), many()
    first, second = FOLLOWED["adamw"](model), FOLLOWED["adamw"](twin)
    probe = Probe(model, first, cross_entropy, estimators=())
    AutoClip(first, probe, rule=BINDING)
    loader = batches(4, dtype=torch.float64)
    for batch in loader:
        first.zero_grad()
        probe.observe(batch)
        cross_entropy(model, batch).backward()
        first.step()
    by_hand(second, twin, loader, 0.02)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_parameters_may_rest_for_a_while() -> None:
    run = Run(FOLLOWED["adamw"], rule=BINDING, dtype=torch.float64)
    twin = copy.deepcopy(run.model)
    optimizer = FOLLOWED["adamw"](twin)
    kept = []
    for k, batch in enumerate(batches(7, dtype=torch.float64)):
        for model in (run.model, twin):
            model[0].requires_grad_(k not in (3, 4))
        by_hand(optimizer, twin, [batch], 0.02)
        kept += copies(run, [batch])
    assert kept == [True] + [False] * 6
    assert {float(state["step"]) for state in run.optimizer.state.values()} == {5.0, 7.0}
    assert_close(run.weights(), torch.cat([p.detach().flatten() for p in twin.parameters()]), rtol=1e-9, atol=1e-12)


def test_parameters_may_rest_while_copies_are_kept() -> None:
    run = Run(FOLLOWED["adamw fused"], rule=BINDING, dtype=torch.float64)
    twin = copy.deepcopy(run.model)
    optimizer = FOLLOWED["adamw fused"](twin)
    kept = []
    for k, batch in enumerate(batches(6, dtype=torch.float64)):
        for model in (run.model, twin):
            model[0].requires_grad_(k != 3)
        run.optimizer.found_inf = torch.tensor(0.0) if k == 3 else None  # as if a GradScaler might skip the step
        by_hand(optimizer, twin, [batch], 0.02)
        kept += copies(run, [batch])
    assert kept == [True, False, False, True, False, False]
    assert_close(run.weights(), torch.cat([p.detach().flatten() for p in twin.parameters()]), rtol=1e-9, atol=1e-12)


def reload_state(run: Run) -> None:
    run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))


def no_decay(run: Run) -> None:
    run.optimizer.param_groups[0]["weight_decay"] = 0.0


def join(run: Run) -> None:
    extra = nn.Parameter(torch.ones(3))
    extra.grad = torch.ones(3)
    run.optimizer.add_param_group({"params": [extra]})


@pytest.mark.parametrize("change", [reload_state, no_decay, join])
def test_what_changes_is_compared_with_a_copy_again(change) -> None:
    run = Run(FOLLOWED["adamw"], rule=BINDING)
    assert copies(run, batches(3)) == [True, False, False]
    change(run)
    assert copies(run, batches(3))[:2] == [True, False]


def test_a_schedule_needs_no_new_copy() -> None:
    run = Run(FOLLOWED["adamw"], rule=BINDING)
    schedule = LambdaLR(run.optimizer, lambda step: 1 / (1 + step))
    for k, batch in enumerate(batches(4)):
        assert copies(run, [batch]) == [k == 0]
        schedule.step()


def test_an_optimizer_that_does_more_than_its_class_says_is_copied() -> None:
    run = Run(FOLLOWED["adamw"], clipped=False)
    run.optimizer.register_step_post_hook(lambda o, *_: [p.data.mul_(0.9) for p in o.param_groups[0]["params"]])
    run.clipper = AutoClip(run.optimizer, run.probe, rule=BINDING)
    assert copies(run, batches(3)) == [True] * 3


def test_a_rate_that_changes_before_the_step_is_over_is_noticed() -> None:
    run = Run(FOLLOWED["adamw"], clipped=False)
    rates = iter([0.05, 0.05, 0.01, 0.01, 0.01])
    run.optimizer.register_step_post_hook(lambda o, *_: o.param_groups[0].update(lr=next(rates)))
    run.clipper = AutoClip(run.optimizer, run.probe, rule=BINDING)
    loader = batches(5)
    assert copies(run, loader[:2]) == [True, False]
    with pytest.warns(SmoothdiagWarning, match="options of an optimizer should stay"):
        run.over(loader[2:3])
    assert copies(run, loader[3:4]) == [True]


def test_a_step_that_a_grad_scaler_may_skip_is_copied() -> None:
    run = Run(of("AdamW", fused=True), rule=BINDING)
    run.over(batches(2))
    before = run.weights()
    run.optimizer.found_inf, run.optimizer.grad_scale = torch.tensor(1.0), torch.tensor(1.0)
    assert copies(run, batches(1)) == [True]
    assert torch.equal(run.weights(), before)


@pytest.mark.parametrize("name", ["RMSprop", "NAdam", "Adagrad"])
def test_where_a_hook_removes_the_gradients_copies_are_kept(name) -> None:
    def made(m: nn.Module) -> torch.optim.Optimizer:
        optimizer = of(name)(m)
        optimizer.register_step_post_hook(lambda *_: optimizer.zero_grad())
        return optimizer

    removing, keeping = (Run(make, rule=BINDING) for make in (made, of(name)))
    assert all(copies(removing, batches(6)))
    keeping.over(batches(6))
    assert_close(list(removing.model.parameters()), list(keeping.model.parameters()))
