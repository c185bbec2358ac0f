"""optim.clipped_momentum: steps agree with a literal twin of the paper, and options, states and refusals behave."""

import copy
import itertools
import math
import pickle
from functools import partial

import grouped
import pytest
import torch
from asserts import NoSync
from grouped import set_grads
from quadratics import descend, lengths, start
from reference import SlowClippedMomentum
from torch import nn
from torch.testing import assert_close

from smoothdiag.optim import ClippedMomentum, clipped_momentum_update

# A matrix, a vector, a scalar, one entry, no entry; the last group never sees a gradient.
SHAPES = [[(3, 2), (4,)], [(), (1, 1), (0,)], [(2,)]]
DEFAULTS = {
    "lr": 0.1, "threshold": 1.0, "momentum": 0.9, "nu": 1.0, "clip": "hard", "weight_decay": 0.0, "maximize": False,
}  # fmt: skip


make_groups = partial(grouped.make_groups, SHAPES)
random_grads = partial(grouped.random_grads, SHAPES)


def compare_with_twin(options, num_steps=100, schedule=None, more=None):
    groups = make_groups()
    optimizer = ClippedMomentum(
        [{"params": p, **o} for p, o in zip(groups, options, strict=True)], lr=9.0, threshold=9.0, **(more or {})
    )
    scheduler = schedule and torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    twin = SlowClippedMomentum([[p.detach().clone() for p in group] for group in groups], options)
    generator = torch.Generator().manual_seed(1)
    for step in range(num_steps):
        if schedule:
            twin.options = [{**o, "lr": o["lr"] * schedule(step)} for o in options]
        grads = random_grads(step, generator)
        set_grads(groups, grads)
        optimizer.step()
        twin.step(grads)
        if scheduler:
            scheduler.step()
        assert_close([[p.detach() for p in group] for group in groups], twin.groups, rtol=1e-12, atol=1e-12)
    for i, group in enumerate(groups):
        for j, p in enumerate(group):
            m = torch.tensor(twin.momenta[i][j], dtype=torch.float64).view_as(p)
            if options[i]["maximize"]:
                m = -m  # the twin climbs by averaging -g
            if optimizer.state[p]:
                assert_close(optimizer.state[p]["momentum_buffer"], m, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("nu", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", ["hard", "soft"])
@pytest.mark.parametrize(
    "more", [{}, {"weight_decay": 0.3}, {"maximize": True, "weight_decay": 0.3}, {"threshold": math.inf}], ids=str
)
def test_equals_the_twin(nu, clip, more):
    compare_with_twin([{**DEFAULTS, "nu": nu, "clip": clip, **more}] * 3)


def test_equals_the_twin_when_every_group_has_its_own_options():
    first = {**DEFAULTS, "lr": 0.3, "threshold": 0.2, "momentum": 0.5, "nu": 0.7, "weight_decay": 0.1}
    second = {**DEFAULTS, "lr": 0.01, "threshold": math.inf, "momentum": 0.0, "nu": 1.0, "clip": "soft"}
    third = {**DEFAULTS, "nu": 0.0, "maximize": True}
    compare_with_twin([first, second, third])


CAPS = [{"threshold": 0.7}, {"threshold": None, "longest_step": 0.07}]
DECAYS = [{}, {"weight_decay": 0.3}, {"weight_decay": 0.3, "decoupled_weight_decay": False}]


@pytest.mark.thorough
@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("norm_scope", ["all", "group"])
@pytest.mark.parametrize("clip", ["hard", "soft", "normalize"])
def test_every_combination_equals_the_twin(clip, norm_scope, bias_correction, foreach):
    more = {"clip": clip, "norm_scope": norm_scope, "bias_correction": bias_correction}
    for nu, cap, decay, maximize in itertools.product([0.0, 0.7, 1.0], CAPS, DECAYS, [False, True]):
        options = {**DEFAULTS, **more, **cap, **decay, "nu": nu, "maximize": maximize}
        compare_with_twin([options] * 3, num_steps=5, more={"foreach": foreach})


@pytest.mark.thorough
@pytest.mark.parametrize("cap", CAPS, ids=str)
@pytest.mark.parametrize("clip", ["hard", "soft", "normalize"])
@pytest.mark.parametrize("more", [{"bias_correction": True, "nu": 0.7}, *DECAYS], ids=str)
def test_equals_the_twin_under_a_schedule(cap, clip, more):
    def warm_up_and_halt(step):
        return min(1, step / 10) * 0.97**step if step < 90 else 0.0

    compare_with_twin([{**DEFAULTS, **cap, **more, "clip": clip}] * 3, schedule=warm_up_and_halt)


def test_equals_the_twin_when_groups_differ_in_everything():
    first = {**DEFAULTS, "threshold": None, "longest_step": 0.2, "nu": 0.7, "norm_scope": "group", "maximize": True}
    second = {**DEFAULTS, "lr": 0.01, "bias_correction": True, "clip": "soft", "weight_decay": 0.1, "nu": 0.4}
    third = {**DEFAULTS, "nu": 0.0, "clip": "normalize"}
    compare_with_twin([first, second, third])
    compare_with_twin([{**second, "decoupled_weight_decay": False}, {**first, "nu": 0.0}, third])


def test_without_a_threshold_it_is_sgd_with_dampening():
    ours, theirs = start(), start()
    optimizer = ClippedMomentum([ours], lr=0.3, threshold=math.inf, momentum=0.8)
    # SGD starts its buffer at g_0, we at 0: with m = g_0 before the first step, 0.8 g_0 + 0.2 g_0 = g_0 as well.
    optimizer.state[ours]["momentum_buffer"] = torch.linspace(0.1, 2, 10, dtype=torch.float64) * ours.detach()
    sgd = torch.optim.SGD([theirs], lr=0.3, momentum=0.8, dampening=0.8)
    assert_close(descend(optimizer, [ours]), descend(sgd, [theirs]), rtol=1e-13, atol=1e-13)


def test_sgdclip_is_clip_grad_norm_and_sgd():
    ours, theirs = start(), start()
    optimizer = ClippedMomentum([ours], lr=0.3, threshold=0.5, nu=0.0)
    sgd = torch.optim.SGD([theirs], lr=0.3)
    sgd.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_([theirs], 0.5) and None)
    # clip_grad_norm_ divides by norm + 1e-6.
    assert_close(descend(optimizer, [ours]), descend(sgd, [theirs]), rtol=0, atol=2e-6 * 0.15 * 50)
    assert not optimizer.state, "SGDClip needs no momentum"


def test_momclip_clips_the_average():
    p, x, m = start(), start().detach(), torch.zeros(10, dtype=torch.float64)
    path = descend(ClippedMomentum([p], lr=0.3, threshold=0.5), [p])
    for row in path:
        m = 0.9 * m + 0.1 * torch.linspace(0.1, 2, 10, dtype=torch.float64) * x
        x = x - min(0.3, 0.15 / m.norm().item()) * m
        assert_close(row, x, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("nu", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("clip", ["hard", "soft"])
def test_no_step_is_longer_than_lr_times_threshold(nu, clip):
    p = start()
    path = descend(ClippedMomentum([p], lr=0.5, threshold=0.1, nu=nu, clip=clip), [p])
    assert (lengths(path) <= 0.05 * (1 + 1e-12)).all()
    assert lengths(path).max() > 0.04


def test_two_groups_share_one_norm():
    together = [torch.zeros(1, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    optimizer = ClippedMomentum([{"params": [p]} for p in together], lr=1.0, threshold=1.0, nu=0.0)
    for p, g in zip(together, (3.0, 4.0), strict=True):
        p.grad = torch.full_like(p, g)
    optimizer.step()
    assert_close(torch.cat(together).detach(), torch.tensor([-0.6, -0.8], dtype=torch.float64))


@pytest.mark.parametrize("clip", ["hard", "soft"])
@pytest.mark.parametrize("threshold", [1e-3, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_zero_gradients_stand_still(clip, threshold, dtype):
    p = start(dtype)
    p.grad = torch.zeros_like(p)
    ClippedMomentum([p], lr=0.1, threshold=threshold, nu=0.5, clip=clip).step()
    assert_close(p.detach(), start(dtype).detach(), rtol=0, atol=0)


def test_norms_of_half_precision_gradients_are_not_rounded():
    # 66,049 ones have the norm 257, in bfloat16 256; the float32 parameter shows which one was used.
    half = torch.zeros(66_049, dtype=torch.bfloat16, requires_grad=True)
    single = torch.zeros(1, requires_grad=True)
    half.grad, single.grad = torch.ones_like(half), torch.full_like(single, 1e-3)
    ClippedMomentum([half, single], lr=1.0, threshold=1.0, nu=0.0).step()
    assert_close(single.detach(), torch.tensor([-1e-3 / 257]), rtol=1e-6, atol=0)


def test_dtypes_can_be_mixed():
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    params = [torch.zeros(4, dtype=d, requires_grad=True) for d in dtypes]
    for p in params:
        p.grad = torch.ones_like(p)
    ClippedMomentum(params, lr=1.0, threshold=1.0, nu=0.0).step()
    for p in params:
        assert_close(p.detach(), torch.full_like(p, -(12**-0.5)))


def test_gradients_are_only_read():
    groups = make_groups()
    optimizer = ClippedMomentum(list(itertools.chain(*groups)), lr=0.1, threshold=0.1, nu=0.5, weight_decay=0.1)
    for step in range(5):
        grads = random_grads(step, torch.Generator().manual_seed(step))
        set_grads(groups, grads)
        before = [p.grad for p in itertools.chain(*groups)]
        copies = copy.deepcopy(before)
        optimizer.step()
        for p, g, c in zip(itertools.chain(*groups), before, copies, strict=True):
            assert p.grad is g
            assert g is None or torch.equal(g, c)


@pytest.mark.parametrize("nu", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", ["hard", "soft"])
@pytest.mark.parametrize("threshold", [0.1, math.inf])
def test_a_step_waits_for_no_device(nu, clip, threshold):
    groups = make_groups()
    optimizer = ClippedMomentum(
        itertools.chain(*groups), lr=0.1, threshold=threshold, nu=nu, clip=clip, weight_decay=0.1
    )
    with pytest.raises(AssertionError), NoSync():
        float(torch.ones(()))  # the guard guards
    for step in range(3):
        set_grads(groups, random_grads(step, torch.Generator().manual_seed(step)))
        with NoSync():
            optimizer.step()


def test_a_schedule_moves_the_rate_and_leaves_the_threshold():
    scheduled, by_hand = start(), start()
    optimizer = ClippedMomentum([scheduled], lr=0.4, threshold=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.5)
    path = descend(optimizer, [scheduled], scheduler=scheduler)
    twin = SlowClippedMomentum([[by_hand.detach()]], [{**DEFAULTS, "lr": 0.4, "threshold": 0.5}])
    for step, row in enumerate(path):
        twin.options[0]["lr"] = 0.4 * 0.5 ** (step // 10)
        twin.step([[torch.linspace(0.1, 2, 10, dtype=torch.float64) * twin.groups[0][0]]])
        assert_close(row, twin.groups[0][0], rtol=1e-12, atol=1e-12)
    assert optimizer.param_groups[0]["threshold"] == 0.5


@pytest.mark.parametrize("reload", [lambda s: s, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_resumed_run_is_bit_identical(reload):
    def fresh(p):
        optimizer = ClippedMomentum([p], lr=0.4, threshold=0.5, nu=0.6, weight_decay=0.01)
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)

    whole = start(torch.float32)
    optimizer, scheduler = fresh(whole)
    path = descend(optimizer, [whole], 60, scheduler)

    first = start(torch.float32)
    optimizer, scheduler = fresh(first)
    descend(optimizer, [first], 30, scheduler)
    saved = reload(copy.deepcopy((optimizer.state_dict(), scheduler.state_dict())))
    second = first.detach().clone().requires_grad_()
    optimizer, scheduler = fresh(second)
    optimizer.load_state_dict(saved[0])
    scheduler.load_state_dict(saved[1])
    assert torch.equal(descend(optimizer, [second], 30, scheduler), path[30:])


def test_pickles_and_fills_in_options_unknown_to_an_older_state():
    p = start()
    optimizer = ClippedMomentum([p], lr=0.4, threshold=0.5, momentum=0.7)
    descend(optimizer, [p], 3)
    assert pickle.loads(pickle.dumps(optimizer)).param_groups[0]["threshold"] == 0.5
    state = optimizer.state_dict()
    del state["param_groups"][0]["momentum"]
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["momentum"] == 0.7


def test_a_closure_is_run_with_gradients_and_its_value_returned():
    p = start()
    optimizer = ClippedMomentum([p], lr=0.1, threshold=1.0)

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[0] == pytest.approx((start() ** 2).sum().item())
    assert losses[-1] < losses[0]


def test_a_step_without_any_gradient_does_nothing():
    p = start()
    optimizer = ClippedMomentum([p], lr=0.1, threshold=1.0, weight_decay=0.5)
    assert optimizer.step() is None
    assert torch.equal(p, start())
    assert not optimizer.state


@pytest.mark.parametrize("norms", [{}, {"grad_norm": 5.0, "momentum_norm": 4.0}])
def test_the_update_function_stands_alone(norms):
    x, g, m = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, 1.0], [3.0, 4.0], [0.0, 2.0]))
    tensors = {k: torch.tensor(v, dtype=torch.float64) for k, v in norms.items()}
    clipped_momentum_update([x], [g], [m], lr=0.1, threshold=1.0, nu=0.5, **tensors)
    m_norm, g_norm = norms.get("momentum_norm", 2.0), norms.get("grad_norm", 5.0)
    expected = [1 - 0.05 * 3 / g_norm, 1 - 0.05 * 4 / g_norm - 0.05 * 2 / m_norm]
    assert_close(x, torch.tensor(expected, dtype=torch.float64))


INVALID = [
    ("lr", -0.1), ("lr", math.nan), ("lr", math.inf), ("threshold", 0.0), ("threshold", -1.0),
    ("threshold", math.nan), ("momentum", 1.0), ("momentum", -0.1), ("momentum", math.nan), ("nu", 1.1),
    ("nu", -0.1), ("clip", "value"), ("weight_decay", -1.0), ("weight_decay", math.nan),
    ("lr", torch.tensor([0.1])), ("nu", torch.tensor(0.1)), ("threshold", "big"),
    ("foreach", 1), ("norm_scope", "layer"), ("bias_correction", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), INVALID)
def test_invalid_options_are_refused_everywhere(name, value):
    message = rf"Parameter `{name}` should .* Found `{name} = "
    with pytest.raises(ValueError, match=message):
        ClippedMomentum([start()], **{"lr": 0.1, "threshold": 1.0, name: value})
    with pytest.raises(ValueError, match=message):
        ClippedMomentum([{"params": [start()], name: value}], lr=0.1, threshold=1.0)

    p = start()
    optimizer = ClippedMomentum([p], lr=0.1, threshold=1.0, weight_decay=0.1)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [start()], name: value})
    assert len(optimizer.param_groups) == 1
    p.grad = torch.ones_like(p)
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert torch.equal(p, start()), "a refused step moves nothing"


def test_the_message_names_the_value():
    with pytest.raises(ValueError) as error:
        ClippedMomentum([start()], lr=0.1, threshold=math.nan)
    assert str(error.value) == "Parameter `threshold` should be positive. Found `threshold = nan`."


def test_sparse_and_complex_gradients_are_refused():
    sparse = nn.Embedding(4, 2, sparse=True)
    sparse(torch.tensor([1])).sum().backward()
    dense = start()
    dense.grad = torch.ones_like(dense)
    with pytest.raises(RuntimeError, match="sparse"):
        ClippedMomentum([dense, sparse.weight], lr=0.1, threshold=1.0).step()
    assert torch.equal(dense, start()), "a refused step moves nothing"
    z = torch.ones(2, dtype=torch.complex64, requires_grad=True)
    z.grad = torch.ones_like(z)
    with pytest.raises(RuntimeError, match="complex"):
        ClippedMomentum([z], lr=0.1, threshold=1.0).step()
