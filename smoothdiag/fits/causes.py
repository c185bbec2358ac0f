"""Null tests of common causes: batch, learning rate, or something short-lived that moves both axes at once."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import t

from smoothdiag.fits.affine import Line, pinball, quantile_line, relative_weights
from smoothdiag.fits.artefacts import MIN_POINTS, MIN_RATE_SPREAD, ON_THE_LINE
from smoothdiag.fits.base import Array, Flag
from smoothdiag.fits.correlations import (
    MIN_BLOCK,
    MIN_CORRELATION,
    MIN_DECADES,
    TIED_TO_TIME,
    TIME_BLOCKS,
    Correlations,
    decades,
    rank_correlations,
    within_blocks,
)
from smoothdiag.fits.decision import FOR_THE_LAW, is_of_autoclip
from smoothdiag.fits.errors import MIN_KNOWN
from smoothdiag.fits.intervals import dependence
from smoothdiag.fits.rows import Indices, Rows, ordered_blocks
from smoothdiag.fits.verdict import FLAT, MIN_GAIN, STRAIGHT, rises

MAX_OF_BATCH = 0.25  # Part of the correlation that the batches may account for at most.
FEWEST_CLASSES = 3
NARROWED = 0.8  # The range within rates is short only if it is also shorter by this factor than the range of all rows.
MIN_BY_RATE = 0.5  # Rank correlation of gradient norm and rate from which the rate can have made the range.
FIRST_SIZE = 4  # Rows of the shortest blocks whose means are compared; further sizes are twice as long.
BY_CHANCE = 0.01  # Share of laws whose slope between blocks may look smaller by chance, for all sizes together.
WORST_FLOOR = 30.0  # Ten times the usual distance from the noise floor: floors are trusted within a factor of ten.


def step_batch(rows: Rows, line: Line) -> Flag | None:
    """Whether the batches may have made the relation, because every row was measured on a batch of its own.

    A hard batch has both a large gradient and a large curvature. Let s be the share of the variance of log ||g|| that
    is due to the batches. The covariance of their part with the logarithm of the smoothness is at most sqrt(s) times
    the product of both deviations (Cauchy-Schwarz), so they explain at most a correlation of sqrt(s). To first order
    s is at most the mean of `grad_variance` / ||g||^2 over the variance of log ||g||: the variance of a norm cannot
    exceed the variance of the gradient, summed over all coordinates. So rows with a known `grad_variance` pass if
    sqrt(s) is at most `MAX_OF_BATCH` of the correlation that they show.
    """
    if rows.data != "step" or rises(line, (float(np.min(rows.x)), float(np.max(rows.x)))) < FLAT:
        return None
    known = np.isfinite(rows.grad_variance) & (rows.grad_variance >= 0)
    evidence = "the rows do not say how much gradients differ from batch to batch (`grad_variance`)"
    if np.mean(known) >= MIN_KNOWN:
        log_x, log_y = np.log(rows.x), np.log(rows.y)
        spread = float(np.std(log_x) * np.std(log_y))
        shown = float(np.mean((log_x - np.mean(log_x)) * (log_y - np.mean(log_y)))) / spread if spread > 0 else 0.0
        # The recorded square holds the variance, too; where nothing is left without it, the norm is all batch.
        square = np.maximum(rows.x**2 - rows.grad_variance, 1e-9 * rows.x**2)[known]
        share = float(np.mean(rows.grad_variance[known] / square)) / max(float(np.var(log_x)), 1e-18)
        if math.sqrt(share) <= MAX_OF_BATCH * shown:
            return None
        evidence = (
            f"the variance of the gradients allows the batches a correlation of up to {min(math.sqrt(share), 1):.2f}, "
            f"and the rows show one of {shown:.2f}; should be at most {MAX_OF_BATCH:.0%} of it"
        )
    return Flag(
        "step batch",
        "each row was measured on the batch of its own step. A hard batch has both a large gradient and a large "
        "curvature, so the rows can rise together although the curvature depends on the batch alone",
        evidence,
        FOR_THE_LAW
        if is_of_autoclip(rows)
        else 'measure all rows on the same data: Probe(data="fixed"), its default, or probe_batches=...',
        blocking=True,
    )


def rate(rows: Rows, raw: float, line: Line) -> Flag | None:
    """Whether the relation, or the range of gradient norms, is gone among rows of nearly the same learning rate.

    A short range within rates does no harm if smoothness follows the line there as it does over all rates. A rate that
    moves both axes by itself would have to hit the slope that holds at one rate.

    Args:
        rows: the rows of the fit.
        raw: rank correlation of all rows.
        line: the fitted line.
    """
    known = np.isfinite(rows.lr) & (rows.lr > 0)
    if known.sum() < MIN_POINTS or not raw >= MIN_CORRELATION:
        return None
    x, y, log_rate = rows.x[known], rows.y[known], np.log(rows.lr[known])
    if np.std(log_rate) < MIN_RATE_SPREAD:
        return None
    classes = _rate_classes(log_rate, rows.run[known])
    if not classes:
        return None
    remedy = (
        "repeat at one rate, or at several rates with a decade of gradient norms at each. A scan of one checkpoint "
        "(sd.scan) changes the gradient norm without any rate"
    )
    found = Correlations(raw, math.nan, *within_blocks(x, y, classes))
    if found.gone_within:
        return Flag(
            "rate",
            "gradient norm and smoothness move together when the learning rate changes, and hardly among rows of one "
            "rate, so the rate may be the cause of both",
            f"rank correlation {raw:.2f}; {found.within:.2f} within {len(classes)} classes of rates; "
            f"{found.within_given_time:.2f} with the trend inside the classes taken out",
            remedy,
            blocking=True,
        )
    log_x = np.log10(x)
    inside = np.concatenate([log_x[rows_of] - np.mean(log_x[rows_of]) for rows_of in classes])
    low, high = np.quantile(inside, [0.025, 0.975])
    within, whole = float(high - low), decades(x)
    by_rate = abs(rank_correlations(x, log_rate, rows.step[known])[0])
    if within >= min(MIN_DECADES, NARROWED * whole) or not by_rate >= MIN_BY_RATE:
        return None
    if _follows(line, x, y, classes):
        return None
    # A rate that moves smoothly in one direction is another name for time, which has tests of its own.
    tied = abs(rank_correlations(log_rate, rows.step[known], rows.step[known])[0]) > TIED_TO_TIME
    if tied and len(np.unique(log_rate)) > len(x) / 2:
        return None
    return Flag(
        "rate",
        "gradient norms vary enough only because the learning rate changed. The rate may be the cause of both axes, "
        "and at one rate the norms vary too little to tell L0 from L1",
        f"{within:.2f} powers of ten within {len(classes)} classes of rates, should be at least {MIN_DECADES:g}; "
        f"{whole:.2f} over all rows; rank correlation of gradient norm and rate {by_rate:.2f}",
        remedy,
        blocking=True,
    )


def _follows(line: Line, x: Array, y: Array, classes: list[Indices]) -> bool:
    """Whether smoothness follows the line within classes: its slope in units of the line lies within `STRAIGHT`."""
    height = line(x)
    if not (height > 0).all():
        return False
    a, b = np.concatenate(
        [part - np.mean(part, axis=1, keepdims=True) for part in (np.log([height[i], y[i]]) for i in classes)], axis=1
    )
    freedom = len(a) - len(classes) - 1
    if freedom < 1 or not float(a @ a) > 0:
        return False
    slope, error = _regressed(a, b, freedom)
    reach = float(t.isf(0.05, freedom)) * error
    return slope - reach > STRAIGHT[0] and slope + reach < STRAIGHT[1]


def _regressed(u: Array, v: Array, freedom: int) -> tuple[float, float]:
    """Slope of v on u, both centred and in order, and its standard error; neighbours may err alike."""
    size = float(u @ u)
    slope = float(u @ v) / size
    score = u * (v - slope * u)
    longer = len(u) / dependence(score).num_effective
    return slope, math.sqrt(float(score @ score) * longer * len(u) / freedom) / size


def _rate_classes(log_rate: Array, run: Array) -> list[Indices]:
    """Rows of one run and of nearly one rate, in order of their rates; empty if most rates occur too seldom."""
    num_classes = TIME_BLOCKS
    while num_classes >= FEWEST_CLASSES:
        place = (log_rate - np.min(log_rate)) / (np.ptp(log_rate) / num_classes)
        code = np.minimum(np.floor(place + ON_THE_LINE), num_classes - 1) + run * num_classes
        order = np.lexsort((log_rate, code))
        classes = np.split(order, np.flatnonzero(np.diff(code[order])) + 1)
        classes = [rows for rows in classes if len(rows) >= MIN_BLOCK]
        if sum(map(len, classes)) >= len(log_rate) / 2:
            return classes
        num_classes //= 2
    return []


class _Scale(NamedTuple):
    """How smoothness follows the line among neighbours, and how the means of blocks of neighbours follow it."""

    size: int
    inside: float
    between: float
    error: float
    upper: float


def short_lived(rows: Rows, line: Line) -> Flag | None:
    """Whether smoothness follows brief changes of the gradient norm and not its level.

    A law of the gradient norm holds for its level as it holds for its changes. Smoothness along the gradient of a
    quadratic depends on ratios of gradient norms alone: twice the weights give twice the gradient and the same
    smoothness. There, a kick that excites stiff directions lifts both axes for a few steps, whatever the level. The
    same is true of any common cause that lasts a few steps.

    So log smoothness is regressed on the logarithm of the line, once inside blocks of neighbouring steps and once
    between the means of these blocks, for blocks of 4, 8, 16 rows and so on while there are `TIME_BLOCKS` of them. A
    law gives the same slope twice. The flag is set if the slope between blocks is below half of the slope inside, and
    the difference is larger than chance makes it.
    """
    if rises(line, (float(np.min(rows.x)), float(np.max(rows.x)))) < FLAT:
        return None
    return _short_lived(line(rows.x), rows.y, rows.step, rows.run, "gradient norm")


def short_lived_loss(rows: Rows, heights: Array, known: npt.NDArray[np.bool_]) -> Flag | None:
    """As `short_lived`, for the model of the loss gap; it has a height for each of the rows `known`."""
    return _short_lived(heights, rows.y[known], rows.step[known], rows.run[known], "loss")


def _short_lived(heights: Array, y: Array, step: Array, run: Array, name: str) -> Flag | None:
    sizes = [FIRST_SIZE]
    while len(y) >= 2 * sizes[-1] * TIME_BLOCKS:
        sizes.append(2 * sizes[-1])
    if len(y) < FIRST_SIZE * TIME_BLOCKS or not (heights > 0).all():
        return None
    pairs = np.log(np.stack([heights, y]))
    found = [_at_scale(pairs, step, run, size, BY_CHANCE / len(sizes)) for size in sizes]
    gone = [scale for scale in found if scale.between < scale.inside / 2 and scale.upper < scale.inside]
    if not gone:
        return None
    worst = min(gone, key=lambda scale: scale.upper / scale.inside)
    return Flag(
        "short lived",
        f"smoothness follows brief changes of the {name} and not its level. Kicks that turn the gradient into stiff "
        "directions do this on a quadratic, and so does any cause that moves both axes for a few steps",
        f"in units of the fitted model, smoothness rises by {worst.inside:.2f} inside blocks of {worst.size} rows, and "
        f"by {worst.between:.2f} +- {worst.error:.2f} from block to block; a law gives the same number twice",
        "measure the largest curvature (HessianNorm), which depends on no direction",
        blocking=True,
    )


def _at_scale(pairs: Array, step: Array, runs: Array, size: int, by_chance: float) -> _Scale:
    order, sizes = ordered_blocks(step, runs, len(step) // size)
    begins, inner = np.cumsum(sizes) - sizes, pairs[:, order]
    means = np.add.reduceat(inner, begins, axis=1) / sizes
    a, b = inner - np.repeat(means, sizes, axis=1)
    inside = float(a @ b) / max(float(a @ a), 1e-18)
    means, run = means.T, runs[order[begins]]
    rest, freedom = [], len(sizes) - 1
    for number in np.unique(run):  # A drift over the run is no matter of this test: its trend is taken out.
        part = means[run == number]
        time = np.vander(np.arange(len(part)), min(2, len(part)))
        rest.append(part - time @ np.linalg.lstsq(time, part, rcond=None)[0])
        freedom -= time.shape[1]
    u, v = np.concatenate(rest).T
    if freedom < 1 or not float(u @ u) > 1e-18 * len(u):
        return _Scale(size, inside, math.nan, math.inf, math.inf)
    slope, error = _regressed(u, v, freedom)
    return _Scale(size, inside, slope, error, slope + float(t.isf(by_chance, freedom)) * error)


def proportional_noise(rows: Rows, line: Line, quantile: float) -> Flag | None:
    """Whether a noise floor that was recorded too low would explain why smoothness rises.

    If the floor is k times too low, noise gives a line in the floor, with a slope of k. The flag is set if such a line
    describes the rows as well as the line in the gradient norm, with a k that floors may well be wrong by. Rounding
    grows with the gradient, so at equal radius the two lines are one; only the size of k can then clear the rows.
    """
    known = np.isfinite(rows.noise_floor) & (rows.noise_floor > 0)
    if known.sum() < MIN_POINTS or np.mean(known) < MIN_KNOWN:
        return None
    x, y, floor = rows.x[known], rows.y[known], rows.noise_floor[known]
    if rises(line, (float(np.min(x)), float(np.max(x)))) < FLAT:
        return None
    weights = relative_weights(x, y)
    own = float(weights @ pinball(y - line(x), quantile))
    noise = quantile_line(floor, y, quantile, weights)
    other = float(weights @ pinball(y - noise(floor), quantile))
    bounds = float(np.min(floor)), float(np.max(floor))
    if not noise.slope <= WORST_FLOOR or other * (1 - MIN_GAIN) > own or rises(noise, bounds) < FLAT:
        return None
    return Flag(
        "proportional noise",
        "smoothness rises in proportion to its own noise floor, as noise does if the floor was recorded too low",
        f"a line of slope {noise.slope:.2g} in the noise floor describes the rows as well as the line in the gradient "
        f"norm; the slope should be above {WORST_FLOOR:g}",
        "probe at a larger radius or in higher precision, where curvature stands far above the noise",
        blocking=True,
    )
