"""Store: the numbers of a log that may be of use, by column, in as little memory as they take."""

from __future__ import annotations

import re
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from smoothdiag.logs.names import IS_VALIDATION, RANK_NAMES, RUN_NAMES, SPLIT_NAMES, place, plain, role_of
from smoothdiag.rows import shown

Entry = Mapping[str, Any]

PART: Final = 1 << 18
NUM_EXACT: Final = 4
"""Parts of a column that keep 64 bits of each number; later parts keep 32, which is more digits than a log prints."""

NUM_RATES: Final = 1 << 22
"""Rows beyond which learning rates are kept only if they were asked for, because the review makes nothing of them."""

NUM_NAMES: Final = 100_000
"""Most names of columns that are kept; a log with more of them writes names that count."""


class Context(NamedTuple):
    """What the row of a log belongs to.

    Attributes:
        kind: "train", "validation", or "summary" of an epoch.
        run: Name of the run; empty if the log names none.
        rank: The process that wrote the row; -1 if the row does not say.
        is_continuation: Whether the row only continues the one before it, as an indented line does.
    """

    kind: str = "train"
    run: str = ""
    rank: int = -1
    is_continuation: bool = False


TRAINING: Final = Context()

FRACTION: Final = re.compile(r"\s*(\d{1,18})\s*/\s*(\d{1,18})\s*")
"""Matches a counter with what it counts to, as ms-swift writes it: "5/500"."""


class Column:
    """A growing column of numbers."""

    def __init__(self) -> None:
        self._parts: list[npt.NDArray[Any] | range] = []
        self._tail = array("d")
        self._num_full = 0
        self.is_forgotten = False

    def extend(self, values: Iterable[float]) -> None:
        """Adds numbers at the end."""
        if self.is_forgotten:
            return
        self._tail.extend(values)
        while len(self._tail) >= PART:
            part, self._tail = np.array(self._tail[:PART]), self._tail[PART:]
            self._parts.append(_compact(part, is_late=self._num_full >= NUM_EXACT))
            self._num_full += 1

    def values(self) -> npt.NDArray[Any]:
        """Returns all numbers; the store keeps them as one array from then on."""
        if self._tail or not self._parts:
            self._parts.append(_compact(np.array(self._tail), is_late=self._num_full >= NUM_EXACT))
            self._tail = array("d")
        joined = _joined(self._parts)
        self._parts = [joined]
        return joined

    def places(self) -> npt.NDArray[Any] | range:
        """Returns all numbers, as a range if they are one."""
        spans = [part for part in self._parts if isinstance(part, range)]
        tail = _compact(np.array(self._tail), is_late=False) if self._tail else range(0)
        if len(spans) == len(self._parts) and isinstance(tail, range):
            spans += [tail] if tail else []
            if spans and all(before.stop == after.start for before, after in pairwise(spans)):
                return range(spans[0].start, spans[-1].stop)
        return self.values()

    def forget(self) -> None:
        """Forgets all numbers, and those to come; NaN stand for them."""
        self.is_forgotten, self._parts, self._tail = True, [], array("d")


def _joined(parts: Sequence[npt.NDArray[Any] | range]) -> npt.NDArray[Any]:
    """Returns parts as one array, of whole numbers if all parts are."""
    if len(parts) == 1 and not isinstance(parts[0], range):
        return parts[0]
    kinds = {np.dtype(np.int32) if isinstance(part, range) else part.dtype for part in parts}
    # Numbers of 64 bits stay as they are, unless there are so many that most have 32.
    kind = np.result_type(*kinds)
    if kind == np.float64 and np.dtype(np.float32) in kinds:
        kind = np.dtype(np.float32)
    joined = np.empty(sum(map(len, parts)), dtype=kind)
    end = 0
    for part in parts:
        begin, end = end, end + len(part)
        joined[begin:end] = np.arange(part.start, part.stop) if isinstance(part, range) else part
    return joined


def _compact(part: npt.NDArray[np.float64], *, is_late: bool) -> npt.NDArray[Any] | range:
    with np.errstate(invalid="ignore"):
        whole = part.astype(np.int32)
    if np.array_equal(whole, part):
        return range(int(whole[0]), int(whole[-1]) + 1) if len(whole) and _is_range(whole) else whole
    with np.errstate(over="ignore"):
        small = part.astype(np.float32)
    return small if is_late and np.array_equal(np.isfinite(small), np.isfinite(part)) else part


def _is_range(whole: npt.NDArray[np.int32]) -> bool:
    return bool(whole[-1] - whole[0] == len(whole) - 1 and np.all(np.diff(whole) == 1))


class Table:
    """The entries of a log that have the same names and belong to the same."""

    def __init__(self, context: Context, names: Sequence[str], asked: Collection[str] = ()) -> None:
        self.context, self.names = context, tuple(names)
        self.where = Column()
        self.columns = {name: Column() for name in names}
        self.length = 0
        self._rates = [name for name in names if role_of(name) == "lr" and name not in asked]

    def extend(self, where: Sequence[int], columns: Sequence[Sequence[float]]) -> None:
        """Adds entries: their numbers in the log, and one sequence of values for each name."""
        self.where.extend(where)
        for column, values in zip(self.columns.values(), columns, strict=True):
            column.extend(values)
        self.length += len(where)
        if self.length > NUM_RATES:
            while self._rates:
                self.columns[self._rates.pop()].forget()


class Store:
    """What a log holds.

    Attributes:
        asked: Names that were asked for.
        names: Names of all columns, in the order of the log.
        tables: Entries with the same names.
        count: Number of entries.
        unread: Number of values of each column that are no numbers, and the first of them in words.
        totals: Largest counts that counters such as 10/1000 name, by column.
        units: Units that are glued to the numbers of a column, as in 2.5nats.
    """

    def __init__(self, asked: Iterable[str | None] = ()) -> None:
        self.names: dict[str, None] = {}
        self.tables: dict[tuple[Context, tuple[str, ...]], Table] = {}
        self.count = 0
        self.unread: dict[str, tuple[int, str]] = {}
        self.totals: dict[str, set[int]] = {}
        self.units: dict[str, set[str]] = {}
        self.asked = {name for name in asked if name is not None}
        self._use: dict[str, bool] = {}

    def is_wanted(self, name: str) -> bool:
        """Whether a column may be of use; keeps its name in any case."""
        use = self._use.get(name)
        if use is None:
            use = name in self.asked or place(name) is not None
            if len(self._use) < NUM_NAMES:
                self._use[name] = use
                self.names[name] = None
        return use

    def add(self, entry: Entry, context: Context = TRAINING) -> None:
        """Adds an entry with its values as the log has them."""
        names, values = [], []
        for name, value in entry.items():
            if value is None or value == "":
                continue
            if isinstance(value, str) and "/" in value and (found := FRACTION.fullmatch(value)) is not None:
                value = found[1]
                self.totals.setdefault(name, set()).add(int(found[2]))
            if not self.is_wanted(name):
                continue
            try:
                values.append([float(value)])
                names.append(name)
            except (TypeError, ValueError, OverflowError):
                self.note_unread(name, value)
        if names:
            self.table(context, names).extend([self.count], values)
        self.count += 1

    def table(self, context: Context, names: Sequence[str]) -> Table:
        """Returns the table of entries with these names."""
        key = (context, tuple(names))
        if key not in self.tables:
            self.tables[key] = Table(context, names, self.asked)
        return self.tables[key]

    def note_unread(self, name: str, value: object) -> None:
        """Notes a value that is no number."""
        count, first = self.unread.get(name, (0, f"{shown(value)} in `{name}`"))
        self.unread[name] = (count + 1, first)


def context_of(entry: Entry, context: Context = TRAINING) -> Context:
    """Returns what an entry belongs to, by the fields that name its data and its run."""
    for name, value in entry.items():
        if (known := plain(name)) in RANK_NAMES:
            context = context._replace(rank=rank_of(value))
        elif isinstance(value, str) and known in _TEXTS:
            if known in SPLIT_NAMES:
                context = context._replace(kind="validation") if IS_VALIDATION.search(value) else context
            else:
                context = context._replace(run=value)
    return context


def rank_of(value: object) -> int:
    """Returns the number of a process; -1 if the value is none."""
    return int(value) if isinstance(value, int | float | str) and str(value).isdigit() else -1


_TEXTS: Final = SPLIT_NAMES | RUN_NAMES
