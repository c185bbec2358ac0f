"""Keys: what the names in a line without a check sum, and rows that come twice, tell of damage."""

from collections.abc import Collection, Iterable
from functools import lru_cache
from itertools import takewhile
from typing import Any, Final

from smoothdiag.rows import CHECK, COLUMNS, KEY, printable, shown

_MOST: Final = len(COLUMNS) // 2
"""Columns beyond which a line was written by the package, which writes all of them, and not by hand."""

_ALWAYS: Final = frozenset(COLUMNS) - {"two_scale", "grad_variance", "noise_scale"}
"""Columns that the package has written from its first version on."""


class Names:
    """Looks at the names of lines that carry no check sum, one after the other.

    A line is damaged that holds most columns and lacks one that the package always wrote, or that an earlier such line
    has; or a name that is no column and hardly differs from a column that the line lacks. A line with few columns, as
    written by hand, lacks nothing.
    """

    def __init__(self) -> None:
        self._written = _ALWAYS

    def wrong(self, names: Collection[str]) -> str | None:
        """Returns what is wrong with the names of a line, if anything is."""
        known = COLUMNS.keys() & names
        if len(known) < len(names):
            for name in names:
                if name not in COLUMNS and (meant := resembled(name)) is not None and meant not in names:
                    return f"Column `{meant}` is missing, and `{printable(name)}` hardly differs from it"
        if len(known) > _MOST:
            if missing := self._written - known:
                return f"Columns are missing that were always written: {', '.join(sorted(missing))}"
            self._written |= known
        return None


@lru_cache(maxsize=1000)
def resembled(name: str) -> str | None:
    """Returns the column that a name differs from in one character: another one, one more, or one less."""
    return next((column for column in (*COLUMNS, CHECK) if len(column) > 3 and _is_near(name, column)), None)


def _is_near(name: str, column: str) -> bool:
    start = _num_alike(name, column)
    rest, other = name[start:], column[start:]
    return name != column and max(len(rest), len(other)) - _num_alike(rest[::-1], other[::-1]) <= 1


def _num_alike(one: str, other: str) -> int:
    """Returns how many characters two texts begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def without_repeats(rows: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], str | None]:
    """Returns the rows, the last of each `KEY`, and what to say where others were left out."""
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
        f"{count} rows come twice, as where two processes wrote one file; the first of them is step {first['step']} of "
        f"estimator {shown(first['estimator'])}, group {shown(first['group'])}; the later row of each counts"
    )
