"""Landscapes whose smoothness is known in closed form: the ground truth for everything that measures smoothness.

A function (`exponential`, `cosh`, ...) builds a problem, which takes single points of shape (dim,). `value` shares no
code with `gradient` and `hessian_norm`, so autograd and the closed forms can be tested against each other.

Units: ``L0`` [f/x^2], ``L1`` [1/x]; see `Problem.scaled`.

Examples:
    >>> problem = sd.problems.exponential(L0=1.0, L1=2.0)  # ||H|| = L0 + L1 ||g|| at every point
    >>> x = torch.tensor([0.3, 0.4])
    >>> print(round(float(problem.hessian_norm(x)), 3), round(float(1 + 2 * problem.gradient(x).norm()), 3))
    2.718 2.718
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from smoothdiag import arguments

Function = Callable[[Tensor], Tensor]
Frontier = Callable[[float], float]


@dataclass(frozen=True)
class Problem:
    """A landscape f with its gradient g, the norm of its Hessian H, and its smoothness constants.

    Attributes:
        dim: Number of coordinates.
        L0: Constant with ||H|| <= L0 + L1 ||g|| everywhere; None if no pair of constants does that.
        L1: Constant that goes with L0: the smallest with a finite L0, unless the constructor says otherwise.
        f_min: Infimum of f, attained or not; -inf if there is none.
        frontier: L1 -> the smallest L0 that goes with it, sup over x of ||H(x)|| - L1 ||g(x)||; may be inf.
        value: x -> f(x), 0-dim and differentiable; at a minimum, autograd's second derivatives may be NaN.
        gradient: x -> g(x), shape (dim,).
        hessian_norm: x -> spectral norm ||H(x)||, 0-dim.
        extreme_direction: x -> unit eigenvector of H(x) for an eigenvalue of modulus ||H(x)||, shape (dim,).
    """

    dim: int
    L0: float | None
    L1: float | None
    f_min: float
    frontier: Frontier = field(repr=False)
    value: Function = field(repr=False)
    gradient: Function = field(repr=False)
    hessian_norm: Function = field(repr=False)
    extreme_direction: Function = field(repr=False)

    def as_module(self, x0: Tensor) -> nn.Module:
        """Returns a module with one parameter ``x``, a copy of ``x0``, whose forward() is ``value(x)``."""
        return _Landscape(self, x0)

    def scaled(self, value: float = 1.0, argument: float = 1.0) -> "Problem":
        """Returns the landscape a f(b x) for a = ``value`` > 0 and b = ``argument`` > 0.

        Units: L0 becomes a b^2 L0, L1 becomes b L1.
        """
        a, b = arguments.positive("value", value), arguments.positive("argument", argument)
        return Problem(
            dim=self.dim,
            L0=None if self.L0 is None else a * b**2 * self.L0,
            L1=None if self.L1 is None else b * self.L1,
            f_min=a * self.f_min,
            frontier=lambda L1: a * b**2 * self.frontier(L1 / b),
            value=lambda x: a * self.value(b * x),
            gradient=lambda x: a * b * self.gradient(b * x),
            hessian_norm=lambda x: a * b**2 * self.hessian_norm(b * x),
            extreme_direction=lambda x: self.extreme_direction(b * x),
        )


class _Landscape(nn.Module):
    def __init__(self, problem: Problem, x0: Tensor) -> None:
        super().__init__()
        self.problem = problem
        self.x = nn.Parameter(x0.detach().clone())

    def forward(self) -> Tensor:
        return self.problem.value(self.x)


def exponential(L0: float = 1.0, L1: float = 1.0, dim: int = 1) -> Problem:
    """Returns f = (L0/L1^2) (e^{L1 r} - L1 r - 1), r = ||x||, where ||H|| = L0 + L1 ||g|| at every point."""
    a, b = arguments.positive("L0", L0), arguments.positive("L1", L1)
    profile = _Profile(
        lambda r: a / b**2 * _expm1_minus_identity(b * r),
        lambda r: a / b * torch.expm1(b * r),
        lambda r: a * torch.exp(b * r),
    )
    return _radial(profile, dim, a, b, 0.0, _corner(a, b))


def cosh(L0: float = 1.0, L1: float = 1.0, dim: int = 1) -> Problem:
    """Returns f = L0/L1^2 times the cosh of L1 ||x||, where ||H||^2 = L0^2 + L1^2 ||g||^2."""
    a, b = arguments.positive("L0", L0), arguments.positive("L1", L1)
    profile = _Profile(
        lambda r: a / b**2 * torch.cosh(b * r),
        lambda r: a / b * torch.sinh(b * r),
        lambda r: a * torch.cosh(b * r),
    )
    return _radial(profile, dim, a, b, a / b**2, _corner(a, b))


def hybrid(L0: float = 1.0, L1: float = 1.0, dim: int = 1) -> Problem:
    """Returns a quadratic for r <= 1/L1 that continues as an exponential, where ||H|| = max(L0, L1 ||g||).

    With r = ||x||, f is L0 r^2/2 + L0/(2 L1^2) inside and L0 e^{L1 r - 1}/L1^2 outside. Gradient descent with the rate
    1/L0 diverges if it starts at L1 r = 2.69, and does not diverge from 2.67.

    Source: Zhang, He, Sra, Jadbabaie 2020 (ICLR), the lower bound for gradient descent.
    """
    a, b = arguments.positive("L0", L0), arguments.positive("L1", L1)

    def pieces(r: Tensor, inside: Tensor) -> Tensor:
        return torch.where(b * r <= 1, inside, torch.exp(b * r - 1))

    profile = _Profile(
        lambda r: a / b**2 * pieces(r, ((b * r) ** 2 + 1) / 2),
        lambda r: a / b * pieces(r, b * r),
        lambda r: a * pieces(r, torch.ones_like(r)),
    )
    return _radial(profile, dim, a, b, a / (2 * b**2), _corner(a, b))


def power(exponent: float = 4.0, L1: float = 1.0, dim: int = 1) -> Problem:
    """Returns f = ||x||^n for n = ``exponent`` >= 2, where ||H|| is proportional to ||g||^{(n-2)/(n-1)}.

    For every L1 > 0 there is an L0, n ((n-2)/L1)^{n-2}; the problem's constants are the pair for the given ``L1``.
    """
    n = exponent
    arguments.number("exponent", n, "in [2, inf)", lambda v: 2 <= v < math.inf)

    def frontier(L1: float) -> float:
        if n == 2:
            return 2.0
        return n * ((n - 2) / L1) ** (n - 2) if L1 > 0 else math.inf

    profile = _Profile(lambda r: r**n, lambda r: n * r ** (n - 1), lambda r: n * (n - 1) * r ** (n - 2))
    return _radial(profile, dim, frontier(arguments.positive("L1", L1)), L1, 0.0, frontier)


def quadratic(eigenvalues: Sequence[float] = (1.0,)) -> Problem:
    """Returns f = x' diag(eigenvalues) x / 2 with eigenvalues of any sign: L0 is the largest modulus, and L1 = 0."""
    values = tuple(float(v) for v in eigenvalues)
    largest = max(abs(v) for v in values)

    def diagonal(x: Tensor) -> Tensor:
        return x.new_tensor(values)

    profile = _Profile(lambda x: diagonal(x) * x**2 / 2, lambda x: diagonal(x) * x, diagonal)
    f_min = 0.0 if min(values) >= 0 else -math.inf
    return _separable(profile, len(values), largest, 0.0, f_min, _corner(largest, 0.0))


def exp_linear(a: Sequence[float] = (1.0,)) -> Problem:
    """Returns f = exp(a'x), where ||H|| = ||a|| ||g||: the constants are (0, ||a||)."""
    length = math.hypot(*a)
    profile = _Profile(torch.exp, torch.exp, torch.exp)
    return _ridge(profile, a, length, _corner(0.0, length))


def logistic(a: Sequence[float] = (1.0,)) -> Problem:
    """Returns f = log(1 + exp(-a'x)), where ||H|| = ||a|| ||g|| - ||g||^2.

    The constants are (0, ||a||). The frontier L0 = max(||a|| - L1, 0)^2 / 4 falls to 0 at L1 = ||a||.
    """
    length = math.hypot(*a)
    profile = _Profile(
        lambda s: torch.logaddexp(torch.zeros_like(s), -s),  # softplus drops the exponential beyond 20
        lambda s: -torch.sigmoid(-s),
        lambda s: torch.sigmoid(s) * torch.sigmoid(-s),
    )
    return _ridge(profile, a, length, lambda L1: max(length - L1, 0.0) ** 2 / 4)


def sum_exp(dim: int = 2) -> Problem:
    """Returns f = sum of exp(x_i): the constants are (0, 1), attained in the limit of one large term."""
    profile = _Profile(torch.exp, torch.exp, torch.exp)
    return _separable(profile, dim, 0.0, 1.0, 0.0, _corner(0.0, 1.0))


def sum_cosh(dim: int = 2) -> Problem:
    """Returns f = sum of cosh(x_i): the constants are (1, 1)."""
    profile = _Profile(torch.cosh, torch.sinh, torch.cosh)
    return _separable(profile, dim, 1.0, 1.0, float(dim), _corner(1.0, 1.0))


def sine(dim: int = 1) -> Problem:
    """Returns f = sum of sin(x_i): the constants are (1, 0), and curvature falls as the gradient grows."""
    profile = _Profile(torch.sin, torch.cos, lambda x: -torch.sin(x))
    return _separable(profile, dim, 1.0, 0.0, -float(dim), _corner(1.0, 0.0))


def slow(epsilon: float = 0.1) -> Problem:
    """Returns f = (epsilon/4) (6 x^2 - x^4) on [-1, 1], which continues with the constant slope 2 epsilon outside.

    The constants are (3 epsilon, 0). Descent from height D at a fixed rate eta takes about D / (eta epsilon^2) steps.

    Source: Zhang, He, Sra, Jadbabaie 2020 (ICLR), the lower bound for gradient descent.
    """
    e = arguments.positive("epsilon", epsilon)

    def inner(x: Tensor) -> Tensor:
        return x.clamp(-1, 1)

    profile = _Profile(
        lambda x: e * ((6 * inner(x) ** 2 - inner(x) ** 4) / 4 + 2 * (x - inner(x)).abs()),
        lambda x: e * (3 * inner(x) - inner(x) ** 3),
        lambda x: 3 * e * (1 - inner(x) ** 2),
    )
    return _separable(profile, 1, 3 * e, 0.0, 0.0, _corner(3 * e, 0.0))


def valley() -> Problem:
    """Returns f = (1 - x y)^2 / 2, where no constants hold: ||H|| is unbounded along x y = 1, where g = 0."""

    # H = [[y^2, c], [c, x^2]] with c = 2xy - 1: the trace is not negative, so the larger eigenvalue is the norm.
    def halves(x: Tensor) -> tuple[Tensor, Tensor]:
        return (x[1] ** 2 - x[0] ** 2) / 2, 2 * x[0] * x[1] - 1

    def direction(x: Tensor) -> Tensor:
        half, c = halves(x)
        angle = torch.atan2(c, half) / 2
        return torch.stack([angle.cos(), angle.sin()])

    return Problem(
        *(2, None, None, 0.0, lambda L1: math.inf),
        value=lambda x: (1 - x[0] * x[1]) ** 2 / 2,
        gradient=lambda x: (x[0] * x[1] - 1) * x.flip(0),
        hessian_norm=lambda x: (x @ x) / 2 + torch.hypot(*halves(x)),
        extreme_direction=direction,
    )


def neg_log() -> Problem:
    """Returns f = -log x on x > 0, where no constants hold: ||H|| = ||g||^2."""
    profile = _Profile(lambda x: -torch.log(x), lambda x: -1 / x, lambda x: 1 / x**2)
    return _separable(profile, 1, None, None, -math.inf, lambda L1: math.inf)


class _Profile(NamedTuple):
    """A function p of one variable with its first two derivatives, elementwise."""

    value: Function
    slope: Function
    curvature: Function


def _radial(p: _Profile, dim: int, L0: float, L1: float, f_min: float, frontier: Frontier) -> Problem:
    """Returns f = p(||x||) with p'' >= p'/r >= 0: the largest eigenvalue is p'', with the eigenvector x/r."""
    arguments.whole("dim", dim, 1)

    def direction(x: Tensor) -> Tensor:
        r = _length(x)
        return (x / r).where(r > 0, _one_hot(torch.zeros_like(r), x))

    return Problem(
        *(dim, L0, L1, f_min, frontier),
        value=lambda x: p.value(_length(x)),
        gradient=lambda x: p.slope(_length(x)) * direction(x),
        hessian_norm=lambda x: p.curvature(_length(x)),
        extreme_direction=direction,
    )


def _ridge(p: _Profile, a: Sequence[float], L1: float, frontier: Frontier) -> Problem:
    """Returns f = p(a'x) with inf p = 0: the Hessian p'' a a' has only one eigenvalue other than zero."""
    entries = tuple(a)

    def vector(x: Tensor) -> Tensor:
        return x.new_tensor(entries)

    return Problem(
        *(len(entries), 0.0, L1, 0.0, frontier),
        value=lambda x: p.value(vector(x) @ x),
        gradient=lambda x: p.slope(vector(x) @ x) * vector(x),
        hessian_norm=lambda x: p.curvature(vector(x) @ x).abs() * (vector(x) @ vector(x)),
        extreme_direction=lambda x: vector(x) / _length(vector(x)),
    )


def _separable(p: _Profile, dim: int, L0: float | None, L1: float | None, f_min: float, frontier: Frontier) -> Problem:
    """Returns f = sum of p(x_i): the Hessian is diagonal."""
    arguments.whole("dim", dim, 1)
    return Problem(
        *(dim, L0, L1, f_min, frontier),
        value=lambda x: p.value(x).sum(),
        gradient=p.slope,
        hessian_norm=lambda x: p.curvature(x).abs().max(),
        extreme_direction=lambda x: _one_hot(p.curvature(x).abs().argmax(), x),
    )


def _corner(L0: float, L1: float) -> Frontier:
    """Returns the frontier of a landscape where a smaller L1 has no finite L0, and a larger L1 needs the same L0."""
    return lambda other: L0 if other >= L1 else math.inf


def _expm1_minus_identity(t: Tensor) -> Tensor:
    """Returns e^t - 1 - t for t >= 0 to full relative accuracy; expm1(t) - t has none near 0."""
    # 20 terms of the series t^2/2 + t^3/6 + ... leave a remainder of 1e-20 at t = 1.
    series = torch.ones_like(t)
    for k in range(21, 2, -1):
        series = 1 + series * t / k
    return torch.where(t < 1, series * t**2 / 2, torch.expm1(t) - t)


def _length(x: Tensor) -> Tensor:
    r: Tensor = torch.linalg.vector_norm(x)
    return r


def _one_hot(index: Tensor, x: Tensor) -> Tensor:
    return (torch.arange(x.numel(), device=x.device) == index).to(x.dtype)
