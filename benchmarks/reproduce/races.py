"""Fixed rates against clipped descent: steps from a gradient M down to the tolerance, and the bounds of 2019 for them.

Both methods search the same number of settings. A setting counts by its slowest start: the starts lie between the
minimum and the place where the gradient is M, so no setting wins because one start happens to land on the minimum.
"""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from curves import CURVES, Array, Function
from experiment import ROOT

sys.path.insert(1, str(ROOT / "docs"))

from lower_bound import TOLERANCE, flat_steps, steep

STARTS = np.arange(1, 9) / 8
"""Starts, relative to the place where the gradient is M."""
LARGEST_RATE = 100.0
FEW = 10_000
"""Steps after which a clipped setting counts as going to and fro for ever; those that arrive need some dozen."""


class Arrival(NamedTuple):
    """Steps from the slowest start down to the tolerance, and the setting that takes them."""

    steps: int
    rate: float
    threshold: float


class NoneArrived(RuntimeError):
    """Every setting of a search is out, or needs too many steps."""


@dataclass(frozen=True)
class Slope:
    """A convex, even function that becomes steeper without end.

    Attributes:
        name: Its name.
        gradient: x -> f'(x).
        start: M -> the place x > 0 where the gradient is M.
        gap: M -> f there minus the minimum of f.
        frontier: L1 -> the smallest L0 that goes with it.
        slopes: The values of L1 among which a bound takes the best.
        grows: What the steps of the best settings grow like for a fixed rate and for clipped descent, as functions of M
            and in words.
    """

    name: str
    gradient: Function
    start: Callable[[float], float]
    gap: Callable[[float], float]
    frontier: Callable[[float], float]
    slopes: Array
    grows: tuple[tuple[str, Callable[[float], float]], tuple[str, Callable[[float], float]]]

    def pairs(self) -> list[tuple[float, float]]:
        return [(self.frontier(L1), float(L1)) for L1 in self.slopes]


def _power(n: int) -> Slope:
    fixed, clipped = (n - 2) / (n - 1), (n - 2) / (n - 1) ** 2
    return Slope(
        f"|x|^{n}",
        gradient=lambda x: n * np.sign(x) * np.abs(x) ** (n - 1),
        start=lambda bound: (bound / n) ** (1 / (n - 1)),
        gap=lambda bound: (bound / n) ** (n / (n - 1)),
        frontier=CURVES[f"x^{n}"].frontier,
        slopes=np.geomspace(1e-4, 1e2, 121),
        grows=((f"M^{fixed:.3g}", lambda bound: bound**fixed), (f"M^{clipped:.3g}", lambda bound: bound**clipped)),
    )


SLOPES = {
    slope.name: slope
    for slope in (
        Slope(
            "hybrid",
            gradient=steep,
            start=lambda bound: 1 + math.log(bound),
            gap=lambda bound: bound - 0.5,
            frontier=CURVES["hybrid"].frontier,
            slopes=np.ones(1),
            grows=(
                ("M / (1 + log M)", lambda bound: bound / (1 + math.log(bound))),
                ("1 + log M", lambda bound: 1 + math.log(bound)),
            ),
        ),
        _power(3),
        _power(4),
    )
}


def rate_of_fixed(pair: tuple[float, float], bound: float) -> float:
    """Returns the rate of Theorem 6 of Zhang et al., 1 / (2 (L0 + L1 M))."""
    return 1 / (2 * (pair[0] + pair[1] * bound))


def bound_of_fixed(pair: tuple[float, float], bound: float, gap: float) -> float:
    """Returns the most steps that Theorem 6 allows, 4 (L0 + L1 M) gap / tolerance^2."""
    return 4 * (pair[0] + pair[1] * bound) * gap / TOLERANCE**2


def setting_of_clipped(pair: tuple[float, float]) -> tuple[float, float]:
    """Returns rate and threshold of Theorem 3: rate 1/(10 L0), longest step min{1, 1/(10 L1)}."""
    rate = 1 / (10 * pair[0])
    return rate, min(1.0, 1 / (10 * pair[1])) / rate


def bound_of_clipped(pair: tuple[float, float], gap: float) -> float:
    """Returns the most steps that Theorem 3 allows, 20 L0 gap / tolerance^2 + 20 max{1, L1^2} gap / L0."""
    L0, L1 = pair
    return 20 * L0 * gap / TOLERANCE**2 + 20 * max(1.0, L1**2) * gap / L0


def least_of_fixed(bound: float, gap: float) -> float:
    """Returns the fewest steps that any one fixed rate needs on the worse of two functions with L0 = L1 = 1.

    From a gradient M on the hybrid function, where x = 1 + log M, a rate h diverges if h M > 2 x. On the flat function
    each step outside of [-1, 1] gains 4 h tolerance^2, and only 5/4 tolerance of the gap lies inside. Theorem 4 of
    Zhang et al. has the same leading term.
    """
    return bound * (gap - 1.25 * TOLERANCE) / (8 * TOLERANCE**2 * (1 + math.log(bound)))


def fastest(gradient: Function, starts: Array, rates: Array, thresholds: Array, most: int = 3_000_000) -> Arrival:
    """Returns the setting whose slowest start is the first to arrive.

    A setting is out if a start of it leaves the range of the starts: on a convex, even function a fixed rate never
    comes back from there, and a clipped step that is as long as that goes to and fro.

    Raises:
        NoneArrived: If no setting arrives within ``most`` steps.
    """
    of = np.repeat(np.arange(len(rates)), len(starts))
    x = np.tile(starts, len(rates))
    rate, threshold = rates[of], thresholds[of]
    waiting, out = np.full(len(rates), len(starts)), np.zeros(len(rates), dtype=bool)
    for taken in range(most):
        g = gradient(x)
        size = np.abs(g)
        arrived = size <= TOLERANCE
        if arrived.any():
            waiting -= np.bincount(of[arrived], minlength=len(rates))
            if (done := np.flatnonzero((waiting == 0) & ~out)).size:
                return Arrival(taken, float(rates[done[0]]), float(thresholds[done[0]]))
        x = x - rate * g * np.minimum(1.0, threshold / np.maximum(size, TOLERANCE))
        gone = np.abs(x) > starts.max()
        if arrived.any() or gone.any():
            out[of[gone & ~arrived]] = True
            left = ~arrived & ~out[of]
            x, of, rate, threshold = x[left], of[left], rate[left], threshold[left]
        if not x.size:
            break
    raise NoneArrived(f"None of {len(rates)} settings arrived within {most:,} steps.")


def fixed_settings(low: float, high: float, number: int) -> tuple[Array, Array]:
    """Returns rates, and thresholds that never clip."""
    return np.geomspace(low, high, number), np.full(number, math.inf)


def clipped_settings(rates: tuple[float, float], thresholds: tuple[float, float], number: int) -> tuple[Array, Array]:
    """Returns a square grid of at most ``number`` rates and thresholds."""
    side = math.isqrt(number)
    return np.repeat(np.geomspace(*rates, side), side), np.tile(np.geomspace(*thresholds, side), side)


def around(value: float, low: float, high: float, number: int) -> tuple[float, float]:
    """Returns the neighbours of a value among ``number`` values from low to high, equally spaced in the logarithm."""
    factor = (high / low) ** (1 / (number - 1))
    return value / factor, value * factor


def race(slope: Slope, bound: float, number: int) -> Mapping[str, Any]:
    """Returns the steps of both methods from a gradient of ``bound``.

    Each method tries half of ``number`` settings over the whole range and half between the neighbours of the best.
    """
    gap, starts, half = slope.gap(bound), slope.start(bound) * STARTS, number // 2
    fixed_pair = min(slope.pairs(), key=lambda pair: bound_of_fixed(pair, bound, gap))
    clipped_pair = min(slope.pairs(), key=lambda pair: bound_of_clipped(pair, gap))
    whole = rate_of_fixed(fixed_pair, bound), LARGEST_RATE
    norms = 2 * TOLERANCE, bound

    first = fastest(slope.gradient, starts, *fixed_settings(*whole, half))
    near = around(first.rate, *whole, half)
    fixed = min(first, fastest(slope.gradient, starts, *fixed_settings(*near, half)))
    lucky = fastest(slope.gradient, starts[-1:], *fixed_settings(*whole, half))
    slow = fastest(slope.gradient, starts[-1:], *fixed_settings(whole[0], whole[0], 1))

    first = fastest(slope.gradient, starts, *clipped_settings(whole, norms, half))
    side = math.isqrt(half)
    near, clips = around(first.rate, *whole, side), around(first.threshold, *norms, side)
    clipped = min(first, fastest(slope.gradient, starts, *clipped_settings(near, clips, half)))
    rate, threshold = setting_of_clipped(clipped_pair)
    slow_clipped = fastest(slope.gradient, starts[-1:], np.array([rate]), np.array([threshold]))
    return {
        "bound": bound,
        "gap": gap,
        "fixed": fixed.steps,
        "fixed_rate": fixed.rate,
        "fixed_from_one_start": lucky.steps,
        "fixed_by_theorem": slow.steps,
        "fixed_at_most": bound_of_fixed(fixed_pair, bound, gap),
        "clipped": clipped.steps,
        "clipped_rate": clipped.rate,
        "clipped_threshold": clipped.threshold,
        "clipped_by_theorem": slow_clipped.steps,
        "clipped_at_most": bound_of_clipped(clipped_pair, gap),
    }


def dilemma(bound: float, number: int) -> Mapping[str, Any]:
    """Returns the steps of both methods where one setting has to serve the hybrid and the flat function.

    Both functions have the gap of the hybrid one, so they belong to one class: L0 = L1 = 1, M and gap.
    """
    hybrid = SLOPES["hybrid"]
    gap, starts = hybrid.gap(bound), hybrid.start(bound) * STARTS
    lowest = rate_of_fixed((1.0, 1.0), bound)

    def serves(rate: float, threshold: float, most: int) -> bool:
        try:
            fastest(hybrid.gradient, starts, np.array([rate]), np.array([threshold]), most)
        except NoneArrived:
            return False
        return True

    # On the flat function the larger rate is always the faster one, so the best is the largest that serves the other.
    most = 100 * int(bound)  # the rate of Theorem 6 needs 12 times M
    rates = np.geomspace(LARGEST_RATE, lowest, number).tolist()
    fixed = next(rate for rate in rates if serves(rate, math.inf, most))
    pairs = np.stack(clipped_settings((lowest, LARGEST_RATE), (2 * TOLERANCE, bound), number), axis=1)
    grid = sorted(((float(rate), float(threshold)) for rate, threshold in pairs if rate < 2), reverse=True)
    rate, threshold = next(setting for setting in grid if serves(*setting, FEW))
    return {
        "bound": bound,
        "gap": gap,
        "fixed": flat_steps(fixed, gap),
        "fixed_rate": fixed,
        "fixed_at_least": least_of_fixed(bound, gap),
        "fixed_at_most": bound_of_fixed((1.0, 1.0), bound, gap),
        "clipped": flat_steps(rate, gap),
        "clipped_rate": rate,
        "clipped_threshold": threshold,
        "clipped_at_most": bound_of_clipped((1.0, 1.0), gap),
    }
