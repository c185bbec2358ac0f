"""problems: values, gradients and Hessian norms of every landscape agree with each other and with closed forms."""

import math

import mpmath
import pytest
import torch
from torch.testing import assert_close

from smoothdiag import problems

PROBLEMS = {
    "exponential": problems.exponential(1.5, 2.0),
    "exponential-3d": problems.exponential(1.5, 2.0, dim=3),
    "cosh": problems.cosh(1.5, 2.0),
    "cosh-3d": problems.cosh(1.5, 2.0, dim=3),
    "hybrid": problems.hybrid(1.5, 2.0),
    "hybrid-3d": problems.hybrid(1.5, 2.0, dim=3),
    "power-2": problems.power(2.0, dim=3),
    "power-3": problems.power(3.0, dim=3),
    "power-4": problems.power(4.0),
    "power-6": problems.power(6.0, L1=0.5, dim=2),
    "quadratic": problems.quadratic([3.0, 0.1, 0.0]),
    "quadratic-indefinite": problems.quadratic([1.0, -2.0]),
    "exp_linear": problems.exp_linear([1.0, -2.0]),
    "logistic": problems.logistic([1.0, -2.0]),
    "sum_exp": problems.sum_exp(3),
    "sum_cosh": problems.sum_cosh(3),
    "sine": problems.sine(2),
    "slow": problems.slow(0.2),
    "valley": problems.valley(),
    "neg_log": problems.neg_log(),
    "scaled": problems.exponential(1.5, 2.0, dim=2).scaled(3.0, 0.5),
}
each = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())
bounded = pytest.mark.parametrize(
    "problem",
    [p for p in PROBLEMS.values() if p.L0 is not None],
    ids=[k for k, p in PROBLEMS.items() if p.L0 is not None],
)


def points(problem, num, seed=0, decades=(-4, 1)):
    """Random directions, lengths log-uniform over the decades; the logarithm wants positive ones."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, problem.dim, generator=generator, dtype=torch.float64)
    x = x / x.norm(dim=1, keepdim=True)
    x = x * 10 ** torch.empty(num, 1, dtype=torch.float64).uniform_(*decades, generator=generator)
    return x.abs() if problem is PROBLEMS["neg_log"] else x


def parts(problem, x):
    """Hessian norms and gradient norms at the rows of x."""
    return torch.func.vmap(problem.hessian_norm)(x), torch.func.vmap(problem.gradient)(x).norm(dim=1)


@each
def test_gradient_is_that_of_the_value(problem):
    for x in points(problem, 20):
        (g,) = torch.autograd.grad(problem.value(x.requires_grad_()), x)
        assert_close(problem.gradient(x.detach()), g, rtol=1e-12, atol=1e-12 * g.norm().item())


@each
def test_hessian_norm_and_direction_are_those_of_the_hessian(problem):
    for x in points(problem, 10):
        h = torch.autograd.functional.hessian(problem.value, x)
        norm, v = problem.hessian_norm(x), problem.extreme_direction(x)
        assert_close(norm, torch.linalg.eigvalsh(h).abs().max(), rtol=1e-9, atol=1e-12)
        assert_close(v.norm().item(), 1.0, rtol=1e-12, atol=0)
        rayleigh = v @ h @ v
        assert_close(rayleigh.abs(), norm, rtol=1e-9, atol=1e-12)
        assert_close(h @ v, rayleigh * v, rtol=0, atol=1e-9 * norm.item() + 1e-12)


@each
def test_values_have_the_shapes_and_the_dtype_of_their_point(problem):
    for dtype in (torch.float32, torch.float64):
        x = points(problem, 1)[0].to(dtype)
        for scalar in (problem.value(x), problem.hessian_norm(x)):
            assert (scalar.shape, scalar.dtype) == ((), dtype)
        for vector in (problem.gradient(x), problem.extreme_direction(x)):
            assert (vector.shape, vector.dtype) == ((problem.dim,), dtype)


@bounded
def test_the_constants_bound_the_hessian(problem):
    norms, grads = parts(problem, points(problem, 1000))
    assert (norms <= (problem.L0 + problem.L1 * grads) * (1 + 1e-12)).all()
    assert problem.frontier(problem.L1) == problem.L0


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_on_the_exponential_the_bound_is_an_equality(dim):
    problem = problems.exponential(0.3, 4.0, dim)
    norms, grads = parts(problem, points(problem, 500, decades=(-9, 1)))
    assert_close(norms, 0.3 + 4.0 * grads, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("name", "law"),
    [
        ("cosh-3d", lambda g: (1.5**2 + (2 * g) ** 2).sqrt()),
        ("hybrid-3d", lambda g: (2 * g).clamp(min=1.5)),
        ("power-3", lambda g: 6 * (g / 3) ** (1 / 2)),
        ("power-4", lambda g: 12 * (g / 4) ** (2 / 3)),
        ("power-6", lambda g: 30 * (g / 6) ** (4 / 5)),
        ("exp_linear", lambda g: 5**0.5 * g),
        ("neg_log", lambda g: g**2),
    ],
)
def test_curvature_as_a_function_of_the_gradient_norm(name, law):
    norms, grads = parts(PROBLEMS[name], points(PROBLEMS[name], 200))
    assert_close(norms, law(grads), rtol=1e-11, atol=0)


def test_logistic_law():
    problem = problems.logistic([3.0, 4.0])
    norms, grads = parts(problem, points(problem, 200, decades=(-4, 0)))
    assert_close(norms, 5 * grads - grads**2, rtol=1e-9, atol=0)


def supremum(problem, L1):
    """Brute force over lines through 0, and over the curve xy = 1 in the plane; inf if it grows beyond 1e6."""
    log, lin = torch.logspace(-8, 1.5, 3000), torch.linspace(0.001, 6, 10_000)
    t = torch.cat([log, lin]).double()
    t = t if problem is PROBLEMS["neg_log"] else torch.cat([t, -t])
    directions = torch.tensor([[1.0, 0, 0], [1, 1, 1], [1, -2, 0]], dtype=torch.float64)[:, : problem.dim]
    lines = [torch.outer(t, v) for v in directions]
    if problem.dim == 2:
        lines.append(torch.stack([t, 1 / t], dim=1))
    norms, grads = parts(problem, torch.cat(lines))
    # The slack is the rounding of norms that grow to 1e27.
    gap = norms - L1 * grads - 1e-13 * (norms + L1 * grads)
    best = gap[gap.isfinite()].max().item()
    return math.inf if best > 1e6 else best


@pytest.mark.thorough
@pytest.mark.parametrize("name", sorted(set(PROBLEMS) - {"quadratic-indefinite"}))
@pytest.mark.parametrize("L1", [0.3, 1.1, 5.0])
def test_frontier_by_brute_force(name, L1):
    problem = PROBLEMS[name]
    assert problem.frontier(L1) == pytest.approx(supremum(problem, L1), rel=3e-3, abs=1e-6)


@pytest.mark.parametrize("r", [1e-100, 1e-20, 1e-8, 1e-4, 1e-3, 0.1, 0.4999, 0.5, 0.5001, 1.0, 10.0, 300.0])
def test_exponential_to_full_relative_accuracy(r):
    problem = problems.exponential(1.5, 2.0, dim=2)
    x = torch.tensor([0.6 * r, -0.8 * r], dtype=torch.float64)
    with mpmath.workdps(300):
        exact = [mpmath.mpf(v) for v in x.tolist()]
        length = mpmath.sqrt(exact[0] ** 2 + exact[1] ** 2)
        e = mpmath.exp(2 * length)
        f = mpmath.mpf(1.5) / 4 * (e - 1 - 2 * length)
        g = [mpmath.mpf(1.5) / 2 * (e - 1) * v / length for v in exact]
        pairs = [(problem.value(x), f), *zip(problem.gradient(x), g, strict=True), (problem.hessian_norm(x), 1.5 * e)]
        for found, true in pairs:
            assert abs(mpmath.mpf(found.item()) / true - 1) < 1e-12


@pytest.mark.parametrize("s", [-600.0, -40.0, -20.5, -1.0, -1e-9, 0.0, 1.0, 19.0, 25.0, 40.0, 600.0])
def test_logistic_to_full_relative_accuracy(s):
    problem = problems.logistic()
    x = torch.tensor([s], dtype=torch.float64)
    with mpmath.workdps(600):
        e = mpmath.exp(-mpmath.mpf(s))
        pairs = [
            (problem.value(x), mpmath.log(1 + e)),
            (problem.gradient(x)[0], -e / (1 + e)),
            (problem.hessian_norm(x), e / (1 + e) ** 2),
        ]
        for found, true in pairs:
            assert abs(mpmath.mpf(found.item()) / true - 1) < 1e-12


@each
def test_units(problem):
    a, b = 3.0, 0.25
    scaled = problem.scaled(a, b)
    assert scaled.f_min == a * problem.f_min
    if problem.L0 is not None:
        constants = [scaled.L0, scaled.L1]
        assert constants == pytest.approx([a * b**2 * problem.L0, b * problem.L1])
    for L1 in (0.3, 3.0):
        assert scaled.frontier(b * L1) == pytest.approx(a * b**2 * problem.frontier(L1))
    for x in points(problem, 5):
        assert_close(scaled.value(x / b), a * problem.value(x))
        (g,) = torch.autograd.grad(scaled.value(y := (x / b).requires_grad_()), y)
        assert_close(scaled.gradient(y.detach()), g, rtol=1e-12, atol=1e-12 * g.norm().item())
        h = torch.autograd.functional.hessian(scaled.value, y.detach())
        assert_close(scaled.hessian_norm(y.detach()), torch.linalg.eigvalsh(h).abs().max(), rtol=1e-9, atol=1e-12)


def test_a_scaled_exponential_is_an_exponential():
    one, other = problems.exponential(1.5, 2.0, 3).scaled(4.0, 0.5), problems.exponential(1.5, 1.0, 3)
    for x in points(one, 10):
        assert_close(one.value(x), other.value(x), rtol=1e-12, atol=0)
    assert (one.L0, one.L1) == (other.L0, other.L1)


MINIMA = {
    "exponential-3d": [0.0] * 3, "cosh-3d": [0.0] * 3, "hybrid-3d": [0.0] * 3, "power-4": [0.0], "power-6": [0.0] * 2,
    "quadratic": [0.0] * 3, "sum_cosh": [0.0] * 3, "sine": [-math.pi / 2] * 2, "slow": [0.0], "valley": [0.5, 2.0],
    "exp_linear": [-300.0, 300.0], "logistic": [300.0, -300.0], "sum_exp": [-700.0] * 3,
}  # fmt: skip


@pytest.mark.parametrize(("name", "x"), MINIMA.items(), ids=MINIMA.keys())
def test_infimum(name, x):
    problem = PROBLEMS[name]
    x = torch.tensor(x, dtype=torch.float64)
    assert_close(problem.value(x).item(), problem.f_min, rtol=1e-15, atol=1e-300)
    assert_close(problem.gradient(x), torch.zeros_like(x), rtol=0, atol=1e-15)
    assert_close(problem.extreme_direction(x).norm().item(), 1.0, rtol=1e-15, atol=0)
    assert all(problem.value(p) >= problem.f_min for p in points(problem, 50))


@pytest.mark.parametrize("name", ["quadratic-indefinite", "neg_log"])
def test_no_infimum(name):
    assert PROBLEMS[name].f_min == -math.inf


def test_descent_on_the_hybrid_diverges_from_where_the_source_says():
    problem = problems.hybrid(1.0, 1.0)

    def descend(start):
        x = torch.tensor([start], dtype=torch.float64)
        for _ in range(200):
            x = x - problem.gradient(x) / problem.L0
        return x.abs().item()

    assert descend(2.67) < 1e-6
    assert not descend(2.69) < 100


def test_as_module_is_trainable_and_leaves_its_start_alone():
    problem, x0 = problems.cosh(dim=2), torch.tensor([1.0, -2.0], dtype=torch.float64)
    module = problem.as_module(x0)
    assert [name for name, _ in module.named_parameters()] == ["x"]
    module().backward()
    assert_close(module.x.grad, problem.gradient(x0))
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    assert_close(x0, torch.tensor([1.0, -2.0], dtype=torch.float64))
    assert_close(module.x.detach(), x0 - 0.1 * problem.gradient(x0))


def test_landscapes_work_under_torch_func():
    problem = problems.exponential(dim=3)
    x = points(problem, 4, decades=(-1, 1))
    g = torch.func.vmap(torch.func.grad(problem.value))(x)
    assert_close(g, torch.stack([problem.gradient(p) for p in x]), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: problems.exponential(L0=0.0), "Parameter `L0` should be positive and finite. Found `L0 = 0.0`."),
        (lambda: problems.hybrid(math.inf), "Parameter `L0` should be positive and finite. Found `L0 = inf`."),
        (lambda: problems.cosh(L1=math.nan), "Parameter `L1` should be positive and finite. Found `L1 = nan`."),
        (lambda: problems.power(1.5), "Parameter `exponent` should be in [2, inf). Found `exponent = 1.5`."),
        (lambda: problems.slow(-1.0), "Parameter `epsilon` should be positive and finite. Found `epsilon = -1.0`."),
        (lambda: problems.sine().scaled(0), "Parameter `value` should be positive and finite. Found `value = 0`."),
    ],
)
def test_wrong_constants_are_refused(build, message):
    with pytest.raises(ValueError) as error:
        build()
    assert str(error.value) == message
