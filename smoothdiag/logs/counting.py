"""Counting: counters that start anew in every epoch, runs that were resumed, and several runs in one file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from smoothdiag.console import counted
from smoothdiag.logs.columns import Series, series_of
from smoothdiag.logs.names import role_of
from smoothdiag.logs.store import Table

Numbers = npt.NDArray[Any]

FEW: Final = 5
"""Rows on either side of a fall of the counter; fewer are rows out of order, as several writers leave them."""

NUM_ALIKE: Final = 3
"""Alike stretches that make a counter of epochs, if the log does not name epochs; two may be two runs."""

ALIKE: Final = 0.9
"""Share of the steps that have to occur as often as most, and with other values, to be those of several runs."""


@dataclass(frozen=True)
class Stretch:
    """Rows between two falls of the counter.

    Attributes:
        begin: Place of its first row.
        end: Place behind its last row.
        first: First step.
        last: Largest step.
    """

    begin: int
    end: int
    first: float
    last: float


def recounted(
    series: Sequence[Series], column: str, total: int, run: str | None, source: str, problems: list[str]
) -> list[Series]:
    """Returns the series with steps that count up through the run, and without rows that no longer count.

    Args:
        series: Columns of one log.
        column: Name of the column of steps.
        total: What the counter counts to; 0 if the log does not say.
        run: Number of the run that was asked for, if the file holds several.
        source: Name of the log.
        problems: Takes what was done.

    Raises:
        ValueError: If the counter starts anew and nothing says that it counts epochs.
    """
    shared = _shared(series)
    if shared is None:  # one column after the other, as in tables of one row for each value
        return [recounted([one], column, total, run, source, problems)[0] for one in series]
    if len(shared) < 2 or bool(np.all(shared.step[1:] >= shared.step[:-1])):
        if run is not None:
            raise ValueError(
                f"Parameter `run` should be None, because `{source}` holds one run. Found `run = {run!r}`."
            )
        return list(series)
    step, keep = _recounted(shared, column, total, run, source, problems)
    if step is shared.step and bool(keep.all()):
        return list(series)
    at = [np.searchsorted(shared.places, one.places) for one in series]
    return [
        Series(one.where, step[place], one.epoch, one.value).kept(keep[place])
        for one, place in zip(series, at, strict=True)
    ]


def _shared(series: Sequence[Series]) -> Series | None:
    """Returns the rows of all columns in the order of the log; None if the columns follow each other."""
    first = series[0]
    if all(one.has_places_of(first) for one in series[1:]):
        return first
    bounds = sorted((one.where[0], one.where[-1]) for one in series if len(one))
    if all(before[1] < after[0] for before, after in pairwise(bounds)) and len(bounds) > 1:
        return None
    joined = [np.concatenate([getattr(one, name) for one in series]) for name in ("where", "step", "epoch", "value")]
    _, at = np.unique(joined[0], return_index=True)
    return Series(*joined).kept(at)


def _recounted(
    rows: Series, column: str, total: int, run: str | None, source: str, problems: list[str]
) -> tuple[Numbers, Numbers]:
    """Returns the steps of the rows, and which rows count."""
    step, keep = rows.step, np.ones(len(rows), dtype=np.bool_)
    stretches = _stretches(step)
    if len(stretches) < 2:
        return step, keep
    if (period := _period(rows, stretches, total)) > 0:
        has_epochs = not np.isnan(rows.epoch).any()
        index = np.zeros(len(rows))
        for number, stretch in enumerate(stretches):
            index[stretch.begin : stretch.end] = number
        step = step + period * (rows.epoch - rows.epoch.min() if has_epochs else index)
        problems.append(
            f"the counter `{column}` starts anew {counted(len(stretches) - 1, 'time')}, as in every epoch, so "
            f"{period:g} steps are added for each epoch before"
            + ("" if has_epochs else f"; if these are {len(stretches)} runs, read one of them with `run`")
        )
        stretches = _stretches(step)
        if len(stretches) < 2:
            return step, keep
    if not _is_resumed(stretches):
        stretches = _of_run(stretches, run, source, problems)
        keep[:] = False
        for stretch in stretches:
            keep[stretch.begin : stretch.end] = True
    taken_again = 0
    for stretch in stretches[1:]:
        before = slice(stretches[0].begin, stretch.begin)
        again = keep[before] & (step[before] >= stretch.first)
        keep[before] &= ~again
        taken_again += int(again.sum())
    if len(stretches) > 1:
        problems.append(
            f"the run was resumed {counted(len(stretches) - 1, 'time')}: {counted(taken_again, 'row')} of steps that "
            "it took again no longer count"
        )
    return step, keep


def _stretches(step: Numbers) -> list[Stretch]:
    falls = np.flatnonzero(step[1:] < step[:-1]) + 1
    bounds = [0, *map(int, falls), len(step)]
    kept = [0]
    for at, after in pairwise(bounds[1:]):
        if at - kept[-1] >= FEW and after - at >= FEW:
            kept.append(at)
    return [
        Stretch(begin, end, float(step[begin]), float(step[begin:end].max()))
        for begin, end in zip(kept, [*kept[1:], len(step)], strict=True)
    ]


def _period(rows: Series, stretches: Sequence[Stretch], total: int) -> float:
    """Returns the steps of an epoch if the counter starts anew in every epoch; 0 if it does not, or nobody can tell."""
    largest, first = max(stretch.last for stretch in stretches), min(stretch.first for stretch in stretches)
    period = float(total) if total >= largest else largest + (first == 0)
    if not np.isnan(rows.epoch).any():
        begins = [float(rows.epoch[stretch.begin]) for stretch in stretches]
        befores = [float(rows.epoch[stretch.begin - 1]) for stretch in stretches[1:]]
        rises = sum(after == before + 1 for before, after in zip(befores, begins[1:], strict=True))
        # Whole epochs: a fraction counts the same as the steps do.
        return period if rises and bool(np.all(rows.epoch == np.floor(rows.epoch))) else 0.0
    whole = stretches[:-1]
    is_alike = len({(stretch.first, stretch.last) for stretch in whole}) == 1
    ends_alike = stretches[-1].first == whole[0].first and stretches[-1].last <= whole[0].last
    return period if is_alike and ends_alike and len(stretches) >= NUM_ALIKE else 0.0


def _is_resumed(stretches: Sequence[Stretch]) -> bool:
    """Whether every later stretch begins behind the start of the run, as after a checkpoint."""
    return all(stretch.first > stretches[0].first for stretch in stretches[1:])


def _of_run(stretches: Sequence[Stretch], run: str | None, source: str, problems: list[str]) -> list[Stretch]:
    """Returns the stretches of the run that was asked for, or of the last run if it reaches as far as those before."""
    runs: list[list[Stretch]] = []
    for stretch in stretches:
        if not runs or stretch.first <= runs[-1][0].first:
            runs.append([])
        runs[-1].append(stretch)
    names = [str(number) for number in range(1, len(runs) + 1)]
    if run in names:
        return runs[int(run or 1) - 1]
    ends = [max(stretch.last for stretch in parts) for parts in runs]
    if run is None and ends[-1] >= max(ends):
        problems.append(
            f"the steps start anew {counted(len(runs) - 1, 'time')}, so the file holds {len(runs)} runs, and the last "
            f"is read; `run` (`--run`) reads another: {', '.join(names[:-1])}"
        )
        return runs[-1]
    spans = "; ".join(
        f"{name}: steps {parts[0].first:g} to {end:g}" for name, parts, end in zip(names, runs, ends, strict=True)
    )
    found = f"`run = {run!r}`" if run is not None else "`run = None`"
    raise ValueError(
        f"Parameter `run` (`--run`) should name one of the {len(runs)} runs in `{source}`, whose steps start anew "
        f"({spans}). Found {found}. If the counter counts epochs, name another column of steps."
    )


def check_is_one_run(series: Sequence[Series], tables: Sequence[Table], column: str, source: str) -> None:
    """Refuses rows of several runs that nothing tells apart: each step occurs as often, with other values.

    Another counter that rises from row to row makes them micro-steps; rows of ranks have one norm.

    Raises:
        ValueError: If the rows are those of several runs.
    """
    rows = series[0]
    # A counter that starts anew has the rows of a step far apart.
    if np.count_nonzero(rows.step[1:] == rows.step[:-1]) < ALIKE * len(rows) / 2:
        return
    step, counts = np.unique(rows.step, return_counts=True)
    times = int(np.median(counts)) if len(counts) else 0
    if times < 2 or len(step) < FEW or float(np.mean(counts == times)) < ALIKE:
        return
    order = np.argsort(rows.step, kind="stable")
    same = np.diff(rows.step[order]) == 0
    if any(float(np.mean(np.diff(one.value[order])[same] != 0)) < ALIKE for one in series if len(one) == len(rows)):
        return
    names = {name for table in tables for name in table.names if role_of(name) in ("step", "epoch")} - {column}
    if any(_rises(series_of(tables, name, None, None), rows) for name in names):
        return
    raise ValueError(
        f"`{source}` should name the run of each row. Found each step of `{column}` {times} times with other values, "
        f"as in a table of {times} runs. Export one run, or a column `run` with the name of each."
    )


def _rises(counter: Series, rows: Series) -> bool:
    at = counter.value[np.isin(counter.places, rows.places)]
    return len(at) == len(rows) and bool(np.all(np.diff(at) > 0))
