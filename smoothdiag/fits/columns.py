"""Columns of a trace as arrays: names, numbers, why a row is unusable, and the estimator to take if none is named."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from smoothdiag.fits.base import Array
from smoothdiag.rows import CLIP_SUFFIX, USABLE_STATUSES

NUMBERS = (
    "grad_norm", "smoothness", "step", "saturation", "noise_floor", "step_norm", "loss", "grad_variance", "lr",
    "num_grads", "num_hvps", "seconds", "data_step",
)  # fmt: skip
Labels = npt.NDArray[np.object_]

# Preference when the caller names no estimator: the first does not depend on the length of the step taken.
PREFERRED = ("local", "path", "hessian_norm")
# Chosen for the caller only if there is nothing else: they probe other directions, norms or moments.
AUXILIARY = (
    "_preconditioned", "_own", "debiased", "local_random", "local_update", "local_steepest", "sharpness",
    "curvature_update", "critical_step", CLIP_SUFFIX,
)  # fmt: skip


def labels(frame: pd.DataFrame) -> dict[str, Labels]:
    """The columns that hold names, as strings: "missing" for a missing entry, a neutral name for a missing column."""
    found, neutral = {}, {"group": "all", "estimator": "unnamed", "status": "ok", "data": "unspecified", "run": "0"}
    for name, value in neutral.items():
        if name not in frame.columns:
            found[name] = np.full(len(frame), value, dtype=object)
            continue
        column = frame[name]
        named = column.astype(object).where(column.notna(), "missing").to_numpy(dtype=object)
        if pd.api.types.infer_dtype(named) != "string":  # Equal values may have names of their own, as 1 and True do.
            named = np.array([v if isinstance(v, str) else str(v) for v in named], dtype=object)
        found[name] = named
    return found


def numbers(frame: pd.DataFrame) -> dict[str, Array]:
    """The columns that hold numbers: NaN for a missing column or no number, the order of rows for missing steps."""
    found = {name: np.full(len(frame), np.nan) for name in NUMBERS}
    for name in found.keys() & frame.columns:
        found[name] = pd.to_numeric(frame[name], errors="coerce").to_numpy(dtype=np.float64)
    if "step" not in frame.columns:
        order = frame.groupby("run").cumcount() if "run" in frame.columns else np.arange(len(frame))
        found["step"] = np.asarray(order, dtype=np.float64)
    return found


def largest_rate(frame: pd.DataFrame, **chosen: str) -> float:
    """The largest learning rate of the rows with these labels: a schedule that moves the rate leaves the threshold.

    Args:
        frame: rows of a trace.
        **chosen: values that columns should have, such as ``estimator="local"``; a missing column passes all rows.

    Returns:
        The rate [x^2/f]; NaN if the rows name none.
    """
    for name, value in chosen.items():
        if name in frame.columns:
            frame = frame[frame[name] == value]
    rates = numbers(frame)["lr"]
    rates = rates[np.isfinite(rates) & (rates > 0)]
    return float(rates.max()) if rates.size else float("nan")


def causes(status: Labels, number: dict[str, Array]) -> Labels:
    """Why each row is unusable, or an empty string if it is usable; the first cause that applies counts."""
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
    codes, known = pd.factorize(status)
    usable = np.array([value in USABLE_STATUSES for value in known], dtype=np.bool_)
    return np.where(usable[codes], cause, status)


def choose_estimator(found: Labels, usable: npt.NDArray[np.bool_]) -> str:
    """The estimator to take if the caller names none.

    Raises:
        ValueError: if there are several estimators and no preference among them.
    """
    present = names(found[usable]) or names(found)
    for name in PREFERRED:
        if name in present:
            return name
    candidates = [name for name in present if not name.endswith(AUXILIARY)] or present
    if len(candidates) > 1:
        raise ValueError(
            f"Parameter `estimator` should name one of {candidates}, which measure different things. "
            "Found `estimator = None`."
        )
    return candidates[0]


def names(found: Labels) -> list[str]:
    """The different names, sorted."""
    return sorted(pd.unique(found).tolist())
