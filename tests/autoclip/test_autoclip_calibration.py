"""autoclip: calibration agrees with closed forms, with scipy and with lists written out by hand."""

import itertools
import math
from functools import partial
from statistics import median

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import nn

from smoothdiag import AutoClip, ClippedMomentum, Probe, StepRule, problems
from smoothdiag.autoclip.calibration import Calibration, Measurement, median_interval
from smoothdiag.autoclip.progression import is_in_progression, progression
from smoothdiag.autoclip.rows import Rows
from smoothdiag.rows import SmoothdiagWarning

FIRST = [0, 1, 2, 3, 4, 5, 6, 8, 10, 13, 17, 22, 29]


def calibrated(lengths, steps=range(1000), rule=None) -> Calibration:
    state = Calibration(rule or StepRule())
    for step, length in zip(steps, lengths, strict=False):
        state.advance(step)
        state.add(Measurement(step, length, length))
    return state


def test_the_progression_grows_by_three_tenths() -> None:
    assert list(itertools.islice(progression(), 14)) == [*FIRST, 38]
    assert [step for step in range(39) if is_in_progression(step)] == [*FIRST, 38]
    assert [step for step in range(39) if is_in_progression(step, 3)] == [0, 3, 6, 13, 29]


@pytest.mark.parametrize("n", range(1, 60))
def test_the_interval_is_the_exact_binomial_one(n) -> None:
    values = list(np.random.default_rng(n).permutation(n).astype(float))
    low, high = median_interval(values)
    ranks = [k for k in range((n + 1) // 2) if 2 * binom.cdf(k, n, 0.5) <= 0.1]
    if not ranks:
        assert n < 5
        assert math.isnan(low)
        assert math.isnan(high)
    else:
        assert (low, high) == (max(ranks), n - 1 - max(ranks))


def test_the_interval_holds_the_median_nine_times_in_ten() -> None:
    draws = np.random.default_rng(0).lognormal(size=(2000, 13))
    inside = [low <= 1 <= high for low, high in (median_interval(list(row)) for row in draws)]
    assert np.mean(inside) == pytest.approx(1 - 2 * binom.cdf(3, 13, 0.5), abs=0.02)


def test_the_longest_step_is_the_multiple_of_the_median() -> None:
    lengths = np.random.default_rng(1).lognormal(size=40)
    state = calibrated(lengths, FIRST)
    assert state.longest == pytest.approx(1.2 * median(lengths[:13]))
    assert state.held_at == -1
    assert state.advance(30)
    assert state.held_at == 30
    assert not state.advance(31)
    assert state.interval() == median_interval(list(lengths[:13]))


def test_it_waits_for_five_measurements() -> None:
    state = calibrated([1.0] * 4, [0, 10, 20, 29])
    assert not state.advance(50)
    assert not state.is_measured
    state.add(Measurement(51, 1.0, 1.0))
    assert state.is_measured
    assert state.advance(52)


ROW = {"status": "ok", "smoothness": 2.0, "grad_norm": 3.0}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, (1.5, 0.5)),
        ({"slope": -3.0}, (1.5, math.nan)),
        ({"status": "non_finite"}, "non_finite"),
        ({"smoothness": -2.0}, "without positive curvature"),
        ({"smoothness": math.nan}, "without positive curvature"),
        ({"slope": 3.0}, "without a descent"),
        ({"grad_norm": 0.0}, "without a descent"),
    ],
)
def test_a_row_has_a_length_or_a_reason_why_not(change, found) -> None:
    assert Rows.measured(ROW | change) == (found if isinstance(found, str) else pytest.approx(found, nan_ok=True))


def lowered(state, steps, length, taken, reduction=1.0) -> list[bool]:
    return [state.add(Measurement(step, length, 1.0, taken, reduction)) == "lowered" for step in steps]


def test_a_held_length_follows_down_by_a_factor_of_two() -> None:
    state = calibrated([1.0] * 13, FIRST)
    state.advance(30)
    assert not any(lowered(state, range(60, 80), 0.51, taken=1.2))
    assert state.longest == 1.2
    assert lowered(state, range(80, 84), 0.49, taken=1.2) == [False, False, True, False]
    assert state.longest == pytest.approx(1.2 * 0.49)
    assert state.lowered_at == 82
    lowered(state, [90], 0.01, taken=1.2)
    assert state.longest == pytest.approx(1.2 * 0.49), "a single measurement changes nothing"


def test_a_single_length_that_is_long_enough_stops_the_count() -> None:
    state = calibrated([1.0] * 13, FIRST)
    state.advance(30)
    for start in range(40, 100, 3):
        assert not any(lowered(state, [start, start + 1], 0.1, taken=1.2))
        assert not any(lowered(state, [start + 2], 0.6, taken=1.2))


def test_lengths_count_beside_the_steps_that_are_taken() -> None:
    state = calibrated([1.0] * 13, FIRST)
    state.advance(30)
    # The rate has decayed to a tenth, or gradients have: steps are short, and curvature has adapted to them.
    assert not any(lowered(state, range(40, 50), 0.1, taken=0.12, reduction=0.1))
    assert not any(lowered(state, range(50, 60), 0.0001, taken=0.0, reduction=0.0))
    assert lowered(state, range(60, 63), 0.04, taken=0.12, reduction=0.1)[-1]
    assert state.longest == pytest.approx(1.2 * 0.4)


def test_a_state_goes_through_numbers() -> None:
    state = calibrated(np.random.default_rng(2).lognormal(size=20).tolist(), range(25, 45))
    state.count_invalid("non_finite")
    other = Calibration(StepRule())
    other.load_state_dict(state.state_dict())
    assert other == state
    other.add(Measurement(60, 1.0, 1.0))
    assert other != state, "a copy of its own"


def descend(value, x0, lr, steps=120, make=torch.optim.SGD, **options):
    """Descends on a landscape under AutoClip; returns the clipper, gradient norms, and longest steps by step."""
    module = nn.Module()
    module.x = nn.Parameter(x0.clone())
    optimizer = make([module.x], lr=lr)

    def loss(model, _):
        return value(model.x)

    probe = Probe(module, optimizer, loss, schedule=lambda step: False)
    clipper, norms, longest = AutoClip(optimizer, probe, **options), [], []
    for batch in probe.watch([torch.zeros(1)] * steps):
        optimizer.zero_grad()
        loss(module, batch).backward()
        norms.append(float(module.x.grad.norm()))
        optimizer.step()
        longest.append(float(clipper._books.longest()))
    return clipper, np.array(norms), np.array(longest)


@pytest.mark.filterwarnings("ignore:AutoClip lowered")
@pytest.mark.parametrize("rate", [0.3, 1.0, 1.9, 10.0, 100.0])
def test_on_a_quadratic_steps_stay_above_one_over_the_largest_curvature(rate) -> None:
    """The secant along g is ||H g|| / ||g|| <= lambda_max, so S >= 1.2 ||g|| / lambda_max at the median ||g||.

    A gradient g is then taken at a rate of at least min(lr, 1.2 ||median|| / (||g|| lambda_max)): from the end of
    calibration on, descent goes at min(lr, 1 / lambda_max) or faster unless a gradient is 1.2 times that median. Above
    2 / lambda_max small gradients grow until they are clipped; there the claim is about half of the steps.
    """
    values = torch.logspace(-2, 1, 30, dtype=torch.float64)
    top = float(values.max())
    x0 = torch.randn(30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    clipper, norms, longest = descend(lambda x: 0.5 * (values * x * x).sum(), x0, rate / top)
    early = [m.step for m in clipper._calibration.early]
    held = clipper.history.query("event == 'held'")["longest_step"].iloc[0]
    assert held >= 1.2 * np.median(norms[early]) / top
    taken = np.minimum(rate / top, longest / norms)[31:]
    slowest = taken.min() if rate < 2 else np.median(taken)
    assert slowest >= min(rate, 1.0) / top * (1 - 1e-9)
    assert np.isfinite(norms).all()


@pytest.mark.parametrize(("L0", "L1"), [(1.0, 2.0), (0.3, 0.5), (4.0, 10.0)])
@pytest.mark.parametrize("name", ["exponential", "hybrid"])
def test_the_longest_step_is_near_the_closed_form_where_gradients_are_large(name, L0, L1) -> None:
    """Where L1 ||g|| >> L0, the step that minimises the quadratic model is ||g|| / ||H|| = 1 / L1 on both landscapes.

    Beside it stand, from f(x - s g/||g||) <= f(x) - s ||g|| + (L0 + L1 ||g||) (e^{L1 s} - L1 s - 1) / L1^2: the step
    with the largest guaranteed decrease, ln(1 + L1 ||g|| / (L0 + L1 ||g||)) / L1 -> ln 2 / L1 = 0.69 / L1; and the
    longest one that is guaranteed not to ascend, with e^t = 1 + 2t at t = L1 s = 1.256.

    A secant over a radius r is shorter than ||H|| by u / (1 - e^-u) with u = L1 r, so S is 1.2 u / (1 - e^-u) / L1:
    1.2 / L1 where the radius is short beside 1 / L1, and 1.5 / L1 at u = 0.46, where ||x|| = 46 / L1.
    """
    problem = getattr(problems, name)(L0=L0, L1=L1, dim=3)
    x0 = torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64) * 46 / L1
    clipper, norms, _ = descend(problem.value, x0, 1e-3 / L0, steps=40)
    assert L1 * norms[29] > 10 * L0
    assert 1 <= clipper.longest_step * L1 <= 1.5
    x = np.array([row["param_norm"] for row in clipper.trace if row["step"] < 30])
    outside = (lambda r: np.expm1(L1 * r)) if name == "exponential" else (lambda r: np.exp(L1 * r - 1))
    assert L1 * norms[:30][[m.step for m in clipper._calibration.early]] / L0 == pytest.approx(outside(x), rel=1e-6)
    expected = 0.01 * x / (1 - outside(0.99 * x) / outside(x))
    assert clipper.longest_step == pytest.approx(1.2 * np.median(expected), rel=1e-6)
    assert math.exp(1.2564) == pytest.approx(1 + 2 * 1.2564, rel=1e-4)


@pytest.mark.filterwarnings("ignore:AutoClip lowered")
def test_units_of_loss_and_parameters_are_followed() -> None:
    """f -> a f leaves S and divides thresholds' rates; f(b x) divides S by b."""
    problem = problems.exponential(L0=1.0, L1=2.0, dim=2)
    x0 = torch.tensor([3.0, -4.0], dtype=torch.float64)
    plain, *_ = descend(problem.value, x0, 0.5, steps=40)
    scaled, *_ = descend(problem.scaled(7.0, 3.0).value, x0 / 3, 0.5 / (7 * 9), steps=40)
    assert scaled.longest_step == pytest.approx(plain.longest_step / 3, rel=1e-6)
    assert scaled.threshold == pytest.approx(plain.threshold * 7 * 3, rel=1e-6)
    assert scaled.suggest_lr() == pytest.approx(plain.suggest_lr() / (7 * 9), rel=1e-6)


@pytest.mark.filterwarnings("ignore:AutoClip lowered")
def test_the_suggested_rate_is_the_inverse_curvature() -> None:
    values = torch.tensor([5.0, 5.0], dtype=torch.float64)
    clipper, *_ = descend(lambda x: 0.5 * (values * x * x).sum(), torch.ones(2, dtype=torch.float64), 0.01)
    assert clipper.suggest_lr() == pytest.approx(1 / 5, rel=1e-6)
    assert clipper.suggest_lr(4.0) == pytest.approx(4 / 5, rel=1e-6)
    with pytest.raises(ValueError, match="Parameter `multiple` should be positive"):
        clipper.suggest_lr(-1.0)


@pytest.mark.filterwarnings("ignore:AutoClip lowered")
def test_the_suggested_rate_of_updates_leads_to_the_minimum() -> None:
    """Adam without averages moves each entry by the rate. From (z, ..., z) on a bowl, a rate of z ends at its bottom.

    ||g||/L is the distance sqrt(d) z to the bottom, and the update is sqrt(d) times the rate long.
    """
    start, rate = 2.0, 0.01
    signs = partial(torch.optim.Adam, betas=(0.0, 0.0), eps=0.0)
    x0, bowl = torch.full((7,), start, dtype=torch.float64), lambda x: 1.5 * (x * x).sum()
    clipper, *_ = descend(bowl, x0, rate, steps=31, make=signs)
    assert clipper.suggest_lr() == pytest.approx(start - rate * median(FIRST), rel=1e-6)
    # Measured five times, the rate that is set is what the last one allows, and S is that of the median.
    # Until then each step takes .03 of the way.
    raised, _, longest = descend(bowl, x0, 1.0, steps=6, make=signs, set_lr=True)
    assert raised._optimizer.param_groups[0]["lr"] == pytest.approx(1.2 * start * 0.97**4, rel=1e-6)
    assert longest[5] == pytest.approx(1.2 * start * 0.97**2 * math.sqrt(7), rel=1e-6)


def test_a_rate_is_raised_fourfold_at_most_at_a_measurement() -> None:
    x0 = torch.ones(2, dtype=torch.float64)
    raised, *_ = descend(lambda x: 2.5 * (x * x).sum(), x0, 1e-4, 6, torch.optim.SGD, set_lr=True)
    assert raised._optimizer.param_groups[0]["lr"] == pytest.approx(4e-4)


@pytest.mark.parametrize(("momentum", "expected"), [(0.0, 0.1), (0.9, 0.01)])
def test_a_raised_rate_leaves_weight_decay_a_tenth_of_x_at_most(momentum, expected) -> None:
    x0 = torch.ones(2, dtype=torch.float64)
    make = partial(torch.optim.SGD, momentum=momentum, weight_decay=1.0)
    raised, *_ = descend(lambda x: 1e-3 * (x * x).sum(), x0, 1e-3, 31, make, set_lr=True)
    assert raised._optimizer.param_groups[0]["lr"] == pytest.approx(expected)


def test_groups_that_share_a_tensor_have_their_rate_raised_once() -> None:
    a, b = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    module = nn.ParameterList([a, b])
    rate = torch.tensor(0.05, dtype=torch.float64)
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=rate)
    probe = Probe(module, optimizer, lambda m, _: 2.5 * sum((p * p).sum() for p in m), estimators=())
    clipper = AutoClip(optimizer, probe, set_lr=True)
    for _ in probe.watch(range(6)):
        optimizer.zero_grad()
        (2.5 * sum((p * p).sum() for p in module)).backward()
        optimizer.step()
    assert float(rate) == pytest.approx(4 * 0.05)
    assert "set lr" in list(clipper.history["event"])


def test_a_rate_that_something_else_sets_is_left_alone() -> None:
    model = nn.Linear(3, 1).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    x = torch.randn(16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    probe = Probe(model, optimizer, lambda m, b: m(b).square().mean(), estimators=())
    clipper = AutoClip(optimizer, probe, set_lr=True)
    with pytest.warns(SmoothdiagWarning, match="something else sets the rate"):
        for _ in probe.watch([x] * 31):
            optimizer.param_groups[0]["lr"] = 1e-4  # as a schedule by hand does
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    assert list(clipper.history["event"]).count("set lr") == 1


@pytest.mark.filterwarnings("ignore:AutoClip lowered")
@pytest.mark.parametrize(
    ("make", "options", "multiple"),
    [
        (torch.optim.SGD, {}, 1.2),
        # S is 1.2 * 19^(1/4) lengths; equal gradients add up to ten of them.
        (partial(torch.optim.SGD, momentum=0.9), {}, 1.2 * 19**0.25 / 10),
        # An average of equal gradients is one of them; its cap is S / 19^(1/2).
        (partial(ClippedMomentum, momentum=0.9, longest_step=1.0), {"mode": "set"}, 1.2 / 19**0.25),
    ],
)
def test_the_rate_is_set_to_where_half_of_the_early_gradients_are_clipped(make, options, multiple) -> None:
    x0 = torch.ones(2, dtype=torch.float64)
    clipper, norms, _ = descend(lambda x: 2.5 * (x * x).sum(), x0, multiple / 15, 6, make, set_lr=True, **options)
    assert clipper._optimizer.param_groups[0]["lr"] == pytest.approx(multiple / 5, rel=1e-6)
    assert clipper.threshold == pytest.approx(np.median(norms), rel=1e-6)
