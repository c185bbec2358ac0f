"""Documents: logs that are one JSON document, and folders of TensorBoard and MLflow."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from smoothdiag.logs.lines import flat
from smoothdiag.logs.store import Context, Store, context_of
from smoothdiag.requirements import installed_by

SCALAR: Final = ("Wall time", "Step", "Value")
"""Columns of one scalar that was downloaded from TensorBoard; the JSON download does not name them."""

EVENTS: Final = "tfevents"
"""Part of the name of every file that TensorBoard reads."""

_LOGS: Final = (f"*{EVENTS}*", "trainer_state.json", "metrics.csv", "summary.csv", "*.log", "log.txt", "*.jsonl")
"""Names of logs that trainers put into folders."""

LARGEST: Final = 1 << 28
"""Most characters of a document, which has to be held in memory as a whole, several times over."""

METRICS: Final = "metrics"
"""Folder of a run of MLflow with one file for each metric, of lines "timestamp value step"."""


def may_be_document(start: str) -> bool:
    """Whether a text that begins like this may be one JSON document, and not a line of one after the other."""
    try:
        json.loads(start)
    except json.JSONDecodeError as error:
        # A document that is cut off is wrong at its end alone.
        return error.pos > max(0, len(start) - _LONGEST_VALUE) and not error.msg.startswith("Extra data")
    except RecursionError:
        return True
    return True


_LONGEST_VALUE: Final = 1 << 14


def add_document(text: str, store: Store, problems: list[str]) -> bool:
    """Adds the entries of a JSON document; returns whether the text is one.

    It may hold a list, columns, a single entry, or the files of Hugging Face and pandas.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):  # RecursionError: brackets without end
        return False
    if isinstance(found, dict):
        found = found["log_history"] if "log_history" in found else _rows_of(found, problems)
    if not isinstance(found, list):
        return True
    if all(isinstance(entry, list) and len(entry) == len(SCALAR) for entry in found):
        found = [dict(zip(SCALAR, entry, strict=True)) for entry in found]
    for entry in found:
        if isinstance(entry, dict):
            store.add(flat(entry), context_of(entry))
    return True


def _rows_of(found: Mapping[str, Any], problems: list[str]) -> list[dict[str, Any]]:
    """Returns the rows of columns (lists, or numbered as by pandas), or a single entry if there are no columns."""
    columns = flat({name: list(value.values()) if _is_numbered(value) else value for name, value in found.items()})
    lists = {name: value for name, value in columns.items() if isinstance(value, list)}
    if not lists:
        return [columns]
    inside = [value for value in lists.values() if value and all(isinstance(entry, dict) for entry in value)]
    if inside and len(lists) == 1:
        return [flat(entry) for entry in inside[0]]
    lengths = Counter(map(len, lists.values()))
    length = max(lengths, key=lambda length: (lengths[length], length))
    # Nobody can know which row a value of a shorter column belongs to.
    if others := [f"{name} has {len(values)}" for name, values in lists.items() if len(values) != length]:
        problems.append(f"columns are left out because they do not have {length} values like most: {', '.join(others)}")
    kept = {name: values for name, values in lists.items() if len(values) == length}
    return [dict(zip(kept, row, strict=True)) for row in zip(*kept.values(), strict=True)]


def _is_numbered(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(map(str.isdigit, value))


def is_folder_log(source: Path) -> bool:
    """Whether a path is read as a folder, or as a file of TensorBoard."""
    return source.is_dir() or EVENTS in source.name


def add_folder(source: Path, store: Store) -> None:
    """Adds what a folder of TensorBoard or MLflow holds.

    Raises:
        ImportError: If the log needs TensorBoard, which is not installed.
        ValueError: If the folder is no such log; the message names the logs in it.
    """
    if EVENTS in source.name or any(source.glob(f"*{EVENTS}*")):
        _add_events(source, store)
        return
    runs = [*_runs_of_mlflow(source)]
    if not runs:
        inside = {path for depth in ("", "*/", "*/*/") for name in _LOGS for path in source.glob(depth + name)}
        newest = sorted(inside, key=lambda path: (path.stat().st_mtime, str(path)), reverse=True)[:3]
        found = (
            f"a folder; pass a log in it, newest first: {', '.join(map(str, newest))}"
            if newest
            else "a folder without logs"
        )
        raise ValueError(
            f"Parameter `path` should be a log file, or a folder of TensorBoard events or of MLflow. Found {found}."
        )
    for run, folder in runs:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            _add_metric(file, file.relative_to(folder).as_posix(), Context(run=run if len(runs) > 1 else ""), store)


def _runs_of_mlflow(source: Path) -> Iterator[tuple[str, Path]]:
    """Yields the folders of metrics of the runs in a store, an experiment, a run, or the folder itself."""
    if source.name == METRICS and source.is_dir():
        yield source.parent.name, source
        return
    for depth in ("", "*/", "*/*/"):
        found = sorted(path for path in source.glob(depth + METRICS) if path.is_dir() and _is_of_metrics(path))
        if found:
            yield from ((path.parent.name, path) for path in found)
            return


def _is_of_metrics(folder: Path) -> bool:
    file = next((path for path in folder.rglob("*") if path.is_file()), None)
    if file is None:
        return False
    with file.open(encoding="utf-8", errors="replace") as text:
        return len(text.readline(1000).split()) in (2, 3)


def _add_metric(file: Path, name: str, context: Context, store: Store) -> None:
    """Adds the file of a metric, whose lines are "timestamp value step"."""
    if not store.is_wanted(name):
        return
    with file.open(encoding="utf-8", errors="replace") as text:
        for line in iter(lambda: text.readline(1000), ""):
            cells = line.split()
            if len(cells) in (2, 3):
                store.add({"step": cells[2] if len(cells) > 2 else None, name: cells[1]}, context)


def _add_events(source: Path, store: Store) -> None:
    """Adds the scalars of event files."""
    with installed_by("tensorboard"):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
    events = EventAccumulator(str(source), size_guidance={"scalars": 0})  # 0 reads all; the default is a sample
    events.Reload()
    for tag in events.Tags()["scalars"]:
        if store.is_wanted(tag):
            scalars: Iterable[Any] = events.Scalars(tag)
            for event in scalars:
                store.add({"step": event.step, tag: event.value})
