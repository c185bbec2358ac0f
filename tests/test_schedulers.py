"""schedulers: the rate follows its closed form in the loss, and descends where the law is exact."""

import io
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import smoothdiag as sd
from smoothdiag.fits import ModelScore, Verdict

TABLE = pd.DataFrame({"grad_norm": np.geomspace(0.1, 10, 40), "smoothness": 1.0, "saturation": 0.1})
GAP = ModelScore("loss gap", 2.0, 6.0, 0.5, 0.1, 0.1, 0.9, (0.8, 1.0), 0.5, (0.4, 0.6), floor=0.25)
FIT = replace(
    sd.fit_smoothness(TABLE, num_boot=20), verdict=Verdict.LOSS_GAP, comparison=(replace(GAP, name="power"), GAP)
)


def parameters(count: int = 1) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2, 2, dtype=torch.float64)) for _ in range(count)]


def sgd(lr=0.5, **options) -> torch.optim.SGD:
    return torch.optim.SGD(parameters(), lr=lr, **options)


def rates(optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("H0", "lr"), [(0.0, 0.5), (1.0, 0.5), (8.0, 0.5)])
def test_rate_is_one_over_the_law_and_never_above_the_peak(H0, lr, exponent):
    optimizer = sgd(lr)
    warmup = sd.LossGapWarmup(optimizer, H0=H0, H1=3.0, f_star=0.2, exponent=exponent)
    assert rates(optimizer) == [0.0]
    for loss in (5.0, 1.0, 0.3, 0.2, 0.1):
        warmup.step(loss)
        expected = 1 / (max(H0, 1 / lr) + 3 * max(loss - 0.2, 0) ** exponent)
        assert rates(optimizer) == warmup.get_last_lr() == [pytest.approx(expected, rel=1e-12)]
        warmup.step(torch.tensor([loss], dtype=torch.float64, requires_grad=True))
        assert rates(optimizer) == [pytest.approx(expected, rel=1e-12)]


@pytest.mark.parametrize("dim", [1, 3])
def test_every_step_lowers_the_loss_as_promised_where_the_law_is_exact(dim):
    """On cosh, ||H|| = L0 cosh(L1 r) = L0 + L1^2 (f - f*). Twice the rate is the largest that descends."""
    problem = sd.problems.cosh(L0=2.0, L1=1.5, dim=dim)
    x0 = torch.tensor([0.6, 0.0, 0.8][:dim], dtype=torch.float64) * 10
    norm, gap = problem.hessian_norm(x0), problem.value(x0) - problem.f_min
    torch.testing.assert_close(norm, 2.0 + 1.5**2 * gap)
    falls = {}
    for factor in (1.0, 1.9, 2.1):
        x = nn.Parameter(x0.clone() if factor < 2 else x0 / 1000)
        optimizer = torch.optim.SGD([x], lr=1e9)
        warmup = sd.LossGapWarmup(optimizer, H0=2.0 / factor, H1=1.5**2 / factor, f_star=problem.f_min)
        losses, promised = [], []
        for _ in range(200):
            optimizer.zero_grad()
            loss = problem.value(x)
            loss.backward()
            warmup.step(loss)
            promised.append(rates(optimizer)[0] * float(x.grad.norm()) ** 2 / 2)
            losses.append(loss.item())
            optimizer.step()
        falls[factor] = -np.diff(losses)
        if factor == 1.0:
            assert (falls[1.0] >= np.array(promised[:-1]) * (1 - 1e-9) - 1e-12).all()
            assert losses[-1] - problem.f_min < 1e-9 * losses[0]
    assert (falls[1.9] > -1e-12).all()
    assert (falls[2.1] < -1e-12).any()


def test_constants_come_from_the_fit():
    optimizer = sgd(lr=0.25)
    warmup = sd.LossGapWarmup(optimizer, FIT)
    warmup.step(1.25)
    assert rates(optimizer) == [pytest.approx(1 / (4 + 6))]
    optimizer = torch.optim.Adam(parameters(), lr=1e-3)  # Only the ratio of the constants holds in its units.
    sd.LossGapWarmup(optimizer, FIT).step(1.25)
    assert rates(optimizer) == [pytest.approx(1e-3 / (1 + 6 / 2))]


@pytest.mark.parametrize(("options", "gain"), [({"momentum": 0.9}, 10.0), ({"momentum": 0.9, "dampening": 0.9}, 1.0)])
def test_momentum_counts_as_the_rate_that_it_makes(options, gain):
    optimizer = sgd(0.5, **options)
    sd.LossGapWarmup(optimizer, H1=3.0).step(1.0)
    assert rates(optimizer)[0] * gain == pytest.approx(1 / (1 / (0.5 * gain) + 3))


def test_groups_keep_their_ratios_below_the_rate_of_the_largest():
    optimizer = torch.optim.SGD([{"params": parameters()}, {"params": parameters(), "lr": 0.1}], lr=0.5)
    warmup = sd.LossGapWarmup(optimizer, H1=3.0)
    warmup.step(1.0)
    assert rates(optimizer) == [pytest.approx(1 / 5), pytest.approx(1 / 25)]
    assert [group["initial_lr"] for group in optimizer.param_groups] == warmup.base_lrs == [0.5, 0.1]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5, dtype=torch.float64)])
def test_loss_that_is_not_finite_leaves_the_rate_as_it_was(loss, tensor, lr):
    optimizer = sgd(lr.clone() if isinstance(lr, torch.Tensor) else lr)
    warmup = sd.LossGapWarmup(optimizer, H1=3.0)
    found = torch.tensor(loss) if tensor else loss
    warmup.step(found)
    assert rates(optimizer) == [0.0]
    warmup.step(1.0)
    warmup.step(found)
    assert rates(optimizer) == [pytest.approx(0.2)]
    warmup.step(0.0)
    assert rates(optimizer) == [pytest.approx(0.5)]


def test_huge_finite_loss_gives_a_rate_of_zero():
    optimizer = sgd()
    sd.LossGapWarmup(optimizer, H1=3.0, exponent=2.0).step(1e300)
    assert rates(optimizer) == [0.0]


class Waiting(torch.Tensor):
    """A tensor that refuses to be read by the host."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        assert func not in (torch.Tensor.item, torch.Tensor.__float__, torch.Tensor.__bool__, torch.Tensor.tolist)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_rate_that_is_a_tensor_stays_that_tensor_and_is_never_waited_for():
    optimizer = sgd(torch.tensor(0.5))
    held = optimizer.param_groups[0]["lr"]
    warmup = sd.LossGapWarmup(optimizer, H1=3.0)
    warmup.step(torch.tensor(1.0).as_subclass(Waiting))
    assert optimizer.param_groups[0]["lr"] is held
    assert held.item() == pytest.approx(0.2)
    (copy,) = warmup.get_last_lr()
    warmup.step(torch.tensor(0.0))
    assert copy.item() == pytest.approx(0.2)
    with pytest.raises(AssertionError):  # A rate that is a number has to be known to the host.
        sd.LossGapWarmup(sgd(0.5), H1=3.0).step(torch.tensor(1.0).as_subclass(Waiting))


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "ClippedMomentum": lambda p: sd.ClippedMomentum(p, lr=0.1, longest_step=0.5),
    "GradientDescent": lambda p: sd.GradientDescent(p, sd.optim.Smoothed(1.0, 1.0), lr=0.1),
    "GGNC": lambda p: sd.GGNC(p, lr=0.1, threshold=1.0, geometry=sd.Euclidean()),
}


def train(optimizer, warmup, x, steps: int) -> list[float]:
    used = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (x**4).sum()
        loss.backward()
        warmup.step(loss)
        optimizer.step()
        used.append(float(optimizer.param_groups[0]["lr"]))
    return used


@pytest.mark.parametrize("optimizer_first", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_run_goes_on_as_if_it_had_never_stopped(name, optimizer_first):
    (x,) = parameters()
    optimizer = OPTIMIZERS[name]([x])
    warmup = sd.LossGapWarmup(optimizer, H1=3.0, f_star=-0.1)
    first = train(optimizer, warmup, x, 5)
    assert first == sorted(first)
    assert 0 < first[0] < first[-1] < 0.1
    file = io.BytesIO()
    torch.save((warmup.state_dict(), optimizer.state_dict(), x.detach()), file)
    expected = train(optimizer, warmup, x, 5)
    file.seek(0)
    state, optimizer_state, value = torch.load(file, weights_only=True)
    y = nn.Parameter(value)
    resumed = OPTIMIZERS[name]([y])
    if optimizer_first:
        resumed.load_state_dict(optimizer_state)
    again = sd.LossGapWarmup(resumed, H1=99.0)
    again.load_state_dict(state)
    if not optimizer_first:
        resumed.load_state_dict(optimizer_state)
    assert again.last_epoch == 5
    assert float(resumed.param_groups[0]["lr"]) == again.get_last_lr()[0] == first[-1]
    assert train(resumed, again, y, 5) == expected
    torch.testing.assert_close(y, x, rtol=0, atol=0)


def test_resuming_by_last_epoch_needs_the_initial_rate_as_in_torch():
    optimizer = sgd()
    with pytest.raises(KeyError, match="initial_lr"):
        sd.LossGapWarmup(optimizer, H1=3.0, last_epoch=7)
    optimizer.param_groups[0]["initial_lr"] = 0.25
    warmup = sd.LossGapWarmup(optimizer, H1=3.0, last_epoch=7)
    warmup.step(0.0)
    assert (warmup.last_epoch, rates(optimizer)) == (9, [0.25])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Parameter `H1` should be at least 0 and finite"),
        ({"H1": -1.0}, "Parameter `H1`"),
        ({"H1": 1.0, "H0": math.inf}, "Parameter `H0`"),
        ({"H1": 1.0, "f_star": -math.inf}, "Parameter `f_star` should be finite"),
        ({"H1": 1.0, "exponent": 0.0}, "Parameter `exponent`"),
        ({"fit": FIT, "H1": 1.0}, "should be None if constants are given by hand. Found both"),
        ({"fit": replace(FIT, verdict=Verdict.L0L1)}, "should have the verdict LOSS_GAP.*Found the verdict L0L1"),
        ({"fit": replace(FIT, comparison=())}, "should have the verdict LOSS_GAP"),
        ({"fit": TABLE}, "Parameter `fit` should be a SmoothnessFit"),
    ],
)
def test_wrong_constants_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sd.LossGapWarmup(sgd(), **options)
    no_constant = replace(FIT, comparison=(replace(GAP, intercept=0.0),))
    with pytest.raises(ValueError, match="should have an H0 above zero for an optimizer"):
        sd.LossGapWarmup(torch.optim.Adam(parameters()), no_constant)
    with pytest.raises(ValueError, match="Parameter `optimizer` should be an optimizer"):
        sd.LossGapWarmup(parameters(), H1=1.0)


@pytest.mark.parametrize("loss", [None, True, "1", torch.ones(2), torch.tensor(1j)])
def test_step_needs_the_loss(loss):
    warmup = sd.LossGapWarmup(sgd(), H1=3.0)
    with pytest.raises(ValueError, match="Parameter `loss` should be the loss of this step"):
        warmup.step(loss)
    assert warmup.last_epoch == 0


def test_a_group_added_later_is_refused_before_any_rate_changes():
    optimizer = sgd()
    warmup = sd.LossGapWarmup(optimizer, H1=1.0)
    warmup.step(1.0)
    before = rates(optimizer)
    optimizer.add_param_group({"params": parameters(), "lr": 0.3})
    with pytest.raises(ValueError, match=r"at the start of the warm-up, 1\. Found 2"):
        warmup.step(2.0)
    assert rates(optimizer) == [*before, 0.3]
