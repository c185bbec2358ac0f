"""Trace: the table between measuring and fitting, appended row by row and safe against crashes.

On disk a trace is JSON lines: one header object, then one object per row. Every row is flushed as it is
appended, so a run that is killed leaves all rows but at most the one being written.
"""

import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

from smoothdiag.rows import COLUMNS, REQUIRED, SmoothdiagWarning, clean_row

if TYPE_CHECKING:
    import pandas as pd

FORMAT_VERSION: Final = 1
_HEADER_KEY: Final = "smoothdiag_trace"
_RESUMED_KEY: Final = "smoothdiag_resumed_at"


class Trace:
    """An append-only table of measurements, one row for each step, estimator and group.

    Args:
        path: File to write to, ``.jsonl``; ``None`` keeps rows in memory only. The file is opened when the first row
            comes. A trace of an earlier run that is there then is kept, as ``NAME.1.jsonl`` and so on, unless
            ``resume`` was called.
        meta: Facts about the run for the header, JSON-able.

    Raises:
        ValueError: If ``path`` does not end in .jsonl, or is an existing file that is not a trace.

    Attributes:
        path: File written to, or ``None``.
        meta: Facts about the run.
        problems: Lines that were left out in reading, and why.
    """

    def __init__(self, path: str | Path | None = None, *, meta: Mapping[str, Any] | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.meta: dict[str, Any] = dict(meta or {})
        self.problems: list[str] = []
        self._rows: list[dict[str, Any]] = []
        self._file: TextIO | None = None
        self._closed = self.path is None
        if self.path is not None:
            if self.path.suffix != ".jsonl":
                raise ValueError(
                    f"Parameter `path` should end in .jsonl. Found `{self.path}`; `write` makes .csv and .parquet."
                )
            if _has_content(self.path):
                _read_header(self.path)

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds one row and flushes it to disk.

        Where the disk refuses, a warning says so once and rows are kept in memory.

        Args:
            row: Values by column name; ``step``, ``grad_norm`` and ``smoothness`` are required. Columns
                that are not listed in ``COLUMNS`` are kept as they are.

        Raises:
            ValueError: If a required column is missing or a value has the wrong type. Nothing is added then.
        """
        clean = clean_row(row)
        self._rows.append(clean)
        if self._closed:
            return
        try:
            if self._file is None:
                self._open_anew()
            self._write_line(clean)
        except OSError as error:
            self._closed = True
            message = f"{self.path} could not be written: {error}. Rows are kept in memory; save them with `write`."
            warnings.warn(message, SmoothdiagWarning)

    def resume(self, step: int) -> None:
        """Continues the trace at ``path``, if there is one, as a run that goes on from an optimizer step.

        Rows of that step and later ones stay in the file, but no longer count: the run takes these steps again.

        Raises:
            ValueError: If rows have been written already.
        """
        if self._file is not None:
            raise ValueError("A trace should be resumed before its first row. Found rows that are written already.")
        if self._closed or self.path is None or not _has_content(self.path):
            return
        self._load(self.path)
        self._drop_from(step)
        # Appending after a half-written line would spoil the next row as well.
        needs_newline = not self.path.read_bytes().endswith(b"\n")
        self._file = self.path.open("a", encoding="utf-8")
        if needs_newline:
            self._file.write("\n")
        self._write_line({_RESUMED_KEY: step})

    def extend(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds several rows."""
        for row in rows:
            self.append(row)

    def to_frame(self) -> "pd.DataFrame":
        """Returns the rows as a DataFrame, columns in the order of ``COLUMNS``, further columns after them.

        What is known of the run is in ``attrs``.
        """
        import pandas as pd

        extra = dict.fromkeys(key for row in self._rows for key in row if key not in COLUMNS)
        frame = pd.DataFrame(self._rows, columns=[*COLUMNS, *extra])
        frame = frame.astype({name: kind for name, kind in COLUMNS.items() if kind is not str})
        frame.attrs.update(self.meta)
        return frame

    def write(self, path: str | Path) -> None:
        """Writes the whole table to another file: ``.jsonl``, ``.csv``, or ``.parquet`` (needs pyarrow).

        Raises:
            ValueError: If the suffix is none of these, or the file is the one this trace appends to.
        """
        target = Path(path)
        if self.path is not None and target.resolve() == self.path.resolve():
            raise ValueError(f"Parameter `path` should be another file than the trace's own. Found `{target}`.")
        if target.suffix == ".jsonl":
            lines = (json.dumps(_encode(row)) + "\n" for row in [self._header(), *self._rows])
            target.write_text("".join(lines), encoding="utf-8")
        elif target.suffix == ".csv":
            self.to_frame().to_csv(target, index=False)
        elif target.suffix == ".parquet":
            self.to_frame().to_parquet(target, index=False)
        else:
            raise ValueError(f"Parameter `path` should end in .jsonl, .csv or .parquet. Found `{target}`.")

    @classmethod
    def read(cls, path: str | Path) -> "Trace":
        """Reads a trace written by ``append`` or ``write``.

        A half-written last line, or any line that is not a row, is left out, listed in ``problems`` and
        reported in one warning.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is empty or is not a trace.
        """
        source = Path(path)
        if not source.exists():
            raise FileNotFoundError(f"There is no trace at `{source}`.")
        trace = cls()
        if source.suffix in (".csv", ".parquet"):
            trace._load_table(source)
        else:
            trace._load(source)
        return trace

    def close(self) -> None:
        """Closes the file. Rows stay readable; appending goes on in memory only."""
        self._closed = True
        if self._file is not None:
            self._file.close()
            self._file = None

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (dict(row) for row in self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self._rows[index])

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Trace({len(self)} rows, path={str(self.path) if self.path else None!r})"

    def _header(self) -> dict[str, Any]:
        return {_HEADER_KEY: FORMAT_VERSION, **self.meta}

    def _write_line(self, value: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(_encode(value)) + "\n")
        self._file.flush()

    def _open_anew(self) -> None:
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if _has_content(self.path):
            number = 1
            while (kept := self.path.with_name(f"{self.path.stem}.{number}.jsonl")).exists():
                number += 1
            self.path.rename(kept)
        self._file = self.path.open("a", encoding="utf-8")
        self._write_line(self._header())

    def _load(self, source: Path) -> None:
        header = _read_header(source)
        self.meta = {key: value for key, value in header.items() if key != _HEADER_KEY}
        # Undecodable bytes become marks: one damaged line must not hide the others.
        lines = source.read_text(encoding="utf-8", errors="replace").splitlines()
        for number, line in enumerate(lines[1:], start=2):
            value = _parse(line)
            if value is not None and _RESUMED_KEY in value:
                self._drop_from(value[_RESUMED_KEY])
            elif line.strip():
                self._take(number, value, "half-written" if number == len(lines) else "not JSON")
        self._report(source)

    def _load_table(self, source: Path) -> None:
        import pandas as pd

        # As text first: a group called "007" or "NA" is neither a number nor missing.
        try:
            table = pd.read_csv(source, dtype=str, keep_default_na=False) if source.suffix == ".csv" else None
        except pd.errors.EmptyDataError:
            table = pd.DataFrame()
        if table is None:
            table = pd.read_parquet(source)
        missing = [name for name in REQUIRED if name not in table.columns]
        if missing:
            raise ValueError(
                f"`{source}` should be a smoothdiag trace with the columns {', '.join(REQUIRED)}, separated by commas. "
                f"Found {', '.join(map(str, table.columns)) or 'an empty file'}."
            )
        for number, row in enumerate(table.to_dict("records"), start=2):
            given = {str(key): value for key, value in row.items() if value != "" and value is not None}
            self._take(number, given, "")
        self._report(source)

    def _take(self, number: int, row: Mapping[str, Any] | None, otherwise: str) -> None:
        """Adds a row that was read, or notes why not."""
        try:
            if row is None:
                raise ValueError(otherwise)
            self._rows.append(clean_row(row))
        except ValueError as error:
            self.problems.append(f"line {number} left out: {error}")

    def _report(self, source: Path) -> None:
        if self.problems:
            warnings.warn(f"{source}: {'; '.join(self.problems)}", SmoothdiagWarning, stacklevel=4)

    def _drop_from(self, step: int) -> None:
        self._rows = [row for row in self._rows if row["step"] < step]


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _read_header(source: Path) -> dict[str, Any]:
    with source.open(encoding="utf-8", errors="replace") as file:
        first = file.readline().rstrip("\n")
        empty = not first and not file.read().strip()
    header = _parse(first)
    if header is None or _HEADER_KEY not in header:
        found = "an empty file" if empty else f"`{first[:60]}`"
        raise ValueError(f"`{source}` should be a smoothdiag trace, whose first line is a header. Found {found}.")
    if header[_HEADER_KEY] != FORMAT_VERSION:
        raise ValueError(
            f"`{source}` should have format version {FORMAT_VERSION}. Found {header[_HEADER_KEY]!r}; "
            "read it with the version of smoothdiag that wrote it."
        )
    return header


def _encode(row: Mapping[str, Any]) -> dict[str, Any]:
    # JSON has no NaN and no infinity; as strings they survive every reader, and float() takes them back.
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }


def _parse(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None
