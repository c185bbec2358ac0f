"""Trace: the table between measuring and fitting, written row by row, so that it survives crashes.

On disk a trace is JSON lines: one header object, then one object per row. Every row is written as soon as it is
appended. So a run that is killed loses at most the row that was being written. docs/traces.md describes the format.
"""

import contextlib
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoothdiag.console import counted
from smoothdiag.notebooks import as_html
from smoothdiag.rows import CLIP_SUFFIX, COLUMNS, SmoothdiagWarning, clean_row, plain_fact, shown
from smoothdiag.trace import file as files
from smoothdiag.trace.lines import (
    COUNT,
    FORMAT_VERSION,
    HEADER,
    RESERVED,
    RESUMED,
    Place,
    harmless,
    is_json,
    sealed_line,
)
from smoothdiag.trace.order import told
from smoothdiag.trace.reading import Contents, check_is_trace, read
from smoothdiag.trace.tables import read_csv, read_parquet, write_csv, write_parquet

if TYPE_CHECKING:
    import pandas as pd


class Trace:
    """An append-only table of measurements, one row for each step, estimator and group.

    Args:
        path: File to write to, ``.jsonl``; ``None`` keeps rows in memory only. The file is opened at the first row. If
            it then holds a trace of an earlier run, that file is kept as ``NAME.1.jsonl`` and so on, unless ``resume``
            was called. If another process is writing the file, or this process was forked from the one that is, rows go
            to a numbered file instead; a warning says so, and ``path`` names it.
        meta: Facts about the run for the header, of types that JSON can hold.

    Raises:
        ValueError: If ``path`` does not end in .jsonl or is an existing file that is not a trace, or if JSON cannot
            hold ``meta``.

    Attributes:
        path: File that rows are written to, or ``None``.
        source: File that it was read from, or ``None``.
        meta: Facts about the run.
        problems: What reading left out and why, and what else is wrong with the file.

    Examples:
        >>> with sd.Trace("run.jsonl", meta={"seed": 0}) as trace:
        ...     trace.append({"step": 0, "grad_norm": 3.0, "smoothness": 7.0})
        >>> back = sd.Trace.read("run.jsonl")
        >>> print(len(back), back.meta, back[0]["smoothness"])
        1 {'seed': 0} 7.0
    """

    def __init__(self, path: str | Path | None = None, *, meta: Mapping[str, Any] | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.meta: dict[str, Any] = dict(meta or {})
        for name, value in self.meta.items():
            if not isinstance(name, str) or name in RESERVED or not is_json(value):
                raise ValueError(
                    "Parameter `meta` should hold facts that JSON can hold under names of their own. Found "
                    f"{shown(value)} under {shown(name)}."
                )
        self.source: Path | None = None
        self.problems: list[str] = []
        self._rows: list[dict[str, Any]] = []
        self._file: files.TraceFile | None = None
        self._closed = self.path is None
        if self.path is not None:
            if self.path.suffix != ".jsonl":
                raise ValueError(
                    f"Parameter `path` should end in .jsonl. Found `{self.path}`; `write` makes .csv and .parquet."
                )
            if _has_content(self.path):
                check_is_trace(self.path)

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds one row and writes it to disk.

        If the disk refuses, one warning says so, and rows are kept in memory.

        Args:
            row: Values by column name; ``step``, ``grad_norm`` and ``smoothness`` are required. Columns that are not
                listed in ``COLUMNS`` are kept as they are.

        Raises:
            ValueError: If a required column is missing or a value has the wrong type. Then nothing is added.
        """
        clean = clean_row(row)
        self._rows.append(clean)
        if not self._closed:
            self._guarded("written", self._write, clean)

    def resume(self, step: int) -> None:
        """Continues the trace at ``path``, if there is one, for a run that continues from an optimizer step.

        Rows of that step and of later steps stay in the file but no longer count, because the run takes these steps
        again.

        Raises:
            ValueError: If rows have been written already.
        """
        if self._file is not None:
            raise ValueError("A trace should be resumed before its first row. Found rows that were written already.")
        if not self._closed and self.path is not None and _has_content(self.path):
            self._guarded("continued", self._go_on, self.path, step)

    def extend(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds several rows."""
        for row in rows:
            self.append(row)

    def to_frame(self) -> "pd.DataFrame":
        """Returns the rows as a DataFrame, with the columns in the order of ``COLUMNS`` and further columns after them.

        ``attrs`` holds the facts about the run.
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
            ValueError: If the suffix is none of these, or the file is the one that this trace appends to.
        """
        target = Path(path)
        if self.path is not None and target.resolve() == self.path.resolve():
            raise ValueError(f"Parameter `path` should be another file than the trace's own. Found `{target}`.")
        if target.suffix == ".jsonl":
            values = [self._header() | {COUNT: len(self)}, *self._rows]
            name = f"{zlib.crc32(repr(values).encode('utf-8', 'backslashreplace')):08x}"
            lines = (sealed_line(value, Place(name, number)) for number, value in enumerate(values, start=1))
            target.write_bytes("".join(lines).encode("ascii"))
        elif target.suffix == ".csv":
            write_csv(target, self._rows)
        elif target.suffix == ".parquet":
            write_parquet(target, self.to_frame())
        else:
            raise ValueError(f"Parameter `path` should end in .jsonl, .csv or .parquet. Found `{target}`.")

    @classmethod
    def read(cls, path: str | Path, *, verify: bool = True) -> "Trace":
        """Reads a trace written by ``append`` or ``write``.

        Reading leaves out a half-written last line, a line that fails its check sum, and any line that is not a row. If
        a row comes twice, the later one counts. One warning reports all that is wrong with the file, and ``problems``
        lists it.

        Args:
            path: The file.
            verify: Whether lines must pass their check sums and stand in their places. ``False`` takes every row as it
                stands, for files that were edited on purpose.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is empty or is not a trace.
        """
        source = Path(path)
        if not source.exists():
            raise FileNotFoundError(f"There is no trace at `{source}`.")
        if source.is_dir():
            raise ValueError(f"Parameter `path` should be a file. Found the folder `{source}`.")
        trace = cls()
        kinds: dict[str, Callable[[Path, bool], Contents]] = {".csv": read_csv, ".parquet": read_parquet}
        trace._take(source, kinds.get(source.suffix, read)(source, verify))
        trace.source = source
        return trace

    def close(self) -> None:
        """Closes the file. Rows stay readable, and further rows are kept in memory only."""
        self._closed = True
        if self._file is not None:
            file, self._file = self._file, None
            self._guarded("closed", file.close)

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
        from_file = f", source={str(self.source)!r}" if self.source and not self.path else ""
        return f"Trace({counted(len(self), 'row')}, path={str(self.path) if self.path else None!r}{from_file})"

    def _repr_html_(self) -> str:
        steps = {row["step"] for row in self._rows}
        kinds = sorted({str(row.get("estimator", "unnamed")) for row in self._rows})
        span = f" of steps {min(steps)} to {max(steps)}, {', '.join(kinds)}" if steps else ""
        todo = "sd.fit_smoothness(trace) fits them." if steps else "append rows, or give it to a Probe."
        if kinds and all(kind.endswith(CLIP_SUFFIX) for kind in kinds):
            todo = "sd.plot_clipping(trace) draws what AutoClip did; it asked for all of these rows."
        where = f"read from {self.source}" if self.source and not self.path else f"path {self.path}"
        facts = [where, *(f"{name}: {plain_fact(value)}" for name, value in self.meta.items()), *self.problems]
        text = "\n".join([f"Trace: {counted(len(self), 'row')}{span}", f"NEXT: {todo}", *facts])
        return as_html(text, *([self.to_frame().dropna(axis="columns", how="all")] if steps else []))

    def _header(self) -> dict[str, Any]:
        return {HEADER: FORMAT_VERSION, **harmless(self.meta)}

    def _guarded(self, done: str, action: Callable[..., str | None], *arguments: Any) -> None:
        """Runs an action on the disk. If the disk refuses, the trace gives up its file, but the run goes on."""
        try:
            news = action(*arguments)
        except (OSError, ValueError) as error:
            self._closed = True
            file, self._file = self._file, None
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()
            message = f"{self.path} could not be {done}: {error}. Rows are kept in memory only; save them with `write`."
            warnings.warn(message, SmoothdiagWarning, stacklevel=3)
        else:
            if news is not None:
                warnings.warn(news, SmoothdiagWarning, stacklevel=3)

    def _write(self, row: Mapping[str, Any]) -> str | None:
        """Writes a row, and opens the file first if need be; returns what a user should know about that."""
        assert self.path is not None
        if self._file is not None and not self._file.is_inherited:
            self._file.write(row)
            return None
        if self._file is not None:
            return self._write_beside("this process was forked from the one that writes it")
        self._file = files.begin(self.path)
        if self._file is None:
            return self._write_beside("another process, or another trace in this process, is writing it")
        self._write_all()
        return None

    def _write_beside(self, cause: str) -> str:
        assert self.path is not None
        taken = self.path
        self._file = files.beside(taken)
        self.path = self._file.path
        self._write_all()
        return f"{taken} is left alone: {cause}. The rows of this trace go to {self.path}."

    def _write_all(self) -> None:
        assert self._file is not None
        for value in (self._header(), *self._rows):
            self._file.write(value)

    def _go_on(self, path: Path, step: int) -> str | None:
        stream = files.again(path)
        try:
            found = read(path)
            self._take(path, found)
            self._rows = [row for row in self._rows if row["step"] < step]
            if stream is None:
                return self._write_beside("another process, or another trace in this process, is writing it")
            self._file = files.TraceFile(path, stream, file=found.file, next_number=found.next_number)
            # Appending after a half-written line would spoil the next row as well.
            self._file.write({RESUMED: step}, before="" if path.read_bytes().endswith(b"\n") else "\n")
        except BaseException:
            if stream is not None:
                stream.close()
            raise
        return None

    def _take(self, source: Path, found: Contents) -> None:
        self.meta, self.problems, self._rows = found.meta, found.problems, found.rows
        if found.problems:
            warnings.warn(f"{source}: {told(found.problems)}", SmoothdiagWarning, stacklevel=3)


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0
