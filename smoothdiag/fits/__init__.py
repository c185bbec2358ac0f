"""Fits of the (L0, L1) law: constants with intervals, rival models, null tests and a verdict. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral, Real
from typing import Any

import numpy as np
import pandas as pd

from smoothdiag.fits import (
    affine,
    artefacts,
    causes,
    checks,
    errors,
    hessian,
    hull,
    intervals,
    lossgap,
    models,
    scans,
    surrogates,
)
from smoothdiag.fits.base import Array, Flag, HessianCheck, Interval, ModelScore, SmoothnessFit, Verdict
from smoothdiag.fits.correlations import correlate, decades, loglog_slope
from smoothdiag.fits.exponent import NOT_FOUND, exponent_interval
from smoothdiag.fits.groups import GroupFits, compare_runs, fit_each, headline
from smoothdiag.fits.lines import QuantileFit, Scale, quantile_fit
from smoothdiag.fits.rows import (
    HasFrame,
    Rows,
    as_frame,
    clip_mode_of,
    companion,
    dampening_of,
    follows_gradients,
    momentum_of,
    optimizer_of,
    select_rows,
)
from smoothdiag.fits.verdict import decide
from smoothdiag.fits.wording import Headline

__all__ = [
    "Flag",
    "GroupFits",
    "Headline",
    "ModelScore",
    "SmoothnessFit",
    "Verdict",
    "compare_runs",
    "fit_groups",
    "fit_smoothness",
    "headline",
]

PATH = (0.5, 0.9, 0.95, 0.99)
NUM_KEPT = 200  # Bootstrap replicates that a fit keeps, for intervals of quantities that depend on both L0 and L1.


def fit_smoothness(
    data: HasFrame | pd.DataFrame | Sequence[HasFrame | pd.DataFrame],
    *,
    estimator: str | None = None,
    group: str = "all",
    quantile: float = 0.95,
    num_boot: int = 400,
    seed: int = 0,
) -> SmoothnessFit:
    """Fits smoothness <= L0 + L1 * grad_norm to a trace and says whether the law holds there.

    Args:
        data: a trace, or a table with at least the columns `grad_norm` and `smoothness`. Without a column `step`, rows
            count as in order of time. For several runs of one training (such as seeds) pass a list of traces or tables,
            or a table with a column `run`. Models are then scored on later steps of all runs, and the intervals say
            what another run may give, as far as these runs can tell. Rows of a resumed run that are about other fixed
            batches (column `data_step`) count as a run of their own. The trace of a scan (`sd.scan`) is fitted in
            another way: lines out of the checkpoint, and not steps, are resampled and left out to score the models,
            distance takes the place of time, and the distance from the start is a further rival.
        estimator: name of the estimator whose rows to fit. None prefers "local", then "path", then "hessian_norm", then
            the only one present, and "hessian_norm" first in a scan; variants (other directions, preconditioned,
            debiased) do not count. Rows of "local_random" beside "local" test whether the direction of the gradient
            makes the relation, and rows of "hessian_norm" beside "local" or "path" test the law on ||H||.
        group: parameter group to fit.
        quantile: share of the rows that should lie below the line, in (0, 1). The rows beyond the line must carry the
            information of four independent ones, which takes 80 independent rows at .95, and 400 at .99.
        num_boot: number of bootstrap resamples for the intervals.
        seed: seed of the resampling; the same seed gives the same fit.

    Returns:
        SmoothnessFit: constants, intervals, rival models, flags and verdict.

    Raises:
        ValueError: if a parameter is out of range, if no row is usable, or if `data` is not a table, mixes estimators
            or kinds of data, or covers more than 70 powers of ten.

    Units: L0 in units of smoothness [f/x^2], L1 in [1/x].

    Examples:
        >>> import pandas as pd
        >>> norms = 10 ** torch.arange(200.0).sin().double().numpy()  # between 0.1 and 10
        >>> table = pd.DataFrame({"grad_norm": norms, "smoothness": 1 + 2 * norms, "saturation": 0.1})
        >>> fit = sd.fit_smoothness(table, num_boot=50)
        >>> print(fit.verdict.name, round(fit.L0, 2), round(fit.L1, 2))
        L0L1 1.0 2.0
    """
    if not isinstance(quantile, Real) or not 0 < quantile < 1:
        raise ValueError(f"Parameter `quantile` should be in (0, 1). Found `quantile = {quantile!r}`.")
    for name, value, least in (("num_boot", num_boot, 20), ("seed", seed, 0)):
        if not isinstance(value, Integral) or value < least:
            raise ValueError(
                f"Parameter `{name}` should be a whole number of at least {least}. Found `{name} = {value!r}`."
            )
    frame = as_frame(data)
    if scans.has_lines(frame):
        return scans.fit_lines(frame, estimator, group, quantile, num_boot, seed, PATH)
    recorded = select_rows(frame, estimator, group)
    recorded.check_range()
    rows = recorded.scaled()
    x, y = rows.x, rows.y
    found = quantile_fit(rows, quantile, num_boot, seed)
    line, weights = found.line, found.weights

    comparison = models.compare(x, y, weights, quantile, found.counts)
    gap = lossgap.compare(x, y, weights, quantile, found.counts, rows.loss, comparison)
    if gap is not None:
        drift = checks.loss_and_time(rows, gap.gap, gap.known)
        heights = gap.score.intercept + gap.score.coefficient * gap.gap**gap.score.exponent
        gap = replace(gap, time=drift or causes.short_lived_loss(rows, heights, gap.known))
        comparison = (*comparison, gap.score)
    correlations = correlate(x, y, rows.step, rows.run)
    bounds = np.quantile(x, [0.025, 0.975])
    low, high = float(bounds[0]), float(bounds[1])
    scale = Scale(*recorded.units())
    turned = _direction_test(frame, recorded, found, (low, high), quantile, num_boot, seed)
    hessian_check, contradicted = _hessian_test(frame, recorded, found, (low, high), quantile, num_boot, seed)
    others = (contradicted, turned, surrogates.shuffled(rows, line, quantile, seed), intervals.few_runs(rows.num_runs))
    flags = checks.check(rows, found.memory.num_effective, correlations, line, quantile, weights, others)
    top = x >= math.sqrt(low * high)
    top_slope = loglog_slope(x[top], y[top])
    power = next(score for score in comparison if score.name == "power")
    exponents = NOT_FOUND
    if len(found.replicates):
        exponents = exponent_interval(x, y, weights, quantile, found.counts, power.exponent, found.freedom)
    verdict, reason = decide(
        flags,
        line,
        found.L1_interval,
        comparison,
        (low, high),
        top_slope,
        exponents=exponents,
        hessian=hessian_check,
        estimator=rows.estimator,
        L1_unit=scale.slope(1.0),
        gap=gap,
    )

    known = rows.saturation[~np.isnan(rows.saturation)]
    corners = hull.upper_hull(x, y)
    lines = {f"{q:g}": affine.quantile_line(x, y, q, weights, start=line) for q in PATH}
    lines |= {"hard": affine.hard_envelope(x, y, weights, corners), "mean": affine.least_squares(x, y)}
    height = line(x)
    slopes, intercepts = affine.frontier(corners)
    return SmoothnessFit(
        L0=scale.intercept(line.intercept),
        L1=scale.slope(line.slope),
        L0_interval=(scale.intercept(found.L0_interval[0]), scale.intercept(found.L0_interval[1])),
        L1_interval=(scale.slope(found.L1_interval[0]), scale.slope(found.L1_interval[1])),
        interval_level=intervals.LEVEL,
        quantile=float(quantile),
        num_points=len(x),
        num_effective=found.memory.num_effective,
        block_length=found.memory.block_length,
        decades=decades(x),
        spearman=correlations.raw,
        partial_spearman=correlations.partial,
        loglog_slope=loglog_slope(x, y),
        implied_slope=_implied_slope(line, x),
        coverage=float(np.mean(y <= height * (1 + 1e-9))),
        median_saturation=float(np.median(known)) if len(known) else math.nan,
        lines={name: (scale.intercept(a), scale.slope(b)) for name, (a, b) in lines.items()},
        comparison=tuple(scale.score(score) for score in comparison),
        flags=flags,
        verdict=verdict,
        verdict_reason=reason,
        estimator=rows.estimator,
        group=rows.group,
        data=rows.data,
        dropped=rows.dropped,
        grad_norm_quantiles=tuple(np.quantile(rows.recorded, np.linspace(0, 1, 101)).tolist()),
        corners=tuple((scale.slope(b), scale.intercept(a)) for b, a in zip(slopes, intercepts, strict=True)),
        num_runs=rows.num_runs,
        corrected=scale.correction(errors.correct(rows, line, quantile, seed)),
        loss_floors=() if gap is None else tuple(scale.score(score) for score in gap.floors),
        interval_freedom=found.freedom,
        replicates=tuple((scale.intercept(a), scale.slope(b)) for a, b in found.replicates[:NUM_KEPT].tolist()),
        optimizer=optimizer_of(frame),
        follows_gradients=follows_gradients(frame),
        momentum=momentum_of(frame),
        dampening=dampening_of(frame),
        clip_mode=clip_mode_of(frame),
        first_step=float(np.min(rows.step)),
        exponent_interval=exponents,
        hessian=hessian_check,
        spread=_spread(affine.quantile_line(x, y, 0.5, weights, start=line), x, y),
        row_cost=rows.cost,
    )


def fit_groups(
    data: HasFrame | pd.DataFrame | Sequence[HasFrame | pd.DataFrame],
    *,
    groups: Sequence[str] | None = None,
    **options: Any,
) -> GroupFits:
    """Fits the law to each parameter group of a trace, such as the modules of `Probe(..., group_by=by_module())`.

    Args:
        data: as for `fit_smoothness`.
        groups: the groups to fit, in this order; None takes all groups, "all" first.
        options: passed on to `fit_smoothness`. Without `estimator`, all groups use the one chosen for the first group.

    Returns:
        GroupFits: the fits by group, and for each group whose rows cannot be fitted the reason.

    Raises:
        ValueError: if a group is unknown, or no group can be fitted.

    Examples:
        >>> import pandas as pd
        >>> norms = 10 ** torch.arange(200.0).sin().double().numpy()
        >>> rows = [pd.DataFrame({"group": f"L{k}", "grad_norm": norms, "smoothness": 1 + k * norms}) for k in (1, 2)]
        >>> fits = sd.fit_groups(pd.concat(rows), num_boot=20)
        >>> print(fits.table()[["L0", "L1", "num_points"]].round(2))
                L0   L1  num_points
        group
        L1     1.0  1.0         200
        L2     1.0  2.0         200
    """
    return fit_each(as_frame(data), groups, fit_smoothness, options)


def _implied_slope(line: affine.Line, x: Array) -> float:
    """Least-squares slope of the logarithm of the line's height at the rows; 0 for a flat line, NaN for zero."""
    height = line(x)
    if not (height > 0).all():
        return math.nan
    return loglog_slope(x, height) if line.slope > 0 else 0.0


def _spread(median: affine.Line, x: Array, y: Array) -> float:
    """Standard deviation of log smoothness around the median line; NaN if that line is zero at a row."""
    height = median(x)
    return float(np.std(np.log(y / height))) if (height > 0).all() else math.nan


def _direction_test(
    frame: pd.DataFrame, rows: Rows, found: QuantileFit, bounds: Interval, quantile: float, num_boot: int, seed: int
) -> Flag | None:
    """Fits the law to rows of random directions, if enough of them stand beside local rows, and compares."""
    other = _beside(frame, "local_random", rows) if rows.estimator == "local" else None
    if other is None:
        return None
    beside = quantile_fit(other, quantile, num_boot, seed)
    return checks.direction(found.line, found.L1_interval, beside.line, beside.L1_interval, bounds)


def _hessian_test(
    frame: pd.DataFrame, rows: Rows, found: QuantileFit, bounds: Interval, quantile: float, num_boot: int, seed: int
) -> tuple[HessianCheck | None, Flag | None]:
    """Tests the line on the Hessian norms that stand beside its rows; both None without any."""
    other = _beside(frame, hessian.NAME, rows, 1) if hessian.applies_to(rows.estimator) else None
    if other is None:
        return None, None
    beside = quantile_fit(other, quantile, num_boot, seed)
    scale = Scale(*rows.units())
    check, flag = hessian.check(
        other, beside.L1_interval, beside.counts, found.line, found.L1_interval, bounds, quantile, scale.intercept
    )
    slopes = scale.slope(beside.L1_interval[0]), scale.slope(beside.L1_interval[1])
    return replace(check, slope_interval=slopes), flag


def _beside(frame: pd.DataFrame, estimator: str, rows: Rows, least: int = artefacts.MIN_POINTS) -> Rows | None:
    """Rows of another estimator in the units of the fit; None if there are too few or a float cannot hold them."""
    other = companion(frame, estimator, rows)
    if other is None or len(other.x) < least:
        return None
    try:
        other.check_range(like=rows)
    except ValueError:
        return None
    return other.scaled(like=rows)
