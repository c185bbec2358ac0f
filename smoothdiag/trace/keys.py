"""Keys: finds damage by the column names of lines without a check sum, and by rows that come twice."""

from collections.abc import Collection, Iterable
from functools import lru_cache
from itertools import takewhile
from typing import Any, Final

from smoothdiag.console import counted
from smoothdiag.rows import CHECK, COLUMNS, KEY, printable, shown

_MOST: Final = len(COLUMNS) // 2
"""A line with more columns than this was written by the package, which writes all columns, and not by hand."""

_ALWAYS: Final = frozenset(COLUMNS) - {"two_scale", "grad_variance", "noise_scale"}
"""Columns that the package has always written, from its first version on."""


class Names:
    """Checks the column names of lines without a check sum, one line after the other.

    A line is damaged if it has most columns, but lacks one that the package always wrote or that an earlier line of
    this kind has. It is also damaged if it has a name that is no column and hardly differs from a column that the line
    lacks. A line with few columns may be written by hand, so there missing columns are no damage.
    """

    def __init__(self) -> None:
        self._written = _ALWAYS

    def wrong(self, names: Collection[str]) -> str | None:
        """Returns what is wrong with the names of a line; None if nothing is."""
        known = COLUMNS.keys() & names
        if len(known) < len(names):
            for name in names:
                if name not in COLUMNS and (meant := resembled(name)) is not None and meant not in names:
                    return f"Column `{meant}` is missing, and `{printable(name)}` hardly differs from it"
        if len(known) > _MOST:
            if missing := self._written - known:
                return f"Columns are missing that the package always wrote: {', '.join(sorted(missing))}"
            self._written |= known
        return None


@lru_cache(maxsize=1000)
def resembled(name: str) -> str | None:
    """Returns the column that the name would be with one character changed, added or removed; None if there is none."""
    return next((column for column in (*COLUMNS, CHECK) if len(column) > 3 and _is_near(name, column)), None)


def _is_near(name: str, column: str) -> bool:
    start = _num_alike(name, column)
    rest, other = name[start:], column[start:]
    return name != column and max(len(rest), len(other)) - _num_alike(rest[::-1], other[::-1]) <= 1


def _num_alike(one: str, other: str) -> int:
    """Returns the number of characters with which both texts begin."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def without_repeats(rows: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], str | None]:
    """Returns the last row of each `KEY`, and a message if rows were left out."""
    last: dict[tuple[Any, ...], dict[str, Any]] = {}
    first, count = None, 0
    for row in rows:
        key = tuple(map(row.get, KEY))
        if last.pop(key, None) is not None:
            count += 1
            first = row if first is None else first
        last[key] = row
    if first is None:
        return list(last.values()), None
    return list(last.values()), (
        f"{counted(count, 'row comes', 'rows come')} twice, for example because two processes wrote to one file. The "
        "first is step "
        f"{first['step']} of estimator {shown(first['estimator'])}, group {shown(first['group'])}; the later row of "
        "each pair counts"
    )
