"""Tables: rows in .csv and .parquet files, and what is wrong with such a file.

In a .csv file the last cell of each row says which row of how many it is, with a check sum over the cells of the row
and the names of the columns. Tables from other programs or from version 1 have no such column.
"""

import csv
import io
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from smoothdiag.console import counted
from smoothdiag.rows import CHECK, COLUMNS, REQUIRED, clean_row, printable
from smoothdiag.trace.cells import cell, escaped, plain
from smoothdiag.trace.keys import resembled, without_repeats
from smoothdiag.trace.lines import Place, place_of
from smoothdiag.trace.order import EDITED, Order
from smoothdiag.trace.reading import NO_UTF8, Contents, split, undecodable

if TYPE_CHECKING:
    import pandas as pd

_JOINT: Final = "\x1f"
"""Separates cells in the text for the check sum; no cell holds this character."""

_MOST_LINES: Final = 20
"""Most lines that one cell in quotes may hold."""


def write_csv(target: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows as a table with check sums; a table without rows has no column for check sums."""
    columns = [*COLUMNS, *dict.fromkeys(key for row in rows for key in row if key not in COLUMNS)]
    names = [escaped(name) for name in columns]
    start = _start(names)
    table = [[cell(row.get(column)) for column in columns] for row in rows]
    joined = [_JOINT.join(cells) for cells in table]
    file = f"{zlib.crc32(_JOINT.join(joined).encode('utf-8'), start):08x}"
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, *([CHECK] if rows else [])])
    for number, (cells, whole) in enumerate(zip(table, joined, strict=True), start=2):
        writer.writerow([*cells, Place(file, number, len(rows)).seal(whole, start)])
    target.write_bytes(text.getvalue().encode("utf-8"))


def read_csv(source: Path, verify: bool = True) -> Contents:
    """Returns what a table holds.

    Args:
        source: The file.
        verify: Whether a row that has a check sum must pass it and stand in its place.

    Raises:
        ValueError: If the file is not a table of rows, or the names of its columns are damaged.
    """
    lines, is_ended = split(source)
    found = Contents()
    parsed = _parsed(lines, joining=not any(CHECK in line for line in lines[:1]))
    _, head = next(parsed, (0, []))
    given = head if isinstance(head, list) else lines[:1]
    has_checks = CHECK in given
    names = [plain(name) for name in given] if has_checks else given
    _check_columns(names, source)
    if verify and not has_checks:
        _check_names(names, lines[1] if len(lines) > 1 else "", source)
    order: Order[dict[str, Any]] = Order(2 if has_checks else None, found.problems)
    at, start = (given.index(CHECK), _start([name for name in given if name != CHECK])) if has_checks else (0, 0)
    for number, cells in parsed:
        if isinstance(cells, str):
            order.damaged(number, cells)
        elif len(cells) != len(names):
            order.damaged(number, f"it has {counted(len(cells), 'cell')} instead of {len(names)}")
        elif cells == given:
            found.problems.append(f"line {number} repeats the names of the columns, as if two tables had been joined")
            if verify and not has_checks:
                found.problems[-1] += "; the rows from there on are left out"
                break
        elif not (has_checks and verify):
            if verify and not is_ended and number == len(lines):
                order.damaged(number, "it has no line end, so it may be cut off")
            elif row := _row(number, names, cells, has_checks, found):
                order.add(number, row)
        else:
            place = place_of(cells[at])
            if place is None or place.seal(_JOINT.join(cells[:at] + cells[at + 1 :]), start) != cells[at]:
                order.damaged(number, "its check sum fails" if cells[at] else "its check sum is missing")
            elif row := _row(number, names, cells, True, found):
                order.add(number, row, place)
            else:
                order.counts(number, place)
    if has_checks and len(lines) == 1:
        found.problems.append("all rows are missing that the file once had")
    found.rows = order.finish()
    _say_repeats(found, verify)
    return found


def write_parquet(target: Path, frame: "pd.DataFrame") -> None:
    """Writes a table as .parquet.

    Raises:
        ImportError: If pyarrow is not installed.
        ValueError: If a column holds values of several types.
    """
    try:
        frame.to_parquet(target, index=False, engine="pyarrow", write_page_checksum=True)
    except (ImportError, OSError):
        raise
    except Exception as error:  # The exceptions of pyarrow have many classes.
        raise ValueError(f"`{target}` could not be written as .parquet: {error}") from error


def read_parquet(source: Path, verify: bool = True) -> Contents:
    """Returns what a table holds.

    Raises:
        ImportError: If pyarrow is not installed.
        ValueError: If the file is not a table of rows.
    """
    import pandas as pd

    found = Contents()
    try:
        table = pd.read_parquet(source, engine="pyarrow", page_checksum_verification=verify)
        records = table.to_dict("records")
    except ImportError:
        raise
    except Exception as error:  # The exceptions of pyarrow, and of reading its metadata, have many classes.
        cause = printable(str(error).strip().split("\n")[0])
        raise ValueError(f"`{source}` should be a .parquet table. Found: {type(error).__name__}: {cause}") from error
    _check_columns([str(name) for name in table.columns], source)
    for number, row in enumerate(records, start=1):
        given = {str(name): value for name, value in row.items() if not _is_absent(value)}
        if (clean := _clean(number, given, found)) is not None:
            found.rows.append(clean)
    _say_repeats(found, verify)
    return found


def _start(names: Sequence[str]) -> int:
    """Returns the check sum of the names of the columns, with which the check sum of each row begins."""
    return zlib.crc32(_JOINT.join(names).encode("utf-8", "surrogateescape"))


def _parsed(lines: list[str], joining: bool) -> Iterator[tuple[int, list[str] | str]]:
    """Yields for each row the number of its line with its cells, or with the reason why it cannot be read.

    A quote that is not closed must not hide other rows. So lines are read one by one. Only in tables from other
    programs, a line is joined with the next ones if they close its quote.
    """
    at = 0
    while at < len(lines):
        begin, line = at, lines[at]
        at += 1
        if not line.strip():
            continue
        if undecodable(line):
            yield at, NO_UTF8
            continue
        try:
            yield at, next(csv.reader([line], strict=True))
        except csv.Error as error:
            for end in range(begin + 2, min(begin + _MOST_LINES, len(lines)) + 1 if joining else 0):
                try:
                    cells = next(csv.reader([f"{part}\n" for part in lines[begin:end]], strict=True))
                except csv.Error:
                    continue
                yield end, cells
                at = end
                break
            else:
                yield begin + 1, f"it is not a row of a table: {error}"


def _check_columns(names: list[str], source: Path) -> None:
    found = ", ".join(map(printable, names)) or "an empty file"
    if any(name not in names for name in REQUIRED):
        raise ValueError(
            f"`{source}` should be a smoothdiag trace with the columns {', '.join(REQUIRED)}, separated by commas. "
            f"Found {found}."
        )
    if len(set(names)) < len(names):
        raise ValueError(f"`{source}` should have every column only once. Found {found}.")


def _check_names(names: list[str], line: str, source: Path) -> None:
    """Refuses a table without check sums whose column names are damaged, because then no row could be right."""
    for name in names:
        if name not in COLUMNS and (meant := resembled(name)) is not None and meant not in names:
            raise ValueError(
                f"`{source}` should have the column `{meant}`. Found `{printable(name)}` instead; rename this column, "
                "or read the table as it is with `Trace.read(path, verify=False)`."
            )
    if any(place_of(text.strip()) for text in line.rsplit(",", 1)[-1:]):
        raise ValueError(f"`{source}` should have the column `{CHECK}`, as its rows do. Found none. {EDITED}.")


def _row(number: int, names: list[str], cells: list[str], escaped: bool, found: Contents) -> dict[str, Any] | None:
    if escaped:
        cells = [plain(text) if text[:1] == "'" or "\\u" in text else text for text in cells]
    return _clean(number, {name: text for name, text in zip(names, cells, strict=True) if text != ""}, found)


def _clean(number: int, row: Mapping[str, Any], found: Contents) -> dict[str, Any] | None:
    try:
        return clean_row(row)
    except ValueError as error:
        found.problems.append(f"line {number} left out: {error}")
        return None


def _say_repeats(found: Contents, verify: bool) -> None:
    rows, twice = without_repeats(found.rows)
    if twice is not None:
        found.problems.append(twice if verify else f"{twice.rsplit(';', 1)[0]}; all of them count")
    if verify:
        found.rows = rows


def _is_absent(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value == "")
