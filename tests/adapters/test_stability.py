"""adapters: limits of stability agree with the spectral radius of the literal recurrence and with real optimizers."""

import math

import numpy as np
import pytest
import torch
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, RMSprop

from smoothdiag import GGNC, ClippedMomentum, ClippedScion, Euclidean, GradientDescent
from smoothdiag.adapters import StabilityLimit, adapter_of
from smoothdiag.geometry import Sign
from smoothdiag.optim import Smoothed

LR = 0.07


def stability_limit(optimizer, parameters) -> StabilityLimit:
    return StabilityLimit(*adapter_of(optimizer).stability_limit(parameters))


def preconditioner(optimizer, parameters):
    return adapter_of(optimizer).preconditioner(parameters)


START = 1e-9
"""Small against P / LR, so that gradients on the way to a thousand times as far add nothing to P."""
NEVER = 1 - 1e-15
"""Weight of the past in averages of squared gradients that is 1 but for rounding: P stays as it is."""


def average(x, m, gradient, b, w=0.0):
    """One step of AdamW on the eigenvector of a matrix P = 1, past the bias correction."""
    m = b * m + (1 - b) * gradient
    return x * (1 - LR * w) - LR * m, m


def heavy_ball(x, v, gradient, b, d=0.0, nesterov=False):
    v = b * v + (1 - d) * gradient
    return x - LR * (gradient + b * v if nesterov else v), v


def mixture(x, m, gradient, b, nu, w=0.0):
    m = b * m + (1 - b) * gradient
    return x * (1 - LR * w) - LR * (nu * m + (1 - nu) * gradient), m


# name: (how to make the optimizer, the same as a literal recurrence of position and momentum, closed form)
CASES = {
    "sgd": (lambda p: SGD(p, LR), lambda x, v, h: heavy_ball(x, v, h * x, 0.0), 2 / LR),
    "dampening alone": (lambda p: SGD(p, LR, dampening=0.5), lambda x, v, h: heavy_ball(x, v, h * x, 0.0), 2 / LR),
    "momentum": (lambda p: SGD(p, LR, momentum=0.9), lambda x, v, h: heavy_ball(x, v, h * x, 0.9), 3.8 / LR),
    "dampening": (
        lambda p: SGD(p, LR, momentum=0.8, dampening=0.3),
        lambda x, v, h: heavy_ball(x, v, h * x, 0.8, 0.3),
        3.6 / 0.7 / LR,
    ),
    "nesterov": (
        lambda p: SGD(p, LR, momentum=0.9, nesterov=True),
        lambda x, v, h: heavy_ball(x, v, h * x, 0.9, nesterov=True),
        3.8 / 2.8 / LR,
    ),
    "coupled decay": (
        lambda p: SGD(p, LR, momentum=0.9, weight_decay=5.0),
        lambda x, v, h: heavy_ball(x, v, h * x + 5 * x, 0.9),
        3.8 / LR - 5,
    ),
    "nesterov and decay": (
        lambda p: SGD(p, LR, momentum=0.9, nesterov=True, weight_decay=5.0),
        lambda x, v, h: heavy_ball(x, v, h * x + 5 * x, 0.9, nesterov=True),
        3.8 / 2.8 / LR - 5,
    ),
    "clipped sgd": (
        lambda p: ClippedMomentum(p, LR, threshold=1e9, nu=0.0),
        lambda x, m, h: mixture(x, m, h * x, 0.9, 0.0),
        2 / LR,
    ),
    "averaged momentum": (
        lambda p: ClippedMomentum(p, LR, threshold=1e9, momentum=0.9),
        lambda x, m, h: mixture(x, m, h * x, 0.9, 1.0),
        38 / LR,
    ),
    "mixture": (
        lambda p: ClippedMomentum(p, LR, threshold=1e9, momentum=0.8, nu=0.7),
        lambda x, m, h: mixture(x, m, h * x, 0.8, 0.7),
        2 / LR / (0.3 + 0.7 * 0.2 / 1.8),
    ),
    "mixture and decay": (
        lambda p: ClippedMomentum(p, LR, threshold=1e9, momentum=0.8, nu=0.7, weight_decay=5.0),
        lambda x, m, h: mixture(x, m, h * x, 0.8, 0.7, 5.0),
        (2 - LR * 5) / LR / (0.3 + 0.7 * 0.2 / 1.8),
    ),
    "mixture and coupled decay": (
        lambda p: ClippedMomentum(
            p, LR, threshold=1e9, momentum=0.8, nu=0.7, weight_decay=5.0, decoupled_weight_decay=False
        ),
        lambda x, m, h: mixture(x, m, h * x + 5 * x, 0.8, 0.7),
        2 / LR / (0.3 + 0.7 * 0.2 / 1.8) - 5,
    ),
    "bias correction": (
        lambda p: ClippedMomentum(p, LR, longest_step=1e9, momentum=0.5, bias_correction=True),
        lambda x, m, h: mixture(x, m, h * x, 0.5, 1.0),
        6 / LR,
    ),
    "soft clipping": (
        lambda p: ClippedMomentum(p, LR, threshold=1e9, momentum=0.9, clip="soft"),
        lambda x, m, h: mixture(x, m, h * x, 0.9, 1.0),
        38 / LR,
    ),
    "adam": (
        lambda p: Adam(p, LR, betas=(0.9, NEVER), eps=0.0),
        lambda x, m, h: average(x, m, h * x, 0.9),
        38 / LR,
    ),
    "amsgrad": (
        lambda p: Adam(p, LR, betas=(0.5, NEVER), amsgrad=True),
        lambda x, m, h: average(x, m, h * x, 0.5),
        6 / LR,
    ),
    "adamw": (
        lambda p: AdamW(p, LR, betas=(0.9, NEVER), weight_decay=5.0),
        lambda x, m, h: average(x, m, h * x, 0.9, 5.0),
        (2 / LR - 5) * 19,
    ),
    "rmsprop": (lambda p: RMSprop(p, LR, alpha=NEVER), lambda x, v, h: heavy_ball(x, v, h * x, 0.0), 2 / LR),
    "rmsprop momentum": (
        lambda p: RMSprop(p, LR, alpha=NEVER, momentum=0.9, centered=True),
        lambda x, v, h: heavy_ball(x, v, h * x, 0.9),
        3.8 / LR,
    ),
    "adagrad": (lambda p: Adagrad(p, LR), lambda x, v, h: heavy_ball(x, v, h * x, 0.0), 2 / LR),
}

P = 2.5
"""The matrix of the adaptive optimizers, in one dimension."""


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def settled(optimizer, x) -> None:
    """Gives an adaptive optimizer the state of a long run, with squared gradients of P^2 that no step changes."""
    x.grad = torch.zeros_like(x)
    optimizer.step()
    state = optimizer.state[x]
    for name, value in {"exp_avg_sq": P**2, "max_exp_avg_sq": P**2, "square_avg": P**2, "sum": P**2}.items():
        if name in state:
            state[name].fill_(value)
    if "exp_avg_sq" in state:
        state["step"].fill_(1e18)  # the corrections of the averages are over


@pytest.mark.thorough
@pytest.mark.parametrize(("factor", "grows"), [(0.98, False), (1.02, True)])
def test_real_steps_just_below_the_limit_converge_and_just_above_diverge(case, factor, grows) -> None:
    make, _, _ = case
    x = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = make([x])
    is_adaptive = not isinstance(optimizer, SGD | ClippedMomentum)
    if is_adaptive:
        settled(optimizer, x)
    with torch.no_grad():
        x.fill_(START)
    limit = stability_limit(optimizer, [x])
    assert limit.preconditioned is is_adaptive
    matrix = preconditioner(optimizer, [x])
    curvature = factor * limit.curvature * (1.0 if matrix is None else float(matrix[0]))
    sizes = []
    for _ in range(3000):
        x.grad = curvature * x.detach()
        optimizer.step()
        sizes.append(abs(float(x.detach())))
        if sizes[-1] > 1e3 * START or max(sizes[-100:]) < 1e-3 * START:
            break
    assert (sizes[-1] > 1e3 * START) is grows
    assert grows or sizes[-1] < 1e-3 * START


def test_the_spectral_radius_of_the_recurrence_passes_one_at_the_limit(case) -> None:
    make, recurrence, _ = case
    x = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    limit = stability_limit(make([x]), [x]).curvature

    def radius(h: float) -> float:
        matrix = np.array([recurrence(1.0, 0.0, h), recurrence(0.0, 1.0, h)]).T
        return max(abs(np.linalg.eigvals(matrix)))

    assert radius(limit) == pytest.approx(1.0, abs=1e-9)
    assert radius(limit * (1 + 1e-6)) > 1
    # stable everywhere below, so it is the limit and not a way back into instability
    assert all(radius(h) < 1 for h in np.linspace(1e-3, 1 - 1e-6, 500) * limit)


def test_the_limit_is_the_closed_form(case) -> None:
    make, _, expected = case
    x = torch.nn.Parameter(torch.ones(1))
    assert stability_limit(make([x]), [x]).curvature == pytest.approx(expected, rel=1e-12)


SMALL_BATCH = {
    **dict.fromkeys(("sgd", "dampening alone", "adagrad", "rmsprop"), 2 / LR),
    **dict.fromkeys(("momentum", "nesterov", "rmsprop momentum"), 0.2 / LR),
    "dampening": 0.4 / 0.7 / LR,
    **dict.fromkeys(("clipped sgd", "averaged momentum", "mixture", "bias correction", "soft clipping"), 2 / LR),
    **dict.fromkeys(("adam", "amsgrad"), 2 / LR),
    **{"coupled decay": 0.2 / LR - 5, "nesterov and decay": 0.2 / LR - 5},
    **dict.fromkeys(("mixture and decay", "mixture and coupled decay", "adamw"), 2 / LR - 5),
}


@pytest.mark.parametrize("name", CASES)
def test_the_limit_of_small_batches_is_the_closed_form(name) -> None:
    x = torch.nn.Parameter(torch.ones(1))
    assert stability_limit(CASES[name][0]([x]), [x]).small_batch == pytest.approx(SMALL_BATCH[name], rel=1e-12)


def excess(recurrence, share: float, sharpness: float) -> float:
    """Returns the growth of second moments where a share of the batches has all the curvature: less than 0 is stable.

    The batch sharpness E[H^2] / E[H] is that of these batches, and the mean curvature E[H] is share * sharpness.
    """
    flat, steep = (np.array([recurrence(1.0, 0.0, h), recurrence(0.0, 1.0, h)]).T for h in (0.0, sharpness))
    moments = (1 - share) * np.kron(flat, flat) + share * np.kron(steep, steep)
    return max(abs(np.linalg.eigvals(moments))) - 1


@pytest.mark.parametrize("name", [name for name in CASES if "decay" not in name and name != "adamw"])
def test_second_moments_grow_beyond_the_limit_of_small_batches_if_noise_rules(name) -> None:
    make, recurrence, _ = CASES[name]
    x = torch.nn.Parameter(torch.ones(1))
    limit = stability_limit(make([x]), [x]).small_batch
    assert excess(recurrence, 1e-5, limit * 0.999) < 0 < excess(recurrence, 1e-5, limit * 1.001)


@pytest.mark.parametrize("share", [1e-3, 0.1, 0.5, 0.9, 1.0])
def test_heavy_ball_has_its_limit_between_the_two_on_a_line_in_the_mean_curvature(share) -> None:
    _, recurrence, _ = CASES["momentum"]
    # S = (2 - 2b) / lr + 2b / (1 + b) h, with h = share * S
    limit = 0.2 / LR / (1 - 1.8 / 1.9 * share)
    assert excess(recurrence, share, limit * (1 - 1e-6)) < 0 < excess(recurrence, share, limit * (1 + 1e-6))
    assert limit == pytest.approx(3.8 / LR) or share < 1


def test_adapters_of_others_may_leave_out_the_limit_of_small_batches() -> None:
    assert math.isnan(StabilityLimit(*(3.0, True)).small_batch)


def test_adagrad_counts_the_decay_of_its_rate() -> None:
    x = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = Adagrad([x], LR, lr_decay=0.5)
    assert stability_limit(optimizer, [x]).curvature == pytest.approx(2 / LR)
    for steps in (1, 2, 3):
        x.grad, before = torch.ones_like(x), x.detach().clone()
        optimizer.step()
        rate = float((before - x.detach()) * preconditioner(optimizer, [x])[0])  # the rate that this step had
        assert rate == pytest.approx(LR / (1 + 0.5 * (steps - 1)), rel=1e-9)
        assert stability_limit(optimizer, [x]).curvature == pytest.approx(2 / rate, rel=1e-9)


def test_adagrad_has_no_one_rate_where_parameters_have_seen_different_numbers_of_steps() -> None:
    x, y = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    optimizer = Adagrad([x, y], LR, lr_decay=0.5)
    for held in ([x, y], [x]):
        y.grad = None
        for p in held:
            p.grad = torch.ones(1)
        optimizer.step()
    assert math.isnan(stability_limit(optimizer, [x, y]).curvature)
    assert stability_limit(optimizer, [x]).curvature == pytest.approx(3 / LR)
    assert stability_limit(optimizer, [y]).curvature == pytest.approx(2 / LR)


class Sgd(SGD):
    """A subclass that does as its parent does."""


class Signed(SGD):
    """A subclass that does something else."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.sign_()
        return super().step(closure)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: SGD(p, LR, maximize=True),
        lambda p: SGD(p, LR, momentum=1.0),
        lambda p: SGD(p, LR, momentum=0.9, dampening=1.5),
        lambda p: Adam(p, LR, weight_decay=0.1),
        lambda p: RMSprop(p, LR, weight_decay=0.1),
        lambda p: Adagrad(p, LR, weight_decay=0.1),
        lambda p: NAdam(p, LR),
        lambda p: torch.optim.LBFGS(p, LR),
        lambda p: Signed(p, LR),
        lambda p: ClippedMomentum(p, LR, threshold=1e9, maximize=True),
        lambda p: ClippedMomentum(p, LR, threshold=1e9, clip="normalize"),
        lambda p: ClippedMomentum.nsgd_m(p, LR),
        lambda p: GGNC(p, LR, threshold=1e9, geometry=Sign()),
        lambda p: GGNC(p, LR, longest_step=1e9, geometry=Euclidean()),
        lambda p: ClippedScion(p, LR, threshold=1e9, radius=1.0),
        lambda p: GradientDescent(p, Smoothed(1.0, 1.0)),
    ],
)
def test_where_there_is_no_one_limit_it_is_nan(make) -> None:
    x = torch.nn.Parameter(torch.ones(1))
    limit = stability_limit(make([x]), [x])
    assert math.isnan(limit.curvature)
    assert math.isnan(limit.small_batch)


def test_a_subclass_that_changes_nothing_is_known() -> None:
    x = torch.nn.Parameter(torch.ones(1))
    assert stability_limit(Sgd([x], LR), [x]).curvature == pytest.approx(2 / LR)
    scheduled = Sgd([x], LR)
    torch.optim.lr_scheduler.StepLR(scheduled, 1)  # which wraps the step of the instance
    assert stability_limit(scheduled, [x]).curvature == pytest.approx(2 / LR)


def test_groups_count_if_they_hold_the_parameters() -> None:
    x, y = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    optimizer = SGD([{"params": [x], "lr": 0.1}, {"params": [y], "lr": 0.2}])
    assert stability_limit(optimizer, [x]).curvature == pytest.approx(20)
    assert stability_limit(optimizer, [y]).curvature == pytest.approx(10)
    assert math.isnan(stability_limit(optimizer, [x, y]).curvature)
    optimizer.param_groups[0]["lr"] = 0.2  # equal now, by a schedule
    assert stability_limit(optimizer, [x, y]).curvature == pytest.approx(10)


def test_rates_of_zero_and_in_tensors() -> None:
    x = torch.nn.Parameter(torch.ones(1))
    assert stability_limit(SGD([x], lr=0.0), [x]).curvature == math.inf
    for lr, curvature in ((0.0, math.inf), (math.nan, math.nan)):
        rate = torch.tensor(lr)
        for optimizer in (SGD([x], lr=rate), ClippedMomentum([x], lr=rate, threshold=1.0)):
            assert stability_limit(optimizer, [x]).curvature == pytest.approx(curvature, nan_ok=True)
    assert stability_limit(Adam([x], lr=torch.tensor(0.5, dtype=torch.float64)), [x]).curvature == pytest.approx(76)
