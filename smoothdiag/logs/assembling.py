"""Assembling: the rows of a trace out of what a log holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from smoothdiag.console import counted
from smoothdiag.logs.columns import (
    Series,
    column_of,
    counter_of,
    filled,
    listed,
    rows_of_run,
    rows_of_training,
    series_of,
)
from smoothdiag.logs.counting import check_is_one_run, recounted
from smoothdiag.logs.documents import SCALAR
from smoothdiag.logs.names import note_of, role_of
from smoothdiag.logs.shapes import COUNTER, RUNNING
from smoothdiag.logs.store import Store, Table
from smoothdiag.logs.table import LogTrace

Numbers = npt.NDArray[Any]

OVERFLOW: Final = -1.0
"""The number that DeepSpeed and others log instead of a gradient norm that is inf or NaN."""

_NORM_UNKNOWN: Final = (
    "whether the norm was taken before or after clipping, of gradients times a loss scale, or on one rank alone"
)
_LOSS_UNKNOWN: Final = "whether it is a mean or a sum, over tokens, samples or ranks, of one step or of several"


def noted(problems: Sequence[str]) -> str:
    """Returns the problems as the end of a sentence."""
    return "".join(f"; {problem}" for problem in problems)


def assembled(
    store: Store, asked: Mapping[str, str | None], run: str | None, source: str, problems: list[str]
) -> LogTrace:
    """Returns the trace of a log.

    Raises:
        ValueError: As `read_log` does.
    """
    columns = list(store.names)
    if not columns or not store.count:
        raise ValueError(f"`{source}` should be a log of named values. Found no entry with names{noted(problems)}.")
    if {"smoothness", "estimator"} <= set(columns):
        raise ValueError(f"`{source}` should be a log. Found a trace, which `Trace.read` and `smoothdiag fit` read.")
    tables = rows_of_training(store, asked, source, problems)
    sizes: Counter[str] = Counter()
    for table in tables:
        sizes.update(dict.fromkeys(table.names, table.length))
    chosen: dict[str, str | None] = {}
    # Columns without values are meant only if there are no others.
    for names in ([name for name in columns if sizes[name]], columns):
        for role in ("grad_norm", "loss", "lr"):
            among = columns if asked[role] is not None else names
            chosen[role] = column_of(role, asked[role], among, source, sizes)
        if chosen["grad_norm"] is not None or chosen["loss"] is not None:
            break
    roles = [name for role in ("grad_norm", "loss") if (name := chosen[role]) is not None]
    if asked["step"] is not None:
        column_of("step", asked["step"], columns, source)
    if not roles:
        raise ValueError(
            f"Parameter `grad_norm` should name the column of gradient norms in `{source}`: no column has a usual name "
            f"for gradient norms or losses. Found the columns {listed(_likely(columns))}.{_scalar_hint(columns)}"
        )
    tables = rows_of_run(tables, run, source, roles)
    chosen["step"] = counter_of(tables, roles, asked["step"], columns, source)
    epoch = _epoch_of(tables, roles)
    if chosen["step"] == RUNNING:
        problems.append("the rows of an epoch are means over its batches so far, so only the last of each is read")
    chosen["step"], found = _series(tables, roles, chosen["step"], epoch)
    needed = "loss" if chosen["grad_norm"] is None else "grad_norm"
    step = chosen["step"]
    problems += _unread(store, chosen)
    found = [_checked(series, step, problems) for series in found]
    if not len(found[0]):
        raise ValueError(
            f"Parameter `{needed}` should name a column of numbers. Found none in `{chosen[needed]}` of "
            f"`{source}`{noted(problems)}."
        )
    _check_is_run(found, tables, step, source)
    if step is not None:
        if run is None and not any(table.context.run for table in tables):
            check_is_one_run(found, tables, step, source)
        totals = store.totals.get(step, set())
        names_runs = len({table.context.run for table in tables} - {""}) > 0
        number = None if names_runs else run
        found = recounted(found, step, totals.copy().pop() if len(totals) == 1 else 0, number, source, problems)
    trace = _trace(dict(zip(roles, found, strict=True)), chosen, tables, problems)
    _check_norms(trace, chosen["grad_norm"], source, problems)
    trace.meta |= {"log": source.replace("\\", "/").split("/")[-1]}
    trace.meta |= {f"{role}_column": chosen[role] for role in ("step", "grad_norm", "loss", "lr")}
    trace.meta |= {"columns": columns, "notes": _notes(chosen, store)}
    if chosen["grad_norm"] is None:
        problems.append(
            "only losses are read, because no column has a usual name for gradient norms; if one holds them, name it "
            "as `grad_norm`"
        )
    trace.problems = problems
    return trace


def _likely(columns: Sequence[str]) -> list[str]:
    """Returns the columns, those that speak of losses and norms first."""
    return sorted(columns, key=lambda name: not any(word in name.lower() for word in ("loss", "norm", "grad")))


def _scalar_hint(columns: Sequence[str]) -> str:
    if set(columns) != set(SCALAR):
        return ""
    return " One scalar from TensorBoard has no name: if it holds gradient norms, choose `Value` (`--grad-norm Value`)."


def _epoch_of(tables: Sequence[Table], roles: Sequence[str]) -> str | None:
    """Returns the column of epochs of the rows, or of the lines between them; None if there is none."""
    rows = [table for table in tables if set(roles) & set(table.names)]
    for part in (rows, tables):
        names = [name for table in part for name in table.names if role_of(name) == "epoch"]
        if names:
            return max(names, key=names.count)
    return None


def _series(
    tables: Sequence[Table], roles: Sequence[str], step: str | None, epoch: str | None
) -> tuple[str | None, list[Series]]:
    """Returns the columns with their steps; epochs are steps if the log has no others and one row for each."""
    is_continued = step is not None and not any(
        step in table.names for table in tables if set(roles) & set(table.names)
    )
    found = [
        filled(series_of(tables, role, step, epoch), tables, step, epoch, is_continued=is_continued) for role in roles
    ]
    if step == RUNNING:
        found = [one.kept(_ends(one.step)) for one in found]
    # The last batch of every epoch: 20/20.
    is_still = step in (COUNTER, RUNNING) and len(found[0]) > 1 and bool(np.all(found[0].step == found[0].step[0]))
    if step is not None and not is_still:
        return step, found
    epochs = found[0].epoch
    if len(epochs) > 1 and bool(np.all(epochs == np.floor(epochs)) and np.all(np.diff(epochs) > 0)):
        return epoch, [Series(one.where, one.epoch, one.epoch, one.value) for one in found]
    return None, [Series(one.where, one.places, one.epoch, one.value) for one in found]


def _ends(step: Numbers) -> Numbers:
    """Returns which rows end an epoch that was not cut off: the counter starts anew behind them."""
    ends: Numbers = np.append(step[1:] < step[:-1], [True] * min(1, len(step))) & (step == np.max(step, initial=0))
    return ends


def _checked(series: Series, step: str | None, problems: list[str]) -> Series:
    """Returns the entries with a step, which has to be a whole number."""
    if series.step.dtype.kind == "i":
        return series
    at = series.step
    large = np.abs(at) >= 2.0**63
    if large.any():
        problems.append(
            f"{counted(int(large.sum()), 'value is', 'values are')} left out because no counter reaches them; the "
            f"first is step {at[large][0]:g} in `{step}`"
        )
    keep = ~np.isnan(at) & ~large
    kept = series if bool(keep.all()) else series.kept(keep)
    broken = kept.step[kept.step != np.floor(kept.step)]
    if len(broken):
        raise ValueError(f"Parameter `step` should name a column of whole numbers. Found {broken[0]:g} in `{step}`.")
    return kept


def _check_is_run(found: Sequence[Series], tables: Sequence[Table], step: str | None, source: str) -> None:
    """Refuses a table with one row for each run.

    Raises:
        ValueError: If every row has the same step, though their values differ.
    """
    rows = max(found, key=len)
    runs = {table.context.run for table in tables} - {""}
    is_same = step is not None and len(rows) >= 5 and bool(np.all(rows.step == rows.step[0]))
    if is_same and len(np.unique(rows.value)) > 1:
        raise ValueError(
            f"`{source}` should be the log of one run. Found {len(rows)} rows of the same step {rows.step[0]:g}, as in "
            "a table of runs with one row for each. Export the history of one run."
        )
    if len(runs) > 1 and len(runs) == len(rows) and not bool(np.all(np.diff(rows.step) > 0)):
        raise ValueError(
            f"`{source}` should be the log of one run. Found {len(runs)} runs with one row for each. Export the "
            "history of one run."
        )


def _unread(store: Store, chosen: Mapping[str, str | None]) -> list[str]:
    unread = [store.unread[name] for name in chosen.values() if name in store.unread]
    if not unread:
        return []
    total = sum(count for count, _ in unread)
    return [
        f"{counted(total, 'value is', 'values are')} left out because only numbers like 0.5 can be read; the first is "
        f"{unread[0][1]}"
    ]


def _trace(
    found: Mapping[str, Series], chosen: Mapping[str, str | None], tables: Sequence[Table], problems: list[str]
) -> LogTrace:
    """Returns the trace with one row for each step; of several values of a step, the last counts."""
    merged, again = {}, []
    for name, series in found.items():
        merged[name], repeated = _merged(series)
        again.append(repeated)
    if num_again := len(np.unique(np.concatenate(again))):
        problems.append(
            f"{counted(num_again, 'entry repeats', 'entries repeat')} an earlier step with other values, and the later "
            "values count"
        )
    parts = [*merged.values()]
    step = parts[0].step
    if not all(np.array_equal(part.step, step) for part in parts[1:]):
        step = np.unique(np.concatenate([part.step for part in parts]))
    columns, is_bad = {}, np.zeros(len(step), dtype=np.bool_)
    for role in ("grad_norm", "loss"):
        if (part := merged.get(chosen[role] or "")) is None:
            continue
        if len(part) == len(step):
            columns[role] = part.value.astype(np.float64) if part.value.dtype.kind == "i" else part.value
            is_bad |= ~np.isfinite(part.value)
        else:
            at = np.searchsorted(step, part.step)
            columns[role] = np.full(len(step), np.nan)
            columns[role][at] = part.value
            is_bad[at] |= ~np.isfinite(part.value)
    rates = series_of(tables, chosen["lr"], None, None) if chosen["lr"] is not None else None
    if rates is not None and len(rates):
        columns["lr"] = _rates(rates, parts, step)
    return LogTrace(_small(step), columns, is_bad)


def _small(step: Numbers) -> Numbers:
    kind = np.int32 if len(step) and step.min() >= -(2**31) and step.max() < 2**31 else np.int64
    return step.astype(kind, copy=False)


def _rates(series: Series, merged: Sequence[Series], step: Numbers) -> Numbers:
    """Returns the learning rate of the entries that each row was read from; NaN where they have none."""
    if all(part.has_places_of(series) for part in merged):
        return series.value
    rates = np.full(len(step), np.nan)
    for part in merged:
        at = np.minimum(np.searchsorted(series.places, part.places), len(series) - 1)
        same = series.places[at] == part.places
        rates[np.searchsorted(step, part.step[same])] = series.value[at[same]]
    return rates


def _merged(series: Series) -> tuple[Series, Numbers]:
    """Returns the last value of each step in the order of steps, and the entries that changed a value."""
    step = series.step
    if len(step) < 2 or bool(np.all(step[1:] > step[:-1])):
        return series, np.empty(0, dtype=np.int64)
    order = np.argsort(step, kind="stable")
    rows = series.kept(order)
    same = rows.step[1:] == rows.step[:-1]
    before, after = rows.value[:-1], rows.value[1:]
    changed = same & (before != after) & ~(np.isnan(before) & np.isnan(after))
    return rows.kept(np.append(~same, True)), rows.places[1:][changed]


def _check_norms(trace: LogTrace, column: str | None, source: str, problems: list[str]) -> None:
    """Refuses negative gradient norms, except the number that stands for an overflow, which becomes NaN."""
    norm = trace.columns.get("grad_norm")
    if norm is None or not (negative := norm < 0).any():
        return
    wrong = np.flatnonzero(negative & (norm != OVERFLOW))
    if len(wrong):
        more = f", and {len(wrong) - 1} more below zero" if len(wrong) > 1 else ""
        raise ValueError(
            f"Parameter `grad_norm` should name a column of gradient norms, which are never negative. Found "
            f"{norm[wrong[0]]:g} at step {trace.step[wrong[0]]} in `{column}` of `{source}`{more}."
        )
    trace.columns["grad_norm"] = np.where(negative, np.nan, norm)
    trace.is_bad |= negative
    problems.append(
        f"{counted(int(negative.sum()), 'gradient norm')} of {OVERFLOW:g} read as NaN, because DeepSpeed logs an "
        "overflow like this"
    )


def _notes(chosen: Mapping[str, str | None], store: Store) -> list[str]:
    """Returns what the log does not say of its numbers, and what is known from the names alone."""
    notes = []
    for role, unknown in (("grad_norm", _NORM_UNKNOWN), ("loss", _LOSS_UNKNOWN)):
        name = chosen[role]
        if name is None:
            continue
        known = note_of(name)
        notes.append(f"`{name}`: {known}" if known else f"`{name}`: the log does not say {unknown}")
        if units := store.units.get(name):
            notes.append(f"`{name}` has the unit {', '.join(sorted(units))}")
    return notes
