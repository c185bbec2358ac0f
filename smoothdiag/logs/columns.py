"""Columns: which columns of a log hold steps, gradient norms, losses and rates, and which of its rows are meant."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from smoothdiag.console import counted
from smoothdiag.logs.names import USUAL, place, plain, role_of
from smoothdiag.logs.store import Store, Table
from smoothdiag.rows import printable

Numbers = npt.NDArray[Any]

NUM_LISTED: Final = 30

ENOUGH: Final = 0.9
"""Share of the rows that have a counter, for the counter to be taken before others that come earlier in the table."""


SUMMED_UP: Final = 20
"""Values of one column to each value of another, beyond which the other sums up the run."""


@dataclass(frozen=True)
class Series:
    """The values of one column, in the order of the log.

    Attributes:
        where: Numbers of the entries.
        step: Steps as in the log; NaN if an entry has none.
        epoch: Epochs; NaN if unknown.
        value: The values.
    """

    where: Numbers | range
    step: Numbers
    epoch: Numbers
    value: Numbers

    def __len__(self) -> int:
        return len(self.where)

    @property
    def places(self) -> Numbers:
        """The numbers of the entries as an array."""
        return np.asarray(self.where)

    def has_places_of(self, other: Series) -> bool:
        """Whether the values stand in the same entries as others."""
        if isinstance(self.where, range) and isinstance(other.where, range):
            return self.where == other.where
        return np.array_equal(self.places, other.places)

    def kept(self, keep: Numbers) -> Series:
        """Returns the entries of a mask or an index."""
        return Series(self.places[keep], self.step[keep], self.epoch[keep], self.value[keep])


def listed(columns: Sequence[str]) -> str:
    """Returns the first names in words."""
    rest = len(columns) - NUM_LISTED
    return ", ".join(map(printable, columns[:NUM_LISTED])) + (f" and {rest} more" if rest > 0 else "")


def column_of(
    role: str, asked: str | None, columns: Sequence[str], source: str, sizes: Mapping[str, int] | None = None
) -> str | None:
    """Returns the column that was asked for, or else the only column with the likeliest usual name.

    ``sizes`` are numbers of values, if the columns are known: a column with one value for many of another sums up a
    run, as the `train_loss` that ends a run of Hugging Face.

    Raises:
        ValueError: If there is no such column, or several have this name.
    """
    if asked is not None:
        if asked not in columns:
            raise ValueError(
                f"Parameter `{role}` should be a column of `{source}`: {listed(columns)}. Found `{role} = {asked!r}`."
            )
        return asked
    places = {name: at[1] for name in columns if (at := place(name)) is not None and at[0] == role}
    if not places:
        return None
    best = min(places.values())
    found = [name for name, at in places.items() if at == best]
    if sizes is not None:
        most = max(sizes[name] for name in found)
        found = [name for name in found if sizes[name] == most or sizes[name] > max(1, most / SUMMED_UP)]
    exact = [name for name in found if best < len(USUAL[role]) and plain(name) == USUAL[role][best].name]
    if len(exact or found) > 1:
        # Nothing hangs on the rate, so it is left out rather than asked for.
        if role == "lr":
            return None
        raise ValueError(
            f"Parameter `{role}` should name one of the columns {listed(found)} of `{source}`, because each of them "
            f"has a usual name. Found `{role} = None`."
        )
    return (exact or found)[0]


def rows_of_training(store: Store, asked: Mapping[str, str | None], source: str, problems: list[str]) -> list[Table]:
    """Returns the tables with rows of training, or all tables if a column that was asked for is in no other.

    Raises:
        ValueError: If every row is of other data.
    """
    tables = [*store.tables.values()]
    wanted = {name for role in ("grad_norm", "loss") if (name := asked[role]) is not None}
    by_kind: Counter[str] = Counter()
    for table in tables:
        if wanted & set(table.names) if wanted else {"grad_norm", "loss"} & set(map(role_of, table.names)):
            by_kind[table.context.kind] += table.length
    kinds = {"train"} if by_kind["train"] else {"train", "summary"}
    if not any(by_kind[kind] for kind in kinds) and by_kind["validation"]:
        if not wanted:
            raise ValueError(
                f"`{source}` should have rows of training. Found {counted(by_kind['validation'], 'row')}, each with a "
                "word for validation or test; to read them all the same, name the column as `loss`."
            )
        kinds |= {"validation"}
    kept = [table for table in tables if table.context.kind in kinds]
    ranks = sorted({table.context.rank for table in kept if table.context.rank >= 0})
    if len(ranks) > 1:
        with_loss = [rank for rank in ranks if _has_loss(table for table in kept if table.context.rank == rank)]
        rank = (with_loss or ranks)[0]
        kept = [table for table in kept if table.context.rank in (-1, rank)]
        problems.append(
            f"only rows of rank {rank} are read, of {counted(len(ranks), 'rank')}"
            + (f", because the losses of rank {ranks[0]} are -1 or 0, as of a stage without a loss" * (rank > ranks[0]))
            + "; the norm and the loss may be those of one rank alone"
        )
    return kept


def _has_loss(tables: Iterable[Table]) -> bool:
    """Whether a rank has losses; those of a pipeline print -1 or 0 if the last stage is on another rank."""
    losses = [table.columns[name].values() for table in tables for name in table.names if role_of(name) == "loss"]
    return not losses or not all(bool(np.all((values == -1) | (values == 0))) for values in losses)


def rows_of_run(tables: list[Table], run: str | None, source: str, roles: Sequence[str]) -> list[Table]:
    """Returns the tables of one run.

    Raises:
        ValueError: If there are several runs and none was named, or there is none of this name.
    """
    sizes: Counter[str] = Counter()
    for table in tables:
        if table.context.run and set(roles) & set(table.names):
            sizes[table.context.run] += table.length
    if len(sizes) < 2:
        return tables
    if max(sizes.values()) == 1:
        # One row for each name: names of rows, unless all rows have the same step or none.
        return tables
    if run is None or run not in sizes:
        found = f"`run = {run!r}`" if run is not None else "`run = None`"
        raise ValueError(
            f"Parameter `run` (`--run`) should name one of the {len(sizes)} runs in `{source}`: "
            f"{listed([*sizes])}. Found {found}."
        )
    return [table for table in tables if table.context.run in (run, "")]


def counter_of(
    tables: Sequence[Table], roles: Sequence[str], asked: str | None, columns: Sequence[str], source: str
) -> str | None:
    """Returns the column of steps of the rows that have one of these columns; None if there is none."""
    if asked is not None:
        return column_of("step", asked, columns, source)
    rows = [table for table in tables if set(roles) & set(table.names)]
    continued = [table for table in rows if table.context.is_continuation]
    if continued and all(_counters(table) == [] for table in continued):
        headers = [table for table in tables if not table.context.is_continuation]
        names = list(dict.fromkeys(name for table in headers for name in _counters(table)))
        return column_of("step", None, names, source)
    total = sum(table.length for table in rows)
    sizes: Counter[str] = Counter()
    for table in rows:
        for name in _counters(table):
            sizes[name] += table.length
    enough = [name for name in columns if sizes[name] >= ENOUGH * total] or [name for name in columns if sizes[name]]
    return column_of("step", None, enough, source) or _counter_before(tables, roles)


def _counter_before(tables: Sequence[Table], roles: Sequence[str]) -> str | None:
    """Returns the counter of the lines before the rows, such as the bar above a dictionary; None if there is none.

    It counts if it is another for every row, and rises but where a run was resumed.
    """
    rows = series_of(tables, roles[0], None, None)
    names = {name for table in tables for name in _counters(table)}
    for name in sorted(names, key=lambda name: (place(name) or ("", 0))[1]):
        steps = _filled(np.full(len(rows), np.nan), rows.places, series_of(tables, name, None, None))
        rises = np.diff(steps)
        if len(rises) and bool(np.all(rises != 0)) and float(np.mean(rises > 0)) >= ENOUGH:
            return name
    return None


def _counters(table: Table) -> list[str]:
    return [name for name in table.names if role_of(name) == "step"]


def series_of(tables: Sequence[Table], column: str, step: str | None, epoch: str | None) -> Series:
    """Returns the values of a column with the steps and epochs beside them or, for continued lines, before them."""
    parts = []
    for table in tables:
        if column in table.names and not table.columns[column].is_forgotten:
            where = table.where.places()
            unknown = np.broadcast_to(np.float32(np.nan), len(where))
            parts.append(
                Series(
                    where,
                    table.columns[step].values() if step in table.names and step is not None else unknown,
                    table.columns[epoch].values() if epoch in table.names and epoch is not None else unknown,
                    table.columns[column].values(),
                )
            )
    if not parts:
        nothing = np.empty(0)
        return Series(nothing, nothing, nothing, nothing)
    names = ("where", "step", "epoch", "value")
    joined = parts[0]
    if len(parts) > 1:
        joined = Series(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
    # Lines that were read by a pattern come into the store behind others of their block.
    if isinstance(joined.where, range) or bool(np.all(joined.where[1:] > joined.where[:-1])):
        return joined
    return joined.kept(np.argsort(joined.where, kind="stable"))


def filled(
    series: Series, tables: Sequence[Table], step: str | None, epoch: str | None, *, is_continued: bool
) -> Series:
    """Returns the values with steps and epochs that earlier lines without values name."""
    steps, epochs = series.step, series.epoch
    if is_continued and step is not None:
        steps = _filled(steps, series.places, series_of(tables, step, None, None))
    if epoch is not None and len(epochs) and np.isnan(epochs).all():
        epochs = _filled(epochs, series.places, series_of(tables, epoch, None, None))
    return Series(series.where, steps, epochs, series.value)


def _filled(values: Numbers, where: Numbers, known: Series) -> Numbers:
    if not len(known):
        return values
    at = np.searchsorted(known.places, where, side="right") - 1
    before = np.where(at >= 0, known.value[np.maximum(at, 0)], np.nan)
    return np.where(np.isnan(values), before, values)
