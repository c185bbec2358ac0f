"""optim: caps, limits, tensor options, checkpoints and schedules do what they say."""

import copy
import math
import pickle

import pytest
import torch
from asserts import NoSync
from quadratics import CURVATURE, descend, lengths, start
from torch import nn
from torch.testing import assert_close

from smoothdiag.optim import ClippedMomentum, GradientDescent, LogSmoothed

# Limits: other algorithms, written out.


@pytest.mark.parametrize("cap", [{"threshold": math.inf}, {"longest_step": math.inf}])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("more", [{}, {"weight_decay": 0.2}, {"weight_decay": 0.2, "maximize": True}])
def test_without_a_cap_and_with_coupled_decay_it_is_sgd(cap, momentum, more):
    ours, theirs = start(), start()
    optimizer = ClippedMomentum([ours], 0.03, momentum=momentum, decoupled_weight_decay=False, **cap, **more)
    # Momentum that adds up, from a buffer of zero: SGD skips the dampening of its first step, so it gets that buffer.
    sgd = torch.optim.SGD([theirs], 0.03 * (1 - momentum), momentum=momentum, **more)
    if momentum:
        sgd.state[theirs]["momentum_buffer"] = torch.zeros_like(theirs)
    assert_close(descend(optimizer, [ours]), descend(sgd, [theirs]), rtol=1e-13, atol=1e-13)


def test_qhm_is_that_of_its_paper():
    p, x, m = start(), start().detach(), torch.zeros(10, dtype=torch.float64)
    for row in descend(ClippedMomentum.qhm([p], 0.3, momentum=0.8), [p]):
        g = CURVATURE * x
        m = 0.8 * m + 0.2 * g
        x = x - 0.3 * (0.3 * g + 0.7 * m)
        assert_close(row, x, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [
    {"lr": 1e30, "longest_step": 0.1}, {"lr": 1e30, "longest_step": 0.1, "clip": "soft"},
    {"lr": torch.tensor(1e30), "longest_step": torch.tensor(0.1, dtype=torch.float64)},
    {"lr": 0.1, "threshold": 1.0, "clip": "normalize"}, {"lr": 1e-9, "longest_step": 0.1, "clip": "normalize"},
], ids=str)  # fmt: skip
def test_an_infinite_rate_is_normalized_sgd_with_momentum(options, dtype):
    p, x, m = start(dtype), start(dtype).detach(), torch.zeros(10, dtype=dtype)
    for row in descend(ClippedMomentum([p], momentum=0.8, **options), [p], num_steps=20):
        m = 0.8 * m + 0.2 * CURVATURE.to(dtype) * x
        x = x - 0.1 * m / m.norm()
        assert_close(row, x, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("gradient", [0.0, 1e-30])
def test_a_gradient_too_small_for_its_norm_makes_no_long_step_at_a_huge_rate(dtype, gradient):
    p = start(dtype)
    p.grad = torch.full_like(p, gradient)
    ClippedMomentum([p], 1e37, longest_step=0.1, nu=0.5).step()
    moved = (p.detach() - start(dtype).detach()).double().norm()
    assert moved <= 0.1 * (1 + 1e-3) + 10 * torch.finfo(dtype).eps
    assert torch.isfinite(p).all()


def test_class_methods_are_the_members_of_the_family():
    def options(optimizer):
        group = optimizer.param_groups[0]
        return {name: group[name] for name in ("lr", "threshold", "longest_step", "momentum", "nu", "clip")}

    p = [start()]
    same = {"lr": 0.1, "threshold": 2.0, "longest_step": None, "momentum": 0.9, "nu": 1.0, "clip": "hard"}
    assert options(ClippedMomentum.sgd_clip(p, 0.1, threshold=2.0)) == same | {"nu": 0.0}
    assert options(ClippedMomentum.mom_clip(p, 0.1, threshold=2.0)) == same
    mixed = same | {"nu": 0.7, "momentum": 0.999}
    assert options(ClippedMomentum.mix_clip(p, 0.1, threshold=2.0)) == mixed
    by_step = ClippedMomentum.mix_clip(p, 0.1, longest_step=3.0, momentum=0.99, clip="soft")
    assert options(by_step) == mixed | {"threshold": None, "longest_step": 3.0, "momentum": 0.99, "clip": "soft"}
    assert options(ClippedMomentum.qhm(p, 0.1)) == mixed | {"threshold": math.inf}
    assert options(ClippedMomentum.nsgd_m(p, 0.1)) == same | {"threshold": 1.0, "clip": "normalize"}
    with pytest.raises(ValueError, match="one of the two"):
        ClippedMomentum.mom_clip(p, 0.1)


# What a schedule of the rate changes.


def test_a_schedule_shrinks_the_longest_step_of_a_threshold_and_keeps_a_longest_step():
    for options, expected in (
        ({"lr": 1.0, "threshold": 0.01}, [0.01 * 0.5**k for k in range(5)]),
        ({"lr": 1.0, "longest_step": 0.01}, [0.01] * 5),
        ({"lr": 0.01, "threshold": 1.0, "clip": "normalize"}, [0.01 * 0.5**k for k in range(5)]),
    ):
        p = start()
        optimizer = ClippedMomentum([p], nu=0.0, **options)
        path = descend(optimizer, [p], 5, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
        assert lengths(path).tolist() == pytest.approx(expected)


def test_a_longest_step_no_longer_clips_once_the_rate_is_low():
    p = start()
    optimizer = ClippedMomentum([p], 1.0, longest_step=0.1, nu=0.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.001)
    found = lengths(descend(optimizer, [p], 2, scheduler)).tolist()
    after_one = start().detach() * (1 - 0.1 * CURVATURE / (CURVATURE * start().detach()).norm())
    assert found == pytest.approx([0.1, 0.001 * (CURVATURE * after_one).norm().item()])


def test_a_tensor_rate_follows_its_schedule_like_a_number():
    paths = []
    for lr, threshold in ((0.4, 0.5), (torch.tensor(0.4, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64))):
        p = start()
        optimizer = ClippedMomentum([p], lr, threshold=threshold, nu=0.7, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        paths.append(descend(optimizer, [p], scheduler=scheduler))
        assert type(optimizer.param_groups[0]["lr"]) is type(lr)
    assert_close(paths[0], paths[1], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("clip", ["hard", "soft"])
def test_a_tensor_threshold_may_be_infinite(clip):
    paths = []
    for threshold in (torch.tensor(math.inf), math.inf):
        p = start()
        paths.append(descend(ClippedMomentum([p], 0.1, threshold=threshold, nu=0.5, clip=clip), [p]))
    assert_close(paths[0], paths[1], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("clip", ["hard", "soft", "normalize"])
@pytest.mark.parametrize("cap", ["threshold", "longest_step"])
@pytest.mark.parametrize(
    "more", [{}, {"bias_correction": True, "capturable": True}, {"weight_decay": 0.1, "decoupled_weight_decay": False}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_among_the_options_are_not_read(clip, cap, more, dtype):
    p, q = start(dtype), start(dtype)
    optimizer = ClippedMomentum(
        [{"params": [p]}, {"params": [q], "norm_scope": "group"}], torch.tensor(0.1), **{cap: torch.tensor(0.5)},
        nu=0.5, clip=clip, **more,
    )  # fmt: skip
    for x in (p, q):
        x.grad = torch.ones_like(x)
    with NoSync():
        optimizer.step()
    assert not torch.equal(p, start(dtype))


@pytest.mark.parametrize("options", [{}, {"nu": 0.5, "weight_decay": 0.1, "clip": "soft"}, {"bias_correction": True}])
def test_one_by_one_gives_the_same_numbers(options):
    paths = []
    for foreach in (None, True, False):
        params = [start(), start(torch.float32)]
        paths.append(descend(ClippedMomentum(params, 0.3, threshold=0.5, foreach=foreach, **options), params))
    assert torch.equal(paths[0], paths[1])
    assert_close(paths[0], paths[2], rtol=1e-6, atol=1e-6)


# Norms and rates keep their digits.


@pytest.mark.thorough
@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("size", [2**14, 2**14 + 1, 3 * 2**14, 5_000_000])
def test_the_norm_of_a_large_tensor_keeps_its_digits(size, foreach):
    p, q = torch.zeros(size, requires_grad=True), torch.zeros(3, requires_grad=True)
    p.grad = torch.randn(size, generator=torch.Generator().manual_seed(0))
    q.grad = torch.ones(3)
    expected = torch.cat([p.grad, q.grad]).double()
    ClippedMomentum.sgd_clip([p, q], 1.0, threshold=1.0, foreach=foreach).step()
    moved = torch.cat([p, q]).detach().double()
    assert_close(moved, -expected / expected.norm(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_does_not_round_the_rate(dtype):
    # In float16 the rate itself would be zero; in bfloat16 it would have two digits.
    p = torch.zeros(4, dtype=dtype, requires_grad=True)
    p.grad = torch.full_like(p, 2048.0)
    ClippedMomentum.sgd_clip([p], 1e-8, threshold=math.inf).step()
    assert_close(p.detach().float(), torch.full((4,), -2048e-8).to(dtype).float(), rtol=0, atol=0)


def test_half_precision_does_not_round_the_decay():
    # In bfloat16 1 - 0.0025 is 0.9961, which would take 1 + 1/128 down to 1; the exact factor leaves it the nearest.
    p = torch.full((4,), 1 + 1 / 128, dtype=torch.bfloat16, requires_grad=True)
    p.grad = torch.zeros_like(p)
    ClippedMomentum([p], torch.tensor(0.25), threshold=1.0, weight_decay=0.01).step()
    assert_close(p.detach().float(), torch.full((4,), 1 + 1 / 128), rtol=0, atol=0)


# State.


def make(kind, params):
    if kind == "descent":
        optimizer = GradientDescent(params, LogSmoothed(2.0, 0.5))
    else:
        more = {
            "mix": {"nu": 0.6, "weight_decay": 0.01},
            "corrected": {
                "bias_correction": True,
                "clip": "soft",
                "decoupled_weight_decay": False,
                "weight_decay": 0.01,
            },
            "step": {"threshold": None, "longest_step": 0.2, "norm_scope": "group"},
            "tensor": {"lr": torch.tensor(0.4)},
        }[kind]
        optimizer = ClippedMomentum(params, **{"lr": 0.4, "threshold": 0.5, **more})
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)


@pytest.mark.thorough
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("kind", ["mix", "corrected", "step", "tensor", "descent"])
def test_a_checkpoint_on_disk_resumes_bit_for_bit(kind, scheduled, tmp_path):
    def fresh(values):
        params = [torch.nn.Parameter(v.clone()) for v in values]
        optimizer, scheduler = make(kind, [{"params": params[:1]}, {"params": params[1:]}])
        return params, optimizer, scheduler if scheduled else None

    begin = [start(torch.float32).detach(), start().detach()]
    params, optimizer, scheduler = fresh(begin)
    whole = descend(optimizer, params, 60, scheduler)

    params, optimizer, scheduler = fresh(begin)
    descend(optimizer, params, 30, scheduler)
    saved = [optimizer.state_dict(), scheduler and scheduler.state_dict(), [p.detach() for p in params]]
    torch.save(saved, tmp_path / "checkpoint.pt")

    state, schedule, values = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    params, optimizer, scheduler = fresh(values)
    optimizer.load_state_dict(state)
    if scheduler:
        scheduler.load_state_dict(schedule)
    assert torch.equal(descend(optimizer, params, 30, scheduler), whole[30:])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("kind", ["mix", "corrected", "step", "tensor"])
def test_copies_go_on_bit_for_bit(kind, copied):
    p = nn.Parameter(start().detach())
    optimizer, _ = make(kind, [p])
    descend(optimizer, [p], 10)
    other = copied(optimizer)
    (q,) = other.param_groups[0]["params"]
    assert q is not p
    assert torch.equal(descend(other, [q], 10), descend(optimizer, [p], 10))


OLD = ("longest_step", "decoupled_weight_decay", "bias_correction", "norm_scope", "foreach", "capturable")


@pytest.mark.parametrize(
    "now", [{"threshold": 0.5}, {"longest_step": 0.1}, {"threshold": 0.5, "bias_correction": True}], ids=str
)
def test_states_of_the_first_version_load(now):
    p, q = start(), start()
    optimizer = ClippedMomentum([p], 0.4, threshold=0.5, nu=0.6)
    descend(optimizer, [p], 10)
    state = optimizer.state_dict()
    for name in OLD:
        del state["param_groups"][0][name]
    restored = ClippedMomentum([q], 0.4, nu=0.6, **now)
    restored.load_state_dict(copy.deepcopy(state))
    q.data.copy_(p.data)
    # The threshold is saved; an average nobody counted is not corrected, rather than by a wrong count.
    assert_close(descend(restored, [q], 10), descend(optimizer, [p], 10), rtol=1e-14, atol=1e-14)


def test_optimizers_pickled_by_the_first_version_load():
    p = start()
    optimizer = ClippedMomentum([p], 0.4, threshold=0.5)
    old = optimizer.__getstate__()
    old["defaults"] = {k: v for k, v in old["defaults"].items() if k not in OLD}
    old["param_groups"] = [{k: v for k, v in g.items() if k not in OLD} for g in old["param_groups"]]
    restored = ClippedMomentum.__new__(ClippedMomentum)
    restored.__setstate__(old)
    for name in OLD:  # the defaults are what the first version did
        assert restored.defaults[name] == restored.param_groups[0][name] == optimizer.defaults[name]
    q = start()
    restored.add_param_group({"params": [q]})
    descend(restored, [p, q], 3)


def test_bias_correction_counts_only_the_steps_it_saw():
    p = start()
    optimizer = ClippedMomentum([p], 0.1, threshold=math.inf, momentum=0.9, bias_correction=True)
    group = optimizer.param_groups[0]
    descend(optimizer, [p], 3)
    assert optimizer.state[p]["step"].item() == 3
    group["bias_correction"] = False
    descend(optimizer, [p], 3)
    group["bias_correction"] = True
    descend(optimizer, [p], 1)
    assert optimizer.state[p]["step"].item() == math.inf, "three steps were not counted"


# Groups.


def test_named_parameters_are_taken():
    model = nn.Linear(3, 2)
    optimizer = ClippedMomentum(model.named_parameters(), 0.1, threshold=1.0)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()


def test_groups_may_differ_in_their_kind_of_cap():
    p, q = start(), start()
    optimizer = ClippedMomentum([{"params": [p]}, {"params": [q], "longest_step": 0.1}], 0.3, threshold=0.5)
    caps = [(g["threshold"], g["longest_step"]) for g in optimizer.param_groups]
    assert caps == [(0.5, None), (None, 0.1)]
    optimizer = ClippedMomentum([{"params": [p], "threshold": 1.0}, {"params": [q], "longest_step": 0.1}], 0.3)
    assert [g["threshold"] for g in optimizer.param_groups] == [1.0, None]


@pytest.mark.parametrize("caps", [{}, {"threshold": 1.0, "longest_step": 0.1}])
def test_a_group_has_exactly_one_cap(caps):
    with pytest.raises(ValueError, match="one of the two in every group"):
        ClippedMomentum([start()], 0.1, **caps)
    with pytest.raises(ValueError, match="one of the two in every group"):
        ClippedMomentum([{"params": [start()], **caps}], 0.1)
    optimizer = ClippedMomentum([start()], 0.1, threshold=1.0)
    optimizer.param_groups[0].update({"threshold": None, "longest_step": None, **caps})
    with pytest.raises(ValueError, match="one of the two in every group"):
        optimizer.step()


def test_normalizing_needs_a_finite_length():
    with pytest.raises(ValueError, match="should be finite"):
        ClippedMomentum([start()], 0.1, threshold=math.inf, clip="normalize")


@pytest.mark.parametrize("wrong", ["sparse", "dtype", "option"])
def test_a_refused_step_changes_nothing(wrong):
    dense, other = start(), nn.Parameter(torch.ones(4, 2))
    optimizer = ClippedMomentum([{"params": [dense]}, {"params": [other]}], 0.1, threshold=1.0, weight_decay=0.1)
    dense.grad = torch.ones_like(dense)
    if wrong == "sparse":
        nn.functional.embedding(torch.tensor([1]), other, sparse=True).sum().backward()
    elif wrong == "dtype":
        other.grad_dtype = torch.float64
        other.grad = torch.ones(4, 2, dtype=torch.float64)
    else:
        optimizer.param_groups[1]["norm_scope"] = "layer"
    with pytest.raises((RuntimeError, ValueError)):
        optimizer.step()
    assert torch.equal(dense, start())
    assert not optimizer.state, "not even the state"
