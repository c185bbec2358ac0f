"""The rows of a scan: which line each point lies on, how far from the starting point, and resamples of whole lines."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pandas as pd

from smoothdiag.console import counted
from smoothdiag.fits.base import Array
from smoothdiag.fits.columns import Labels, choose_estimator, labels
from smoothdiag.fits.rows import Rows, select_rows
from smoothdiag.rows import USABLE_STATUSES

START = "start"
LARGEST_CURVATURE = "hessian_norm"
"""Estimators that begin so measure the largest curvature at a point, whatever the direction of the line."""

_OF_ROWS = (
    "x", "y", "step", "run", "saturation", "noise_floor", "step_norm", "status", "loss", "grad_variance", "lr",
)  # fmt: skip
_NUMBERED = re.compile(r"^(random|layers) \d+$")

Codes = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Lines:
    """The usable points of one scan, line by line, in the units of `Rows.scaled`.

    Attributes:
        rows: the points; the starting point comes first.
        line: number of each point's line; -1 for the starting point, which belongs to every line.
        names: names of the lines.
        distance: distance of each point from the starting point, in the units of the caller [x].
        relative: the same, as a share of the norm of the parameters at the starting point; NaN if it is not known.
    """

    rows: Rows
    line: Codes
    names: tuple[str, ...]
    distance: Array
    relative: Array

    @property
    def num_lines(self) -> int:
        """Number of lines that have a usable point."""
        return len(self.names)

    @property
    def unit(self) -> Codes:
        """Number of each point's unit, -1 for the starting point: a line, or all random lines of one kind together."""
        kinds = [_NUMBERED.sub(r"\1", name) for name in self.names]
        of_line = np.unique(kinds, return_inverse=True)[1]
        return np.where(self.line < 0, -1, of_line[self.line])

    @property
    def num_units(self) -> int:
        """Number of units."""
        return int(self.unit.max()) + 1

    def all_but_one(self) -> Array:
        """Weights of the points without unit 0, 1, ...; shape (units, points)."""
        return np.asarray(self.unit != np.arange(self.num_units)[:, None], dtype=np.float64)

    def resamples(self, num_boot: int, seed: int) -> Array:
        """How often each point occurs in each resample of whole lines; the starting point always occurs once.

        Args:
            num_boot: number of resamples.
            seed: the same seed gives the same resamples.

        Returns:
            Array: shape (num_boot, points).

        Source: Davison and Hinkley, 1997, section 3.8, for clusters.
        """
        rng = np.random.default_rng(seed)
        drawn = rng.multinomial(self.num_units, np.full(self.num_units, 1 / self.num_units), size=num_boot)
        return np.where(self.line < 0, 1, drawn[:, self.unit]).astype(np.float64)


def has_lines(frame: pd.DataFrame) -> bool:
    """Whether a table holds a scan.

    Raises:
        ValueError: if it also holds rows that belong to no line.
    """
    named = _named(frame)
    if not named.any():
        return False
    if not named.all():
        raise ValueError(
            "Parameter `data` should hold either the rows of a run or the points of a scan, which answer different "
            f"questions. Found {counted(int((~named).sum()), 'row')} without an entry in the column `scan` and "
            f"{counted(int(named.sum()), 'row')} with one: give each a file of its own, or in Python pass "
            "`trace.to_frame().query('scan.notna()')` for the scan and `.query('scan.isna()')` for the run."
        )
    return True


def _named(frame: pd.DataFrame) -> npt.NDArray[np.bool_]:
    if "scan" not in frame.columns:
        return np.zeros(len(frame), dtype=np.bool_)
    return np.asarray(frame["scan"].notna() & (frame["scan"].astype(str) != ""), dtype=np.bool_)


def select_lines(frame: pd.DataFrame, estimator: str | None, group: str) -> tuple[Rows, Lines]:
    """The usable points of a scan.

    Args:
        frame: a table of points, as `sd.scan` writes them.
        estimator: name of the estimator; None prefers "hessian_norm".
        group: parameter group.

    Returns:
        tuple[Rows, Lines]: the points in the units of the caller, and as the fit uses them.

    Raises:
        ValueError: if the table holds several scans, lacks the distances, or has no usable point.
    """
    _check_one_scan(frame)
    if "distance" not in frame.columns:
        raise ValueError(
            "Parameter `data` should have the column `distance` beside the column `scan`: how far each point lies from "
            "the starting point. Found none."
        )
    if estimator is None:
        label = labels(frame)
        inside = label["group"] == group
        usable = np.isin(label["status"][inside].astype(str), list(USABLE_STATUSES))
        found = set(label["estimator"][inside].tolist())
        estimator = (
            LARGEST_CURVATURE if LARGEST_CURVATURE in found else choose_estimator(label["estimator"][inside], usable)
        )
    # Points have no order in time: the step carries the number of the row, with which its other columns are found.
    numbered = frame.drop(columns="run", errors="ignore").assign(step=np.arange(len(frame)))
    rows = select_rows(numbered, estimator, group)
    rows.check_range()
    place = rows.step.astype(np.intp)
    name: Labels = frame["scan"].astype(str).to_numpy(dtype=object)[place]
    distance = _floats(frame, "distance")[place]
    known = (distance >= 0) & np.isfinite(distance)
    if not known.all():
        raise ValueError(
            "Parameter `data` should have distances of zero or more in the column `distance`. Found "
            f"`distance = {distance[~known][0]}` on the line {name[~known][0]!r}."
        )
    names = tuple(sorted(set(name.tolist()) - {START}))
    if not names:
        raise ValueError("Parameter `data` should have usable points on at least one line. Found the start alone.")
    line = np.array([-1 if one == START else names.index(one) for one in name], dtype=np.intp)
    order = np.lexsort((distance, line))
    scaled = _taken(rows.scaled(), order)
    return rows, Lines(scaled, line[order], names, distance[order], _floats(frame, "relative_distance")[place][order])


def _check_one_scan(frame: pd.DataFrame) -> None:
    for column, what in (("run", "runs"), ("step", "checkpoints")):
        values = sorted(frame[column].dropna().unique().tolist()) if column in frame.columns else []
        if len(values) > 1:
            raise ValueError(
                "Parameter `data` should hold one scan, which is one checkpoint on one batch: no single law serves "
                "several checkpoints, because smoothness at equal gradient norm differs between them. Found "
                f"{len(values)} {what}, `{column} = {values[0]!r}` to `{values[-1]!r}`: fit each of them, and put them "
                f"side by side with `compare_runs({{str(name): fit_smoothness(one) for name, one in "
                f"frame.groupby({column!r})}})`."
            )


def _taken(rows: Rows, order: Codes) -> Rows:
    parts = {name: getattr(rows, name)[order] for name in _OF_ROWS}
    return replace(rows, **parts)


def _floats(frame: pd.DataFrame, column: str) -> Array:
    if column not in frame.columns:
        return np.full(len(frame), np.nan)
    return pd.to_numeric(frame[column], errors="coerce").to_numpy(dtype=np.float64)
