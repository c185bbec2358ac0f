"""Fits of the (L0, L1) law: constants with intervals, rivals, null tests and a verdict. Numbers only, no torch."""

from __future__ import annotations

import math
from collections import Counter
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

from smoothdiag.fits import affine, checks, intervals, models
from smoothdiag.fits.base import USABLE_STATUSES, Array, Flag, ModelScore, SmoothnessFit, Verdict
from smoothdiag.fits.checks import Rows

__all__ = ["USABLE_STATUSES", "Flag", "ModelScore", "SmoothnessFit", "Verdict", "fit_smoothness"]

Labels = npt.NDArray[np.object_]

# Preference when the caller names no estimator: the first does not depend on the length of the step taken.
PREFERRED = ("local", "path")
PATH = (0.5, 0.9, 0.95, 0.99)


class HasFrame(Protocol):
    """Anything that turns into a table, such as a `Trace`."""

    def to_frame(self) -> pd.DataFrame:
        """One row per step, estimator and group."""
        ...


def fit_smoothness(
    data: HasFrame | pd.DataFrame,
    *,
    estimator: str | None = None,
    group: str = "all",
    quantile: float = 0.95,
    num_boot: int = 400,
    seed: int = 0,
) -> SmoothnessFit:
    """Fits smoothness <= L0 + L1 * grad_norm to a trace and says whether the law holds there.

    Args:
        data: a trace, or a table with at least the columns `grad_norm` and `smoothness`; without a column `step`
            the order of the rows is time.
        estimator: whose rows to fit; None prefers "local", then "path", then the only one present.
        group: parameter group to fit.
        quantile: share of the rows that should lie below the line, in (0, 1).
        num_boot: bootstrap resamples behind the intervals.
        seed: of the resampling; the same seed gives the same fit.

    Returns:
        SmoothnessFit: constants, intervals, rivals, flags and verdict.

    Raises:
        ValueError: for parameters out of range, for rows that must not be mixed, and where no row is usable.

    Units: L0 in units of smoothness [f/x^2], L1 in [1/x].
    """
    if not 0 < quantile < 1:
        raise ValueError(f"Parameter `quantile` should be in (0, 1). Found `quantile = {quantile}`.")
    if not num_boot >= 20:
        raise ValueError(f"Parameter `num_boot` should be at least 20. Found `num_boot = {num_boot}`.")
    rows = _select_rows(data, estimator, group)
    x, y = rows.x, rows.y
    weights = affine.relative_weights(x, y)
    line = affine.quantile_line(x, y, quantile, weights)

    memory = intervals.line_dependence(x, y, weights, line, quantile, rows.step)
    counts = intervals.stationary_counts(rows.step, memory.block_length, num_boot, seed)
    L0_interval = L1_interval = (0.0, math.inf)
    if len(np.unique(rows.step)) >= intervals.MIN_STEPS:
        replicates = intervals.bootstrap_lines(x, y, weights, line, quantile, counts)
        L0_interval = intervals.percentile_interval(replicates[:, 0], line.intercept)
        L1_interval = intervals.percentile_interval(replicates[:, 1], line.slope)

    comparison = models.compare(x, y, weights, quantile, counts)
    correlations = checks.rank_correlations(x, y, rows.step)
    flags = checks.check(rows, memory.num_effective, correlations)
    bounds = np.quantile(x, [0.025, 0.975])
    low, high = float(bounds[0]), float(bounds[1])
    top = x >= math.sqrt(low * high)
    top_slope = checks.loglog_slope(x[top], y[top])
    verdict, reason = checks.decide(flags, line, L1_interval, comparison, (low, high), top_slope)

    known = rows.saturation[~np.isnan(rows.saturation)]
    lines = {f"{q:g}": affine.quantile_line(x, y, q, weights, start=line) for q in PATH}
    lines |= {"hard": affine.hard_envelope(x, y, weights), "mean": affine.least_squares(x, y)}
    height = line(x)
    return SmoothnessFit(
        L0=line.intercept,
        L1=line.slope,
        L0_interval=L0_interval,
        L1_interval=L1_interval,
        interval_level=intervals.LEVEL,
        quantile=float(quantile),
        num_points=len(x),
        num_effective=memory.num_effective,
        block_length=memory.block_length,
        decades=checks.decades(x),
        spearman=correlations[0],
        partial_spearman=correlations[1],
        loglog_slope=checks.loglog_slope(x, y),
        implied_slope=checks.loglog_slope(x, height) if (height > 0).all() else math.nan,
        coverage=float(np.mean(y <= height * (1 + 1e-9))),
        median_saturation=float(np.median(known)) if len(known) else math.nan,
        lines={name: (float(a), float(b)) for name, (a, b) in lines.items()},
        comparison=comparison,
        flags=flags,
        verdict=verdict,
        verdict_reason=reason,
        estimator=rows.estimator,
        group=rows.group,
        data=rows.data,
        dropped=rows.dropped,
        grad_norm_quantiles=tuple(np.quantile(rows.recorded, np.linspace(0, 1, 101)).tolist()),
        corners=tuple(zip(*(values.tolist() for values in affine.frontier(affine.upper_hull(x, y))), strict=True)),
    )


def _select_rows(data: HasFrame | pd.DataFrame, estimator: str | None, group: str) -> Rows:
    """Rows of one estimator and group that a fit can use.

    Rows with a saturated status stay: they are the steep ones, and dropping rows for a high smoothness would bias
    the line. A smoothness of exactly zero is dropped: it has no relative error, and is below any noise floor.

    Args:
        data: a trace or a table with at least `grad_norm` and `smoothness`.
        estimator: name of the estimator; None prefers "local", then "path", then the only one there is.
        group: parameter group.

    Raises:
        ValueError: where columns are missing, estimators or kinds of data would be mixed, or no row is usable.
    """
    frame = data if isinstance(data, pd.DataFrame) else data.to_frame()
    missing = [name for name in ("grad_norm", "smoothness") if name not in frame.columns]
    if missing:
        raise ValueError(f"Parameter `data` should have the columns `grad_norm` and `smoothness`. Found no {missing}.")
    if len(frame) == 0:
        raise ValueError("Parameter `data` should have rows. Found none.")
    label = _labels(frame)
    number = _numbers(frame)
    in_group = label["group"] == group
    if not in_group.any():
        raise ValueError(f"Parameter `group` should be one of {_names(label['group'])}. Found `group = {group!r}`.")
    cause = _causes(label["status"], number)
    usable = cause == ""
    if estimator is None:
        estimator = _choose_estimator(label["estimator"][in_group], usable[in_group])
    chosen = in_group & (label["estimator"] == estimator)
    if not chosen.any():
        known = _names(label["estimator"][in_group])
        raise ValueError(f"Parameter `estimator` should be one of {known}. Found `estimator = {estimator!r}`.")
    dropped = Counter(cause[chosen & ~usable].tolist())
    if not (chosen & usable).any():
        counts = ", ".join(f"{name}: {count}" for name, count in sorted(dropped.items()))
        raise ValueError(
            f"Parameter `data` should have usable rows for the group {group!r} and the estimator {estimator!r}. "
            f"Found {int(chosen.sum())} rows, all dropped ({counts})."
        )
    kinds = _names(label["data"][chosen & usable])
    if len(kinds) > 1:
        raise ValueError(
            f"Parameter `data` should hold rows measured on one kind of data. Found {kinds}: filter the frame, "
            f"for example with `frame[frame['data'] == {kinds[0]!r}]`."
        )
    outside = {"other_group": int((~in_group).sum()), "other_estimator": int((in_group & ~chosen).sum())}
    keep = np.flatnonzero(chosen & usable)
    keep = keep[np.argsort(number["step"][keep], kind="stable")]
    gradients = number["grad_norm"][chosen]
    return Rows(
        x=number["grad_norm"][keep],
        y=number["smoothness"][keep],
        step=number["step"][keep],
        saturation=number["saturation"][keep],
        noise_floor=number["noise_floor"][keep],
        step_norm=number["step_norm"][keep],
        lr=number["lr"][keep],
        recorded=gradients[np.isfinite(gradients) & (gradients > 0)],
        estimator=estimator,
        group=group,
        data=kinds[0],
        dropped=dict(sorted(dropped.items())) | {name: count for name, count in outside.items() if count},
    )


def _labels(frame: pd.DataFrame) -> dict[str, Labels]:
    neutral = {"group": "all", "estimator": "unnamed", "status": "ok", "data": "unspecified"}
    labels = {}
    for name, value in neutral.items():
        column = frame[name] if name in frame.columns else pd.Series([value] * len(frame))
        labels[name] = np.array(["missing" if pd.isna(v) else str(v) for v in column], dtype=object)
    return labels


def _numbers(frame: pd.DataFrame) -> dict[str, Array]:
    numbers = {}
    for name in ("grad_norm", "smoothness", "step", "saturation", "noise_floor", "step_norm", "lr"):
        if name in frame.columns:
            numbers[name] = pd.to_numeric(frame[name], errors="coerce").to_numpy(dtype=np.float64)
        else:
            numbers[name] = np.full(len(frame), np.nan)
    if "step" not in frame.columns:
        numbers["step"] = np.arange(len(frame), dtype=np.float64)
    return numbers


def _causes(status: Labels, number: dict[str, Array]) -> Labels:
    """Why each row is unusable; an empty string where it is usable. The first cause that applies counts."""
    x, y = number["grad_norm"], number["smoothness"]
    with np.errstate(invalid="ignore"):
        conditions = {
            "non_finite": ~(np.isfinite(x) & np.isfinite(y)),
            "negative": (x < 0) | (y < 0),
            "zero_gradient": x == 0,
            "zero_smoothness": y == 0,
            "step_unknown": ~np.isfinite(number["step"]),
        }
    cause = np.full(len(x), "", dtype=object)
    for name, condition in reversed(conditions.items()):
        cause[condition] = name
    unusable = np.array([value not in USABLE_STATUSES for value in status])
    cause[unusable] = status[unusable]
    return cause


def _choose_estimator(names: Labels, usable: npt.NDArray[np.bool_]) -> str:
    present = _names(names[usable]) or _names(names)
    for name in PREFERRED:
        if name in present:
            return name
    if len(present) > 1:
        raise ValueError(
            f"Parameter `estimator` should name one of {present}, which measure different things. "
            "Found `estimator = None`."
        )
    return present[0]


def _names(labels: Labels) -> list[str]:
    return sorted(set(labels.tolist()))
