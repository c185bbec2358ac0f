"""Formats: reads the entries of a log from a file or a TensorBoard folder."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from smoothdiag.console import counted
from smoothdiag.requirements import installed_by

Entry = dict[str, Any]

TAKEN: Final = ".csv, .tsv, .json, .jsonl or .ndjson (with .gz added if compressed)"

SCALAR: Final = ("Wall time", "Step", "Value")
"""Columns of one scalar that was downloaded from TensorBoard; the JSON download does not name them."""

_DELIMITERS: Final = ",;\t"

_EVENTS: Final = "tfevents"
"""Part of the name of every file that TensorBoard reads."""

_LOGS: Final = (f"*{_EVENTS}*", "trainer_state.json", "metrics.csv")
"""Names of logs that trainers put into folders."""


def read_entries(source: Path, problems: list[str]) -> list[Entry]:
    """Returns the entries of a log, with nested names joined by a slash; adds to ``problems`` what it left out.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If the log needs TensorBoard, which is not installed.
        ValueError: If the file is no log of named values.
    """
    if not source.exists():
        raise FileNotFoundError(f"There is no log at `{source}`.")
    name = source.name.lower()
    is_packed = name.endswith(".gz")
    suffix = "" if source.is_dir() else Path(name.removesuffix(".gz")).suffix
    if suffix in (".csv", ".tsv"):
        found: Any = _from_table(_text(source, is_packed), source, problems)
    elif suffix in (".json", ".jsonl", ".ndjson"):
        found = _from_json(_text(source, is_packed), problems)
    elif source.is_dir() or _EVENTS in source.name:
        found = _from_events(source)
    else:
        raise ValueError(
            f"Parameter `path` should end in {TAKEN}, or be a TensorBoard folder. Found `{source}`. If the file holds "
            "what the Trainer of Hugging Face printed, take trainer_state.json in its newest checkpoint instead."
        )
    try:
        entries = [_flat(entry) for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
    except RecursionError as error:
        raise ValueError(f"`{source}` should be a log of named values. Found values nested too deeply.") from error
    if not entries:
        raise ValueError(f"`{source}` should be a log of named values. Found no entry with names{noted(problems)}.")
    return entries


def noted(problems: list[str]) -> str:
    """Returns the problems as the end of a sentence."""
    return "".join(f"; {problem}" for problem in problems)


def _text(source: Path, is_packed: bool) -> str:
    """Returns the text of a file; bytes that cannot be decoded become marks, so that they do not hide the rest."""
    data = source.read_bytes()
    try:
        data = gzip.decompress(data) if is_packed else data
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"`{source}` should be a complete gzip file. Found: {error}") from error
    has_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = data.decode("utf-16" if has_utf16 else "utf-8-sig", errors="replace")
    if "\0" in text[:2]:
        raise ValueError(f"`{source}` should be text in UTF-8. Found zero bytes at its start, as in other encodings.")
    return text


def _from_table(text: str, source: Path, problems: list[str]) -> list[Entry]:
    """Returns the rows of a table; the delimiter is the one that splits the first line into most columns."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    first = text.lstrip("\n").split("\n", 1)[0]
    try:
        delimiter = max(_DELIMITERS, key=lambda mark: len(next(csv.reader([first], delimiter=mark), [])))
        table = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row]
    except csv.Error as error:
        raise ValueError(f"`{source}` should be a table with one line per row. Found: {error}.") from error
    names, rows = [name.strip() for name in table[0]] if table else [], table[1:]
    if rows and len(rows[-1]) < len(names) and not text.endswith("\n"):
        problems.append(f"the last row was cut off and is left out: `{delimiter.join(rows.pop())}`")
    if num_longer := sum(len(row) > len(names) for row in rows):
        problems.append(
            f"{counted(num_longer, 'row has', 'rows have')} more cells than the table has columns; the extra cells "
            "are left out"
        )
    if num_broken := sum("\n" in cell for row in rows for cell in row):
        problems.append(
            f"{counted(num_broken, 'cell holds', 'cells hold')} several lines, as if a quote was not closed"
        )
    if twice := [name for name, count in Counter(names).items() if name and count > 1]:
        problems.append(f"several columns are called {', '.join(twice)}; only the last of them is read")
    # A column without a name is the index that pandas writes.
    return [{name: cell for name, cell in zip(names, row, strict=False) if name} for row in rows]


def _from_json(text: str, problems: list[str]) -> Any:
    """Returns the entries of JSON: a list, one object per line, columns, or the files of Hugging Face and pandas."""
    found = _parsed(text)
    if found is None:
        found = _by_line(text, problems)
    if isinstance(found, dict):
        found = found["log_history"] if "log_history" in found else _from_columns(found, problems)
    if isinstance(found, list) and all(isinstance(entry, list) and len(entry) == len(SCALAR) for entry in found):
        return [dict(zip(SCALAR, entry, strict=True)) for entry in found]
    return found


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # RecursionError: brackets without end
        return None


def _by_line(text: str, problems: list[str]) -> list[Any]:
    lines = [(number, _parsed(line)) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    wrong = [number for number, value in lines if not isinstance(value, dict)]
    if wrong:
        problems.append(
            f"{counted(len(wrong), 'line is', 'lines are')} left out because only JSON objects can be read; the "
            f"first is line {wrong[0]}"
        )
    return [value for _, value in lines]


def _from_columns(found: Mapping[str, Any], problems: list[str]) -> list[Entry]:
    """Returns the rows of columns (lists, or numbered as by pandas), or a single entry if there are no columns."""
    flat = _flat({name: list(value.values()) if _is_numbered(value) else value for name, value in found.items()})
    columns = {name: value for name, value in flat.items() if isinstance(value, list)}
    if not columns:
        return [flat]
    lengths = Counter(map(len, columns.values()))
    length = max(lengths, key=lambda length: (lengths[length], length))
    # Nobody can know which row a value of a shorter column belongs to.
    if others := [f"{name} has {len(values)}" for name, values in columns.items() if len(values) != length]:
        problems.append(f"columns are left out because they do not have {length} values like most: {', '.join(others)}")
    kept = {name: values for name, values in columns.items() if len(values) == length}
    return [dict(zip(kept, row, strict=True)) for row in zip(*kept.values(), strict=True)]


def _is_numbered(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(map(str.isdigit, value))


def _flat(entry: Mapping[str, Any], prefix: str = "") -> Entry:
    """Returns an entry with the names of nested values joined by a slash, as in ``train/loss``."""
    flat: Entry = {}
    for name, value in entry.items():
        flat |= _flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _from_events(source: Path) -> list[Entry]:
    """Returns the scalars of event files, one entry per step; a value that a step has twice gets another entry."""
    if source.is_dir() and not any(source.glob(f"*{_EVENTS}*")):
        inside = [path for depth in ("", "*/", "*/*/") for name in _LOGS for path in source.glob(depth + name)]
        newest = sorted(inside, key=lambda path: path.stat().st_mtime, reverse=True)[:3]
        found = (
            f"a folder; pass a log in it, newest first: {', '.join(map(str, newest))}"
            if newest
            else "a folder without logs"
        )
        raise ValueError(f"Parameter `path` should be a log file or a folder of TensorBoard events. Found {found}.")
    with installed_by("tensorboard"):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
    events = EventAccumulator(str(source), size_guidance={"scalars": 0})  # 0 reads all; the default is a sample
    events.Reload()
    entries: dict[tuple[int, int], Entry] = {}
    for tag in events.Tags()["scalars"]:
        times: Counter[int] = Counter()
        for event in events.Scalars(tag):
            entry = entries.setdefault((event.step, times[event.step]), {})
            entry |= {tag: event.value, "step": event.step}
            times[event.step] += 1
    return list(entries.values())
