"""Reading: the rows of a file of JSON lines, and what is wrong with it.

Files of version 1 have no check sums, so their lines are accepted without. From the first line that has a check sum,
every line needs one. So a file of version 1 that was resumed is as safe as any other file from there on.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from smoothdiag.rows import CHECK, clean_row, printable, shown
from smoothdiag.trace.keys import Names, without_repeats
from smoothdiag.trace.lines import COUNT, FORMAT_VERSION, HEADER, RESERVED, RESUMED, Place, parse
from smoothdiag.trace.order import Order

NO_UTF8: Final = "it has bytes that are not UTF-8"
_NO_UTF8: Final = re.compile("[\udc80-\udcff]")


@dataclass
class Contents:
    """What a file holds.

    Attributes:
        meta: Facts about the run.
        rows: Rows that count.
        problems: What was left out, and what is wrong with the file.
        file: Digits that all lines of the file share; None if no line has a check sum.
        next_number: Number of the next line.
    """

    meta: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    file: str | None = None
    next_number: int = 1


def split(source: Path) -> tuple[list[str], bool]:
    """Returns the lines of a file with any kind of line ends, and whether the last line has an end.

    Bytes that are not UTF-8 become half characters, which `undecodable` finds.
    """
    text = source.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = text.split("\n")
    return (lines[:-1], True) if lines[-1] == "" else (lines, False)


def undecodable(line: str) -> bool:
    """Whether a line from `split` holds bytes that are not UTF-8."""
    return not line.isascii() and _NO_UTF8.search(line) is not None


def check_is_trace(source: Path) -> None:
    """Raises a ValueError if a file is not a trace; if its first line is a header, reads no other line."""
    with source.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        value, place = parse(file.readline().rstrip("\n"))
    if value is None or HEADER not in value:
        read(source)
    else:
        _check_version(value, place, source)


def read(source: Path, verify: bool = True) -> Contents:
    """Returns what a file of JSON lines holds.

    Args:
        source: The file.
        verify: Whether a line must pass its check sum and stand in its place. False takes every line that is a row, for
            files that were edited on purpose.

    Raises:
        ValueError: If the file is not a trace, or has a later format version.
    """
    lines, is_ended = split(source)
    found = Contents()
    value, place = parse(lines[0]) if lines else (None, None)
    has_header = value is not None and HEADER in value
    if value is not None and has_header:
        _check_version(value, place, source)
        found.meta = {name: fact for name, fact in value.items() if name not in RESERVED}
        is_sealed = value[HEADER] == FORMAT_VERSION or CHECK in value
    else:
        if not any(parse(line)[1] for line in lines if CHECK in line):
            given = f"`{printable(lines[0][:60])}`" if any(map(str.strip, lines)) else "an empty file"
            raise ValueError(f"`{source}` should be a smoothdiag trace, whose first line is a header. Found {given}.")
        found.problems.append("the header is damaged or missing, so the facts about the run (`meta`) are lost")
        is_sealed = True
    if not verify:
        found.problems = []
        _take_all(lines[int(has_header) :], found, is_ended)
        return found
    order: Order[dict[str, Any]] = Order(1 if is_sealed else None, found.problems)
    if value is not None and has_header and is_sealed:
        if place is None:
            order.lost()
            found.problems.append("the header fails its check sum, so the facts about the run (`meta`) may be wrong")
        else:
            order.counts(1, place)
            count = value.get(COUNT)
            order.expect(count if isinstance(count, int) else None)
    _sort(lines, int(has_header), is_ended, is_sealed, order, found)
    found.rows, twice = without_repeats(_counting(order.finish()))
    found.problems += [] if twice is None else [twice]
    found.file = order.file
    found.next_number = order.next_number if order.file or is_sealed else sum(bool(line.strip()) for line in lines) + 1
    return found


def _check_version(header: dict[str, Any], place: Place | None, source: Path) -> None:
    version = header[HEADER]
    is_damaged = place is None and CHECK in header
    if not is_damaged and (isinstance(version, bool) or version not in range(1, FORMAT_VERSION + 1)):
        raise ValueError(
            f"`{source}` should have format version 1 or {FORMAT_VERSION}. Found {shown(version)}; "
            "read it with the version of smoothdiag that wrote it."
        )


def _sort(
    lines: list[str],
    begin: int,
    is_ended: bool,
    is_sealed: bool,
    order: Order[dict[str, Any]],
    found: Contents,
) -> None:
    """Passes the lines after the header to `order`, or notes why a line is left out."""
    names = Names()
    for number, line in enumerate(lines[begin:], start=begin + 1):
        if not line.strip():
            continue
        value, place = parse(line)
        is_header = value is not None and HEADER in value
        if is_header and (place is None or place.file != order.file):
            found.problems.append(f"line {number} is the header of a second run, whose rows are left out")
            if not is_sealed and order.file is None:
                return
        if place is not None:
            is_sealed = True
            content = None if is_header else _content(number, value or {}, found.problems)
            if content is not None:
                order.add(number, content, place)
            else:
                order.counts(number, place)
        elif is_header:
            order.damaged(number, "it is a second header")
        elif not is_ended and number == len(lines) and value is None:
            order.damaged(number, "half-written")
        elif undecodable(line):
            order.damaged(number, NO_UTF8)
        elif value is None:
            order.damaged(number, "not JSON")
        elif is_sealed or CHECK in value:
            order.damaged(number, "its check sum fails" if CHECK in value else "its check sum is missing")
        elif RESUMED not in value and (wrong := names.wrong(value.keys())):
            order.damaged(number, wrong)
        elif content := _content(number, value, found.problems):
            names = Names() if RESUMED in content else names
            order.add(number, content)


def _content(number: int, value: dict[str, Any], problems: list[str]) -> dict[str, Any] | None:
    """Returns the row of a line, or the step at which it says the run was resumed; notes a line that is neither."""
    try:
        if RESUMED not in value:
            return clean_row(value)
        step = value[RESUMED]
        if isinstance(step, int) and not isinstance(step, bool):
            return {RESUMED: step}
        raise ValueError(f"it should say the step at which the run was resumed. Found {shown(step)}")
    except ValueError as error:
        problems.append(f"line {number} left out: {error}")
        return None


def _counting(contents: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows that count, in the order of writing: a resumed run replaces the rows of steps it takes again."""
    rows: list[dict[str, Any]] = []
    for content in contents:
        if RESUMED in content:
            rows = [row for row in rows if row["step"] < content[RESUMED]]
        else:
            rows.append(content)
    return rows


def _take_all(lines: list[str], found: Contents, is_ended: bool) -> None:
    contents = []
    for number, line in enumerate(lines, start=2):
        value, _ = parse(line)
        if value is None and line.strip():
            is_cut = not is_ended and number == len(lines) + 1
            found.problems.append(f"line {number} left out: {'half-written' if is_cut else 'not JSON'}")
        elif value is not None and HEADER not in value:
            contents.append(_content(number, value, found.problems))
    found.rows = _counting(content for content in contents if content is not None)
    twice = without_repeats(found.rows)[1]
    found.problems += [] if twice is None else [f"{twice.rsplit(';', 1)[0]}; all of them count"]
