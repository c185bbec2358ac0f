"""The rival that uses the loss: smoothness = H0 + H1 (f - f*)^rho, with f* profiled below the smallest loss.

Rows hardly tell f* from the exponent: a lower f* with a larger exponent bends the curve in the same way. So the score
of every f* on the grid is kept, to show what depends on f*.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from smoothdiag.fits.affine import Line, pinball, quantile_line
from smoothdiag.fits.base import Array, Flag, Interval, ModelScore
from smoothdiag.fits.models import (
    EXACT,
    MIN_ROWS,
    Curve,
    averages,
    fit_affine,
    fit_constant,
    rolling,
    rolling_curve,
    saving,
    score,
    searched,
)
from smoothdiag.fits.models import compare as compare_curves
from smoothdiag.fits.resamples import Counts

NAME = "loss gap"
# Distance of f* from the smallest loss, in units of how far the median loss lies above the smallest.
DISTANCES = (0.001, 0.03, 0.1, 0.3, 1.0, 3.0)
EXPONENTS = (
    0.25,
    0.5,
    0.75,
    1.0,
    1.25,
    1.5,
    2.0,
)  # From 2 on the law is no longer weaker than the law of Hessian norms.
LARGEST = 1e100  # Larger losses count as unknown, and differences below 1/LARGEST as zero: their powers overflow.
LARGEST_RATIO = 1e70  # Largest over median distance from the smallest loss; its square is still a float.
LOWEST_HEIGHT = 1e-6  # Smallest height that a row is divided by, as a share of the median height.


Mask = npt.NDArray[np.bool_]


class GapCurve(NamedTuple):
    """The model smoothness = intercept + coefficient * (loss - floor) ** exponent."""

    intercept: float
    coefficient: float
    exponent: float
    floor: float

    def __call__(self, loss: Array) -> Array:
        """Height at the losses `loss`."""
        return np.asarray(self.intercept + self.coefficient * (loss - self.floor) ** self.exponent)


@dataclass(frozen=True)
class LossGap:
    """The loss gap beside the models of the gradient norm, on the rows that have a loss.

    Attributes:
        score: score of the loss gap with f* and the exponent chosen on the past of each block.
        floors: one score for each f* on the grid, the closest first.
        best_curve: smallest later loss among the line, the power and the monotone function.
        beyond: share of the loss gap's later loss that a further line in the gradient norm removes.
        beyond_interval: interval of `beyond`.
        gap: distance of each row's loss from the f* chosen on all rows, in order of steps.
        known: rows that have a loss.
        time: flag that says why the rows cannot tell the loss from time or from a short-lived cause; None if they can.
    """

    score: ModelScore
    floors: tuple[ModelScore, ...]
    best_curve: float
    beyond: float
    beyond_interval: Interval
    gap: Array
    known: Mask
    time: Flag | None = None


def compare(
    x: Array,
    y: Array,
    weights: Array,
    quantile: float,
    counts: Counts,
    loss: Array,
    scores: tuple[ModelScore, ...],
) -> LossGap | None:
    """The loss gap on later steps.

    None if fewer than `MIN_ROWS` rows have a loss, if most rows have the smallest loss, or if one loss is
    absurdly large.

    Args:
        x: gradient norms in order of steps.
        y: smoothness.
        weights: weight of each row.
        quantile: level of the model.
        counts: resamples of the rows.
        loss: loss of each row; NaN if it is not known.
        scores: scores of the models of the gradient norm on all rows.
    """
    known: Mask = np.abs(loss) < LARGEST  # False for NaN too
    if np.sum(known) < MIN_ROWS or not np.median(loss[known]) - np.min(loss[known]) > 1 / LARGEST:
        return None
    if np.ptp(loss[known]) > LARGEST_RATIO * (np.median(loss[known]) - np.min(loss[known])):
        return None
    if not known.all():
        x, y, weights, counts, loss = x[known], y[known], weights[known], counts[:, known], loss[known]
        scores = compare_curves(x, y, weights, quantile, counts)
    low = float(np.min(loss))
    floors = [low - distance * float(np.median(loss) - low) for distance in DISTANCES]
    fits: dict[int, list[tuple[GapCurve, float]]] = {}

    def fitted(past: slice) -> list[tuple[GapCurve, float]]:
        """The best curve for every floor, with its loss on the past; each past is fitted once."""
        if past.stop not in fits:
            fits[past.stop] = [_fit(loss[past], y[past], weights[past], quantile, floor) for floor in floors]
        return fits[past.stop]

    def at(number: int) -> Callable[[slice], Callable[[slice], Array]]:
        return lambda past: lambda rows: fitted(past)[number][0](loss[rows])

    def chosen(past: slice) -> GapCurve:
        least = min(found for _, found in fitted(past))
        # With an exponent of 1 every f* gives the same line. The closest f* is taken, so that rounding does not choose.
        return next(curve for curve, found in fitted(past) if found <= least * (1 + EXACT))

    everything = slice(0, len(y))
    best = chosen(everything)
    later = {
        "constant": rolling_curve(fit_constant, x, y, weights, quantile),
        "affine": rolling_curve(fit_affine, x, y, weights, quantile),
        NAME: rolling(lambda past: lambda rows: chosen(past)(loss[rows]), y, weights, quantile),
    }
    later |= {str(number): rolling(at(number), y, weights, quantile) for number in range(len(floors))}
    later |= _beyond(x, y, weights, quantile, lambda past: chosen(past)(loss))
    means = averages(later, counts)

    def scored(curve: GapCurve, name: str) -> ModelScore:
        mean = float(np.mean(weights * pinball(y - curve(loss), quantile)))
        return score(NAME, curve, mean, means[name], means["constant"], means["affine"])

    share, interval = saving(means["times a line"], means["times a constant"])
    return LossGap(
        score=scored(best, NAME),
        floors=tuple(scored(curve, str(number)) for number, (curve, _) in enumerate(fitted(everything))),
        best_curve=min(one.later_loss for one in scores if one.name != "constant"),
        beyond=share,
        beyond_interval=interval,
        gap=loss - best.floor,
        known=known,
    )


def _fit(loss: Array, y: Array, weights: Array, quantile: float, floor: float) -> tuple[GapCurve, float]:
    """The curve with the best exponent for one f*, and its loss; of many rows some choose the exponent."""
    gap = loss - floor
    unit = float(np.median(gap))
    some = searched(len(gap))
    best, least = _best_power(gap[some] / unit, y[some], weights[some], quantile)
    if not isinstance(some, slice):
        z = (gap / unit) ** best.exponent
        line = quantile_line(z, y, quantile, weights, start=Line(best.intercept, best.coefficient))
        best, least = (
            best._replace(intercept=line.intercept, coefficient=line.slope),
            _loss(line, z, y, weights, quantile),
        )
    return GapCurve(best.intercept, best.coefficient / unit**best.exponent, best.exponent, floor), least


def _best_power(gap: Array, y: Array, weights: Array, quantile: float) -> tuple[Curve, float]:
    start = Line(float(np.median(y)), 0.0)
    best, least = Curve(0.0, 0.0, 0.0), np.inf
    for exponent in EXPONENTS:
        z = gap**exponent
        line = quantile_line(z, y, quantile, weights, start=start)
        found = _loss(line, z, y, weights, quantile)
        if found < least * (1 - EXACT):
            best, least = Curve(line.intercept, line.slope, exponent), found
    return best, least


def _loss(line: Line, z: Array, y: Array, weights: Array, quantile: float) -> float:
    return float(weights @ pinball(y - line(z), quantile))


def _beyond(
    x: Array, y: Array, weights: Array, quantile: float, heights_from: Callable[[slice], Array]
) -> dict[str, Array]:
    """Later losses of the loss gap times a constant, and times a line in the gradient norm."""

    def times(line: bool) -> Callable[[slice], Callable[[slice], Array]]:
        def fit(past: slice) -> Callable[[slice], Array]:
            heights = heights_from(past)
            heights = np.maximum(heights, LOWEST_HEIGHT * np.median(heights[past]))
            fitter = fit_affine if line else fit_constant
            curve = fitter(x[past], y[past] / heights[past], weights[past] * heights[past], quantile)
            return lambda rows: heights[rows] * curve(x[rows])

        return fit

    kinds = {"times a constant": False, "times a line": True}
    return {name: rolling(times(line), y, weights, quantile) for name, line in kinds.items()}
