"""Tables: rows of cells under a line of names, for one run or for many."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Final

from smoothdiag.console import counted
from smoothdiag.logs.names import IS_VALIDATION, RANK_NAMES, RUN_COLUMNS, SPLIT_NAMES, place, plain
from smoothdiag.logs.store import Context, Store, rank_of

DELIMITERS: Final = ",;\t"

_KEYS: Final = ("key", "metric", "metric_name", "tag", "name", "variable")
_STEPS: Final = ("step", "_step", "global_step", "iteration", "epoch")

_CHART: Final = re.compile(r"^(?P<run>.+) - (?P<metric>.+?)(?P<of>__MIN|__MAX)?$")
"""Matches the columns of a chart that Weights & Biases exports: one for each run, and its least and largest value."""

_DECIMAL_COMMA: Final = re.compile(
    r"\s*[-+]?(?:0+,\d+|\d+,(?:\d{1,2}|\d{4,})|\d{4,},\d+|\d{1,3}(?:\.\d{3})+,\d+|\d+,\d+[eE][-+]?\d+)\s*"
)
"""Matches numbers whose comma cannot be one of thousands: 0,512 or 2,51 or 1.024,5."""

_ANY_COMMA: Final = re.compile(r"\s*[-+]?(?:\d+|\d{1,3}(?:\.\d{3})+),\d+(?:[eE][-+]?\d+)?\s*")

NUM_ROWS: Final = 4096
"""Rows that are read at once."""


def delimiter_of(line: str) -> str:
    """Returns the delimiter that splits a line into most columns."""
    return (
        max(DELIMITERS, key=line.count)
        if len(line) > csv.field_size_limit()
        else max(DELIMITERS, key=lambda mark: len(next(csv.reader([line], delimiter=mark), [])))
    )


def looks_like_table(first: str, second: str) -> bool:
    """Whether two lines are the names and the first row of a table, in a file whose name does not say so."""
    try:
        mark = delimiter_of(first)
        names, cells = (next(csv.reader([line], delimiter=mark), []) for line in (first, second))
    except csv.Error:
        return False
    named = [name for name in names if re.fullmatch(r"[^\W\d][^:={}]{0,80}", name.strip())]
    return len(names) > 1 and len(cells) == len(names) and len(named) >= len(names) - 1 and any(map(place, named))


class TableReader:
    """Reads the rows of a table into a store, a few or many at a time.

    Attributes:
        runs: Values of the first column that names runs, with the number of their rows.
    """

    def __init__(self, store: Store, delimiter: str | None = None) -> None:
        self._store, self._delimiter = store, delimiter
        self._names: list[str] = []
        self._chart: dict[int, tuple[str, str]] = {}
        self._long: tuple[int, int, int] | None = None
        self._texts: dict[int, str] = {}
        self._short: list[str] = []
        self._contexts: dict[tuple[str, ...], Context] = {}
        self._num_longer = self._num_broken = self._num_means = 0
        self._range: dict[int, tuple[int, int]] = {}
        self._has_commas = False
        self.runs: Counter[str] = Counter()

    def feed(self, lines: Iterable[str]) -> None:
        """Reads further lines.

        Raises:
            csv.Error: If a cell is longer than any cell of a log.
        """
        source = iter(lines)
        if not self._names:
            for first in source:
                if first.strip():
                    self._begin(first.rstrip("\n"))
                    break
            else:
                return
        assert self._delimiter is not None
        # A cell that holds several lines keeps their ends.
        whole = (line if line.endswith("\n") else f"{line}\n" for line in source)
        self._rows(csv.reader(whole, delimiter=self._delimiter))

    def _begin(self, first: str) -> None:
        self._delimiter = self._delimiter or delimiter_of(first)
        names = [name.strip() for name in next(csv.reader([first], delimiter=self._delimiter), [])]
        self._names = names
        kinds = [plain(name) for name in names]
        charts = {at: found for at, name in enumerate(names) if (found := _CHART.match(name)) is not None}
        charts = {at: found for at, found in charts.items() if names[at] not in self._store.asked}
        keys = [at for at, kind in enumerate(kinds) if kind in _KEYS]
        steps = [at for kind in _STEPS for at, other in enumerate(kinds) if other == kind]
        if keys and steps and "value" in kinds:
            self._long = (keys[0], kinds.index("value"), steps[0])
        elif any(found["of"] for found in charts.values()) or (charts and len(charts) >= len(names) - 2):
            self._chart = {at: (found["run"], found["metric"]) for at, found in charts.items() if not found["of"]}
            for at in self._chart:
                ends = [f"{names[at]}__MIN", f"{names[at]}__MAX"]
                if set(ends) <= set(names):
                    self._range[at] = (names.index(ends[0]), names.index(ends[1]))
            self._names = [name if at not in charts else "" for at, name in enumerate(names)]
        taken = self._long[0] if self._long else -1
        self._texts = {
            at: kind for at, kind in enumerate(kinds) if kind in SPLIT_NAMES | RUN_COLUMNS | RANK_NAMES and at != taken
        }
        for name in self._names if self._long is None else ():
            if name:
                self._store.is_wanted(name)

    def _rows(self, rows: Iterator[list[str]]) -> None:
        names, width = self._names, len(self._names)
        use = [(at, name) for at, name in enumerate(names) if name and self._store.is_wanted(name)]
        is_plain = not self._texts and self._long is None and not self._chart
        while batch := [row for row in islice(rows, NUM_ROWS) if row]:
            if self._short:
                batch.insert(0, self._short)
                self._short = []
            if len(batch[-1]) < width:
                self._short = batch.pop()
            self._num_longer += sum(len(row) > width for row in batch)
            self._num_broken += sum("\n" in cell for row in batch for cell in row)
            if not (is_plain and self._add_batch(batch, use)):
                places = [at for at, _ in use] if self._long is None else [self._long[1], self._long[2]]
                places += [*self._chart, *(at for ends in self._range.values() for at in ends)]
                batch = self._with_points(batch, places)
                for row in batch:
                    self._add(row, use)

    def _with_points(self, batch: list[list[str]], places: Sequence[int]) -> list[list[str]]:
        """Returns rows with decimal points for decimal commas, once a number showed that the commas are decimal."""
        cells = [(row, at) for row in batch for at in places if at < len(row) and "," in row[at]]
        self._has_commas = self._has_commas or any(_DECIMAL_COMMA.fullmatch(row[at]) for row, at in cells)
        for row, at in cells if self._has_commas else ():
            if _ANY_COMMA.fullmatch(row[at]):
                row[at] = row[at].replace(".", "").replace(",", ".")
        return batch

    def finish(self, *, is_cut: bool) -> None:
        """Reads the last row if it is short, unless the text ends within it."""
        if self._short and not is_cut:
            self._add(self._short, [(at, name) for at, name in enumerate(self._names) if name])
            self._short = []

    def _add(self, row: Sequence[str], use: Sequence[tuple[int, str]]) -> None:
        context = self._context(row) if self._texts else Context()
        if self._long is not None:
            self._add_long(row, context)
        elif self._chart:
            self._add_chart(row, use)
        else:
            self._store.add({name: row[at].strip() for at, name in use if at < len(row)}, context)

    def _add_batch(self, batch: Sequence[Sequence[str]], use: Sequence[tuple[int, str]]) -> bool:
        """Adds rows of numbers without gaps at once; returns whether they were such rows."""
        by_name = {name: at for at, name in use}  # of several columns with a name, the last counts
        try:
            columns = [[float(row[at]) for row in batch] for at in by_name.values()]
        except (ValueError, IndexError):
            return False
        count = self._store.count
        if columns:
            self._store.table(Context(), list(by_name)).extend(range(count, count + len(batch)), columns)
        self._store.count += len(batch)
        return True

    def _context(self, row: Sequence[str]) -> Context:
        texts = tuple(row[at] if at < len(row) else "" for at in self._texts)
        if texts not in self._contexts:
            context = Context()
            for kind, text in zip(self._texts.values(), texts, strict=True):
                if kind in RANK_NAMES:
                    context = context._replace(rank=rank_of(text.strip()))
                elif kind in SPLIT_NAMES:
                    context = context._replace(kind="validation") if IS_VALIDATION.search(text) else context
                elif not context.run:
                    context = context._replace(run=text.strip())
            self._contexts[texts] = context
        found = self._contexts[texts]
        self.runs[found.run] += 1
        return found

    def _add_long(self, row: Sequence[str], context: Context) -> None:
        assert self._long is not None
        key, value, step = self._long
        if len(row) > max(self._long):
            self._store.add({self._names[step]: row[step].strip(), row[key].strip(): row[value].strip()}, context)

    def _add_chart(self, row: Sequence[str], use: Sequence[tuple[int, str]]) -> None:
        shared = {name: row[at].strip() for at, name in use if at < len(row)}
        by_run: dict[str, dict[str, str]] = {}
        for at, (run, metric) in self._chart.items():
            if at < len(row) and row[at].strip():
                least, largest = self._range.get(at, (at, at))
                self._num_means += largest < len(row) and not row[least] == row[at] == row[largest]
                by_run.setdefault(run, {})[metric] = row[at].strip()
        for run, values in by_run.items():
            self._store.add(shared | values, Context(run=run))

    def problems(self, *, is_cut: bool) -> list[str]:
        """Returns what was left out, with the reason; ``is_cut`` says that the text does not end with a line."""
        found = []
        if is_cut and self._short:
            shown = (self._delimiter or ",").join(self._short)
            found.append(f"the last row was cut off and is left out: `{shown}`")
        if self._has_commas:
            found.append("commas in numbers are read as decimal, as in 0,5")
        if self._num_longer:
            found.append(
                f"{counted(self._num_longer, 'row has', 'rows have')} more cells than the table has columns; the extra "
                "cells are left out"
            )
        if self._num_broken:
            found.append(
                f"{counted(self._num_broken, 'cell holds', 'cells hold')} several lines, as if a quote was not closed"
            )
        if self._num_means:
            found.append(
                f"{counted(self._num_means, 'value of the chart is', 'values of the chart are')} a mean of several "
                "steps, as the least and the largest value beside it show; peaks are flattened. Export the run with "
                "`run.scan_history()` to see every step"
            )
        if twice := [name for name, count in Counter(self._names).items() if name and count > 1]:
            found.append(f"several columns are called {', '.join(twice)}; only the last of them is read")
        return found
