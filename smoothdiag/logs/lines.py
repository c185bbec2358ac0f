"""Lines: console text and JSON lines, read line by line; lines like earlier ones are read by one pattern."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

from smoothdiag.console import counted
from smoothdiag.logs.names import RANK_NAMES, RUN_NAMES, SPLIT_NAMES, plain, role_of
from smoothdiag.logs.shapes import LONGEST, Line, Value, json_of, number, read_line
from smoothdiag.logs.store import FRACTION, Context, Store, context_of

NUM_SHAPES: Final = 48
NUM_IDLE: Final = 16
"""Most patterns for lines with numbers of use, and for lines without."""

_ESCAPE: Final = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
"""Matches colours and movements of a terminal."""

_ASSIGNMENT: Final = re.compile(r"\s+[\w.]+(?:: \w+)? [-+*/]?= ")
"""Matches lines of code, which some trainers print before they run it."""

_CONTROL: Final = re.compile(r"[\x00-\x08\x0e-\x1f]")

_HAS_NUMBER: Final = re.compile(r"\d|nan|inf", re.IGNORECASE)

_TOKEN: Final = re.compile(r"\d+(?:[.,]\d+)*(?:[eE][-+]?\d+)?|\s+|(?<=%)\s*\|[^|]*\|")
_PLAIN: Final = re.compile(r"[-+]?\d+\.?\d*(?:[eE][-+]?\d+)?")
_ANY_NUMBER: Final = r"\d[\d.,]*(?:[eE][-+]?\d+)?"
_WANTED: Final = r"([-+]?\d+\.?\d*(?:[eE][-+]?\d+)?)"


class Shape:
    """Lines that differ in their numbers alone."""

    def __init__(
        self,
        pattern: re.Pattern[str],
        names: Sequence[str],
        scales: Sequence[float],
        context: Context,
        *,
        is_json: bool,
    ) -> None:
        self.match = pattern.fullmatch
        self.names, self.scales, self.context = names, scales, context
        self.is_json = is_json
        self.rows: list[tuple[str, ...]] = []
        self.where: list[int] = []
        self.hits = 0

    def flush(self, store: Store) -> None:
        """Moves the numbers that were read into the store."""
        self.hits = max(self.hits, len(self.where))
        if not self.rows:
            return
        columns = [list(map(float, column)) for column in zip(*self.rows, strict=True)]
        for place_, scale in enumerate(self.scales):
            if scale != 1:
                columns[place_] = [scale * value for value in columns[place_]]
        store.table(self.context, self.names).extend(self.where, columns)
        self.rows, self.where = [], []


class LineReader:
    """Reads lines into a store, a few or many at a time.

    Attributes:
        num_lines: Lines so far.
        num_empty: Lines that are empty.
        num_json: Lines that hold nothing but a JSON object.
        num_without: Lines without a number of use.
        first_without: Number of the first such line.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._shapes: list[Shape] = []
        self._num_idle = 0
        self.num_lines = self.num_empty = self.num_json = self.num_without = self.first_without = 0

    def feed(self, lines: Iterable[str], *, is_cut: bool = False) -> None:
        """Reads further lines; ``is_cut`` says that the last one has no end.

        Half a line is read only if it is like lines before it, because its last number may lack digits.
        """
        if is_cut:
            *lines, last = lines
            self._feed(lines)
            shapes = [shape for shape in self._shapes if shape.names]
            if shapes and not any(shape.match(_ESCAPE.sub("", last)) for shape in shapes) and "{" not in last:
                self.num_lines += 1
                self._without()
                return
            lines = [last]
        self._feed(lines)

    def problems(self, *, of_json: bool) -> list[str]:
        """Returns what was left out of a log whose lines should all be JSON."""
        num_other = self.num_lines - self.num_empty - self.num_json
        if not (num_other and of_json):
            return []
        return [
            f"{counted(num_other, 'line is', 'lines are')} left out because only JSON objects can be read; the first "
            f"is line {self.first_without}"
        ]

    def _feed(self, lines: Iterable[str]) -> None:
        store, shapes = self._store, self._shapes
        count, number_of_line = store.count, self.num_lines
        for line in lines:
            number_of_line += 1
            if "\x1b" in line:
                line = _ESCAPE.sub("", line)
            for shape in shapes:
                if found := shape.match(line):
                    if shape.names:
                        shape.rows.append(found.groups())
                        shape.where.append(count)
                        count += 1
                    else:
                        shape.hits += 1
                    break
            else:
                store.count, self.num_lines = count, number_of_line
                self._read(line)
                count = store.count
        store.count, self.num_lines = count, number_of_line
        for shape in shapes:
            self.num_without += 0 if shape.names else shape.hits
            self.num_json += len(shape.where) if shape.is_json else 0
            shape.flush(store)
        shapes.sort(key=lambda shape: -shape.hits)
        for shape in shapes:
            shape.hits = 0

    def _read(self, line: str) -> None:
        """Reads a line that is unlike the lines before it."""
        clean = _CONTROL.sub("", line).rstrip()
        if not clean:
            self.num_empty += 1
            return
        found = json_of(clean) if "{" in clean else None
        if found is not None:
            self._read_object(clean, found)
        elif _HAS_NUMBER.search(clean):
            self._read_words(clean)
        else:
            self._without()

    def _read_object(self, line: str, found: dict[str, Any]) -> None:
        before = line[: line.index("{")]
        self.num_json += not before.strip()
        around = read_line(before) if before.strip() else None
        context = Context(kind=around.kind, rank=around.rank) if around else Context()
        entry, context = flat(found), context_of(flat(found), context)
        before_count = self._store.count
        self._store.add(entry, context)
        is_simple = not any(isinstance(value, list) or _is_fraction(value) for value in entry.values())
        if entry == found and is_simple:
            self._learn_object(line, entry, context, before_count)

    def _learn_object(self, line: str, entry: dict[str, Any], context: Context, at: int) -> None:
        """Learns the shape of a line of JSON if reading it as words finds the same numbers."""
        read = read_line(line)
        wanted = [name for name, value in entry.items() if value not in (None, "") and self._store.is_wanted(name)]
        by_name = {value.name: value for value in read.values}
        same = [name in by_name and _PLAIN.fullmatch(by_name[name].text) is not None for name in wanted]
        if not wanted or not all(same) or any(plain(name) in _TEXT_FIELDS for name in entry):
            return
        values = [by_name[name] for name in wanted]
        if all(_agrees(value, entry[value.name]) for value in values) and at < self._store.count:
            self._learn(line, values, read, context, is_json=line.startswith("{"))

    def _read_words(self, line: str) -> None:
        if _ASSIGNMENT.match(line):
            self._without()
            return
        read = read_line(line)
        wanted = [value for value in read.values if self._store.is_wanted(value.name)]
        use = [value for value in wanted if value.is_readable]
        context = Context(read.kind, "", read.rank, read.is_continuation)
        for value in wanted:
            if not value.is_readable:
                self._store.note_unread(value.name, line[value.start : value.end + 4].split(" ")[0])
            if value.total:
                self._store.totals.setdefault(value.name, set()).add(value.total)
            if value.unit and value.unit not in "kKMGBT" and value.name not in self._store.units:
                self._store.units[value.name] = {value.unit}
        roles = {role_of(value.name) for value in use}
        # A rate alone says nothing, unless later lines continue it.
        if not use or (roles <= {"lr"} and not read.is_continuation):
            self._without()
            if self._num_idle < NUM_IDLE and len(use) == len(wanted):
                self._num_idle += 1
                self._learn(line, [], read, context)
            return
        names = list(dict.fromkeys(value.name for value in use))
        values = [next(value for value in use if value.name == name) for name in names]
        table = self._store.table(context, names)
        table.extend([self._store.count], [[number(value.text, value.unit)] for value in values])
        self._store.count += 1
        if len(wanted) == len(use):
            self._learn(line, values, read, context)

    def _learn(self, line: str, values: list[Value], read: Line, context: Context, *, is_json: bool = False) -> None:
        if (len(self._shapes) - self._num_idle >= NUM_SHAPES and values) or len(line) > LONGEST:
            return
        if (pattern := pattern_of(line, values, read.fixed)) is not None:
            names = [value.name for value in sorted(values, key=lambda value: value.start)]
            scales = [number("1", value.unit) for value in sorted(values, key=lambda value: value.start)]
            self._shapes.append(Shape(pattern, names, scales, context, is_json=is_json))

    def _without(self) -> None:
        self.num_without += 1
        self.first_without = self.first_without or self.num_lines


_TEXT_FIELDS: Final = RANK_NAMES | RUN_NAMES | SPLIT_NAMES


def _is_fraction(value: object) -> bool:
    return isinstance(value, str) and FRACTION.fullmatch(value) is not None


def _agrees(value: Value, found: object) -> bool:
    return isinstance(found, int | float | str) and not isinstance(found, bool) and float(found) == float(value.text)


def flat(entry: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns an entry with the names of nested values joined by a slash, as in ``train/loss``."""
    found: dict[str, Any] = {}
    for name, value in entry.items():
        found |= flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def pattern_of(line: str, values: Sequence[Value], fixed: Sequence[tuple[int, int]]) -> re.Pattern[str] | None:
    """Returns a pattern for lines that differ from a line in their numbers alone; None if that cannot be told.

    Args:
        line: The line.
        values: Numbers that the pattern finds, as groups in the order of the line.
        fixed: Places of numbers that must be the same.
    """
    parts, end = [], 0
    places = sorted((value.start, value.end, value.text) for value in values)
    for start, stop, text in places:
        if start < end:
            return None
        parts.append(_escaped(line[end:start], end, fixed))
        if _PLAIN.fullmatch(text):
            parts.append(_WANTED)
        elif "," in text:
            return None
        else:
            parts.append(f"({re.escape(text)})")
        end = stop
    parts.append(_escaped(line[end:], end, fixed) + r"\s*")
    return re.compile("".join(parts))


def _escaped(text: str, offset: int, fixed: Sequence[tuple[int, int]]) -> str:
    """Returns a pattern for a text that lets numbers and the width of spaces vary."""
    parts, end = [], 0
    for token in _TOKEN.finditer(text):
        parts.append(re.escape(text[end : token.start()]))
        end = token.end()
        if token[0][0].isdigit():
            is_fixed = any(start <= offset + token.start() < stop for start, stop in fixed)
            parts.append(re.escape(token[0]) if is_fixed else _ANY_NUMBER)
        elif "|" in token[0]:
            parts.append(r"\s*\|[^|]*\|")
        else:
            # A number that grows takes the place of spaces, but two words stay apart.
            beside = text[token.start() - 1 : token.start()] + text[end : end + 1]
            is_apart = len(beside) == 2 and beside.isalnum()
            parts.append(r"\s+" if is_apart else r"\s*")
    parts.append(re.escape(text[end:]))
    return "".join(parts)
