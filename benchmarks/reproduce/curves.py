"""Functions of one variable by which clipping is explained, and how smooth each of them is, checked on grids.

`Curve.frontier` is the closed form of the smallest L0 that goes with an L1: the supremum over x of |f''| - L1 |f'|.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Function = Callable[[Array], Array]

SLOPES = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Values of L1 at which a frontier is checked."""

RADII = (0.1, 1.0)
"""Lengths of a displacement, in units of 1/L1, up to which the first-order inequality is checked."""

FACTORS = np.arange(1.0, 6.0, 0.01)
"""Values of kappa for which steps of the rate kappa / (L0 + L1 |f'|) are tried."""


@dataclass(frozen=True)
class Curve:
    """A function f.

    Attributes:
        name: Its formula.
        value: x -> f(x).
        slope: x -> f'(x).
        curvature: x -> f''(x).
        frontier: L1 -> the smallest L0 that goes with it; inf if there is none.
        bounded_below: Whether f has a lower bound.
        lipschitz: Smallest L with |f''| <= L everywhere; inf if there is none.
        reach: Largest |x| of the grids; exponentials overflow beyond.
    """

    name: str
    value: Function
    slope: Function
    curvature: Function
    frontier: Callable[[float], float]
    bounded_below: bool
    lipschitz: float = math.inf
    reach: float = 1e3

    @property
    def pairs(self) -> list[tuple[float, float]]:
        """The pairs (L0, L1) of the grid of L1, if finite; a constant L alone is one with L1 = 0."""
        found = [(self.frontier(L1), L1) for L1 in SLOPES]
        return [(L0, L1) for L0, L1 in found if math.isfinite(L0)]

    def grid(self, points: int = 40_001) -> Array:
        """Places on both sides of zero, equally spaced in the logarithm."""
        half = np.geomspace(1e-6, self.reach, points // 2)
        return np.concatenate([-half[::-1], [0.0], half])


def _corner(L0: float, L1: float) -> Callable[[float], float]:
    return lambda other: L0 if other >= L1 else math.inf


def _hybrid(inside: Function, outside: Function) -> Function:
    return lambda x: np.where(np.abs(x) <= 1, inside(x), outside(np.maximum(np.abs(x), 1.0)))


CURVES = {
    curve.name: curve
    for curve in (
        Curve(
            "x^2",
            value=np.square,
            slope=lambda x: 2 * x,
            curvature=lambda x: np.full_like(x, 2.0),
            frontier=lambda L1: 2.0,
            bounded_below=True,
            lipschitz=2.0,
        ),
        Curve(
            "x^3",
            value=lambda x: x**3,
            slope=lambda x: 3 * x**2,
            curvature=lambda x: 6 * x,
            frontier=lambda L1: 3 / L1,
            bounded_below=False,
        ),
        Curve(
            "x^4",
            value=lambda x: x**4,
            slope=lambda x: 4 * x**3,
            curvature=lambda x: 12 * x**2,
            frontier=lambda L1: 16 / L1**2,
            bounded_below=True,
        ),
        Curve(
            "exp x",
            value=np.exp,
            slope=np.exp,
            curvature=np.exp,
            frontier=_corner(0.0, 1.0),
            bounded_below=True,
            reach=100.0,
        ),
        Curve(
            "hybrid",
            value=_hybrid(lambda x: (x**2 + 1) / 2, lambda r: np.exp(r - 1)),
            slope=lambda x: np.sign(x) * _hybrid(np.abs, lambda r: np.exp(r - 1))(x),
            curvature=_hybrid(np.ones_like, lambda r: np.exp(r - 1)),
            frontier=_corner(1.0, 1.0),
            bounded_below=True,
            reach=100.0,
        ),
        Curve(
            "sin x",
            value=np.sin,
            slope=np.cos,
            curvature=lambda x: -np.sin(x),
            frontier=lambda L1: 1.0,
            bounded_below=True,
            lipschitz=1.0,
        ),
    )
}
"""The functions of the accounts, and two that need no L1 at all."""


def frontier_error(curve: Curve) -> float:
    """Returns the largest relative distance of a supremum on the grid from the closed form of a finite L0.

    Where the closed form is 0, the supremum on the grid is divided by the largest curvature on it.
    """
    x = curve.grid()
    steep, bent = np.abs(curve.slope(x)), np.abs(curve.curvature(x))
    errors = []
    for L0, L1 in curve.pairs:
        found = float((bent - L1 * steep).max())
        errors.append(abs(found - L0) / (L0 or float(bent.max())))
    return max(errors)


def growth(curve: Curve) -> list[float]:
    """Returns the largest |f''| for |x| up to a hundredth of the reach, a tenth of it, and the reach."""
    x = curve.grid()
    bent = np.abs(curve.curvature(x))
    return [float(bent[np.abs(x) <= curve.reach * share].max()) for share in (0.01, 0.1, 1.0)]


def first_order(curve: Curve, pair: tuple[float, float], lengths: Iterable[float], scaled: bool = False) -> float:
    """Returns the largest |f'(x + d) - f'(x)| / ((L0 + L1 |f'(x)|) |d|) over x and displacements of these lengths.

    Args:
        curve: The function.
        pair: L0 and L1.
        lengths: |d| in units of 1/L1.
        scaled: Whether to take A L0 and B L1 instead, which follow from the bound on |f''|: for the largest length t,
            B = (e^t - 1)/t and A = 1 + e^t - B.

    Source: Zhang, Jin, Fang, Wang 2020 (NeurIPS), for A and B.
    """
    L0, L1 = pair
    lengths = list(lengths)
    if scaled:
        t = max(lengths)
        B = math.expm1(t) / t
        L0, L1 = (1 + math.exp(t) - B) * L0, B * L1
    x = curve.grid(2001)
    x = x[np.abs(x) <= min(curve.reach, 50.0)]
    steep = np.abs(curve.slope(x))
    worst = 0.0
    for length in lengths:
        for d in (length / pair[1], -length / pair[1]):
            change = np.abs(curve.slope(x + d) - curve.slope(x))
            worst = max(worst, float((change / ((L0 + L1 * steep) * abs(d))).max()))
    return worst


def safe_factor(curve: Curve, pair: tuple[float, float]) -> float:
    """Returns the largest kappa up to which no step x - kappa f'/(L0 + L1 |f'|) from a place of the grid raises f.

    Source: Su 2020 (kexue.fm/archives/7469) for the claim that every kappa below 2 is safe.
    """
    x = curve.grid(4001)
    x = x[(np.abs(x) <= 30.0) & (np.abs(x) >= 1e-3)]  # nearer to a minimum f no longer changes in float64
    slope, here = curve.slope(x), curve.value(x)
    step = slope / (pair[0] + pair[1] * np.abs(slope))
    for kappa in FACTORS:
        if (curve.value(x - kappa * step) > here + 1e-12 * np.abs(here)).any():
            return float(kappa - (FACTORS[1] - FACTORS[0]))
    return math.inf
