"""optim.descent: rates that follow the gradient norm keep their formulas, limits and theorems."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from asserts import NoSync
from torch.testing import assert_close

from smoothdiag import problems
from smoothdiag.optim import Clipped, ClippedMomentum, GradientDescent, LogSmoothed, Normalized, Smoothed

LANDSCAPES = {"exponential": problems.exponential, "cosh": problems.cosh, "hybrid": problems.hybrid}
RULES = [Clipped(0.3, 0.7), Clipped(0.3, math.inf), Normalized(0.3, 0.7), Smoothed(0.8, 1.7), LogSmoothed(0.8, 1.7)]


def number(x):
    return torch.tensor(x, dtype=torch.float64)


def literal(rule, n):
    """The rate as the papers print it, in Python's float64."""
    match rule:
        case Clipped(eta, c):
            return min(eta, eta * c / n)
        case Normalized(eta, beta):
            return eta / (n + beta)
        case Smoothed(a, b):
            return 1 / (a + 1.5 * b * n)
        case LogSmoothed(a, b):
            return math.log(1 + b * n / (a + b * n)) / (b * n)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("norm", [1e-2, 0.3, 0.7, 5.0, 1e4])
def test_rates_are_those_of_the_papers(rule, norm):
    rate = rule(number(norm))
    assert rate.shape == ()
    assert rate.item() == pytest.approx(literal(rule, norm), rel=1e-13)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_descent_equals_the_literal_twin(rule):
    groups = [[torch.linspace(-1, 2, 6).double().view(3, 2), number(0.5)], [number([3.0, 4.0]), number([1.0])]]
    params = [[p.clone().requires_grad_() for p in group] for group in groups]
    descent = GradientDescent([{"params": params[0]}, {"params": params[1], "lr": 0.5}], rule)
    generator = torch.Generator().manual_seed(0)
    for step in range(100):
        grads = [
            [torch.randn(p.shape, generator=generator).double() * 10.0 ** (step % 5 - 2) for p in group]
            for group in groups
        ]
        grads[0][0] *= step % 10 != 9
        if step % 10 == 9:
            grads = [[torch.zeros_like(g) for g in group] for group in grads]
        missing = step % 3 == 2
        norm = math.sqrt(
            sum(
                v.item() ** 2
                for i in (0, 1)
                for j in (0, 1)
                for v in grads[i][j].flatten()
                if not (missing and (i, j) == (0, 0))
            )
        )
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            if missing and (i, j) == (0, 0):
                params[i][j].grad = None
                continue
            params[i][j].grad = grads[i][j].clone()
            if norm > 0:
                groups[i][j] -= (0.5 if i else 1.0) * literal(rule, norm) * grads[i][j]
        descent.step()
        assert_close(
            [p.detach() for group in params for p in group],
            [p for group in groups for p in group],
            rtol=1e-12,
            atol=1e-12,
        )


def test_an_infinite_threshold_never_clips():
    for norm in (0.0, 1.0, math.inf):
        assert Clipped(0.3, math.inf)(number(norm)).item() == 0.3


def test_limits_of_the_smoothed_rates():
    for rule in (Smoothed, LogSmoothed):
        assert rule(2.0, 3.0)(number(0.0)).item() == 0.5
        for norm in (0.0, 1e-9, 1.0, 1e9):
            assert rule(2.0, 0.0)(number(norm)).item() == 0.5
        assert rule(2.0, 3.0)(number(1e300)).item() > 0
    for norm in (1e-6, 1.0, 1e6):
        assert Smoothed(0.0, 3.0)(number(norm)).item() == pytest.approx(2 / (9 * norm), rel=1e-14)
        assert LogSmoothed(0.0, 3.0)(number(norm)).item() == pytest.approx(math.log(2) / (3 * norm), rel=1e-14)


@pytest.mark.parametrize("growth", [1e-300, 1e-30, 1e-15, 1e-12, 1e-9, 1e-6])
def test_the_logarithm_keeps_its_digits(growth):
    # ln(1 + u)/(L1 n), u = t/(1 + t): the series 1 - 3t/2 + 7t^2/3 - 15t^3/4.
    expected = 1 - 1.5 * growth + 7 / 3 * growth**2 - 15 / 4 * growth**3
    assert LogSmoothed(1.0, 1.0)(number(growth)).item() == pytest.approx(expected, rel=4e-16)


@pytest.mark.parametrize("rule", [*RULES, Smoothed(0.0, 1.0), LogSmoothed(0.0, 1.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_zero_gradients_stand_still(rule, dtype):
    p = torch.ones(3, dtype=dtype, requires_grad=True)
    p.grad = torch.zeros_like(p)
    GradientDescent([p], rule).step()
    assert torch.equal(p, torch.ones_like(p))


def starts(kind, count=400):
    """Problems with their constants, starts over decades of the radius, and what rate to try, all at random."""
    generator = torch.Generator().manual_seed(sum(map(ord, kind)))
    draws = torch.rand(count, 4, generator=generator, dtype=torch.float64).tolist()
    for index, (a, b, radius, share) in enumerate(draws):
        L0, L1, dim = 10 ** (2 * a - 1), 10 ** (2 * b - 1), 1 + index % 3
        x = torch.randn(dim, generator=generator, dtype=torch.float64)
        yield (
            LANDSCAPES[kind](L0, L1, dim=dim),
            x * (10 ** (3 * radius - 1.5) / L1 / x.norm()),
            (0.02 + 0.96 * share) / L0,
        )


def values_along(problem, x0, rule, num_steps):
    p = x0.clone().requires_grad_()
    descent = GradientDescent([p], rule)
    values, norms = [problem.value(p.detach()).item()], []
    for _ in range(num_steps):
        p.grad = problem.gradient(p.detach())
        norms.append(p.grad.norm().item())
        descent.step()
        values.append(problem.value(p.detach()).item())
    return values, norms


@pytest.mark.thorough
@pytest.mark.parametrize("kind", LANDSCAPES)
def test_descent_is_monotone_at_the_threshold_of_the_theorem(kind):
    clipped = 0
    for problem, x0, eta in starts(kind):
        threshold = (1 / eta - problem.L0) / problem.L1
        values, norms = values_along(problem, x0, Clipped(eta, threshold), 12)
        assert all(after <= before * (1 + 1e-14) for before, after in itertools.pairwise(values))
        clipped += norms[0] > threshold
    assert 100 < clipped < 400


@pytest.mark.thorough
@pytest.mark.parametrize("kind", LANDSCAPES)
@pytest.mark.parametrize("rule", [Smoothed, LogSmoothed])
def test_smoothed_steps_decrease_the_loss_as_promised(kind, rule):
    for problem, x0, _ in starts(kind, count=100):
        L0, L1 = problem.L0, problem.L1
        values, norms = values_along(problem, x0, rule(L0, L1), 8)
        for k, n in enumerate(norms):
            a = L0 + L1 * n
            u = L1 * n / a
            # The series where the closed form has no digits left.
            best = a / L1**2 * ((1 + u) * math.log1p(u) - u if u > 1e-3 else u**2 / 2 - u**3 / 6 + u**4 / 12)
            promised = best if rule is LogSmoothed else n**2 / (2 * L0 + 3 * L1 * n)
            assert values[k] - values[k + 1] >= promised * (1 - 1e-6) - 1e-13 * values[k]
            assert best >= n**2 / (2 * L0 + 3 * L1 * n) * (1 - 1e-6), "the logarithm promises more"


def test_clipped_descent_is_clipped_momentum_without_momentum():
    ours, theirs = (torch.linspace(-3, 4, 10, dtype=torch.float64).requires_grad_() for _ in range(2))
    descent = GradientDescent([ours], Clipped(0.3, 0.5))
    optimizer = ClippedMomentum.sgd_clip([theirs], 0.3, threshold=0.5)
    for _ in range(50):
        for p, step in ((ours, descent.step), (theirs, optimizer.step)):
            p.grad = torch.linspace(0.1, 2, 10, dtype=torch.float64) * p.detach()
            step()
        assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


def test_a_schedule_scales_the_rate_and_not_the_norm_at_which_it_turns():
    p = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    descent = GradientDescent([p], Clipped(0.5, 2.0))
    scheduler = torch.optim.lr_scheduler.StepLR(descent, step_size=1, gamma=0.5)
    lengths = []
    for g in (1.0, 1.0, 8.0, 8.0):
        before = p.item()
        p.grad = torch.full_like(p, g)
        descent.step()
        scheduler.step()
        lengths.append(before - p.item())
    assert lengths == pytest.approx([0.5, 0.25, 0.25, 0.125])


def test_ascent_and_half_precision():
    p = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    p.grad = torch.tensor([3.0, 4.0], dtype=torch.bfloat16)
    GradientDescent([p], Clipped(1.0, 2.5), maximize=True).step()
    assert_close(p.detach(), torch.tensor([1.5, 2.0], dtype=torch.bfloat16))


@pytest.mark.parametrize("rule", [*RULES, LogSmoothed(1.0, 0.0)], ids=str)
def test_a_step_waits_for_no_device(rule):
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.ones(3)
    descent = GradientDescent([p], rule, lr=torch.tensor(0.5))
    with NoSync():
        descent.step()
    assert p[0] < 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_keep_the_rule(copied):
    p = torch.ones(3, requires_grad=True)
    descent = copied(GradientDescent([p], Smoothed(1.0, 2.0), lr=0.5))
    assert descent.step_size == Smoothed(1.0, 2.0)
    (q,) = descent.param_groups[0]["params"]
    q.grad = torch.ones(3)
    descent.step()
    assert_close(q.detach(), torch.full((3,), 1 - 0.5 / (1 + 3 * 3**0.5)))


INVALID = [
    (Clipped, "lr", (-1.0, 1.0)), (Clipped, "threshold", (1.0, 0.0)), (Clipped, "threshold", (1.0, math.nan)),
    (Normalized, "beta", (1.0, 0.0)), (Normalized, "lr", (math.inf, 1.0)), (Smoothed, "L0", (-1.0, 1.0)),
    (Smoothed, "L0", (0.0, 0.0)), (LogSmoothed, "L1", (1.0, -1.0)), (LogSmoothed, "L1", (1.0, math.nan)),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "name", "values"), INVALID)
def test_invalid_constants_are_refused(rule, name, values):
    with pytest.raises(ValueError, match=rf"Parameter `{name}` should be .* Found `{name} = "):
        rule(*values)


@pytest.mark.parametrize("rule", [0.1, Smoothed])
def test_what_is_no_rule_is_refused(rule):
    with pytest.raises(ValueError, match=r"Parameter `step_size` should be a rule, such .* Found `step_size = "):
        GradientDescent([torch.ones(1, requires_grad=True)], rule)
