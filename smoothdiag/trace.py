"""Trace: the table between measuring and fitting, appended row by row and safe against crashes.

On disk a trace is JSON lines: one header object, then one object per row. Every row is flushed as it is
appended, so a run that is killed leaves all rows but at most the one being written.
"""

import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import pandas as pd

FORMAT_VERSION: Final = 1
_HEADER_KEY: Final = "smoothdiag_trace"

COLUMNS: Final[Mapping[str, type]] = {
    "step": int,
    "group": str,
    "estimator": str,
    "grad_norm": float,
    "smoothness": float,
    "step_norm": float,
    "param_norm": float,
    "loss": float,
    "lr": float,
    "saturation": float,
    "noise_floor": float,
    "status": str,
    "data": str,
    "num_grads": int,
    "num_hvps": int,
    "seconds": float,
    "device": str,
    "dtype": str,
}
"""The columns every trace has, with their types. Units are those of the documentation: ``grad_norm`` [f/x],
``smoothness`` and ``noise_floor`` [f/x^2], ``step_norm`` and ``param_norm`` [x], ``lr`` [x^2/f]."""

_REQUIRED: Final = ("step", "grad_norm", "smoothness")
_DEFAULTS: Final[Mapping[str, Any]] = {
    "group": "all",
    "estimator": "unknown",
    "status": "ok",
    "data": "step",
    "num_grads": 0,
    "num_hvps": 0,
    "device": "",
    "dtype": "",
}


class SmoothdiagWarning(UserWarning):
    """Something about a measurement that a user should know but that does not stop the run."""


class Status(Enum):
    """How far a row can be trusted; each value is the cause and the remedy.

    ``name.lower()`` is what stands in the column ``status`` of a trace.
    """

    OK = "the measurement passed its checks."
    SATURATED = (
        "the gradient turned round almost completely along the displacement, so the value says more about the "
        "length of the step than about curvature; use a shorter radius (LocalSmoothness) or a smaller rate."
    )
    BELOW_NOISE_FLOOR = (
        "the gradients differ hardly more than two evaluations at one point do; use a longer radius, float32 "
        "or float64 parameters, or a loss that is deterministic on fixed data."
    )
    NON_FINITE = "the loss or a gradient is inf or NaN at one of the points; look at the loss of this step."
    ZERO_STEP = "the two points coincide; the step was skipped, or the radius is below rounding."
    FAILED = "evaluating the loss again raised an error, which was shown as a warning; mend loss_fn."

    @property
    def usable(self) -> bool:
        """Whether fits may use the row. Saturated rows count: leaving out high values would bias a bound."""
        return self in (Status.OK, Status.SATURATED)


class Trace:
    """An append-only table of measurements, one row for each step, estimator and group.

    Args:
        path: File to append to, ``.jsonl``; ``None`` keeps rows in memory only. An existing trace is
            continued, never overwritten; its rows are read first.
        meta: Facts about the run for the header, JSON-able. Ignored where the file has a header already.

    Raises:
        ValueError: If ``path`` is an existing file that is not a trace.
    """

    def __init__(self, path: str | Path | None = None, *, meta: Mapping[str, Any] | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.meta: dict[str, Any] = dict(meta or {})
        self.problems: list[str] = []
        self._rows: list[dict[str, Any]] = []
        self._file = None
        if self.path is None:
            return
        if self.path.exists() and self.path.stat().st_size:
            self._load(self.path)
            # Appending after a half-written line would spoil the next row as well.
            needs_newline = not self.path.read_bytes().endswith(b"\n")
            self._file = self.path.open("a", encoding="utf-8")
            if needs_newline:
                self._file.write("\n")
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("w", encoding="utf-8")
            self._write_line(self._header())

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds one row and flushes it to disk.

        Args:
            row: Values by column name; ``step``, ``grad_norm`` and ``smoothness`` are required. Columns
                that are not listed in ``COLUMNS`` are kept as they are.

        Raises:
            ValueError: If a required column is missing or a value has the wrong type. Nothing is added then.
        """
        clean = _clean(row)
        if self._file is not None:
            self._write_line(clean)
        self._rows.append(clean)

    def extend(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds several rows."""
        for row in rows:
            self.append(row)

    def to_frame(self) -> "pd.DataFrame":
        """Returns the rows as a DataFrame, columns in the order of ``COLUMNS``, further columns after them."""
        import pandas as pd

        extra = dict.fromkeys(key for row in self._rows for key in row if key not in COLUMNS)
        frame = pd.DataFrame(self._rows, columns=[*COLUMNS, *extra])
        return frame.astype({name: kind for name, kind in COLUMNS.items() if kind is not str})

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

    def _load(self, source: Path) -> None:
        # Undecodable bytes become marks: one damaged line must not hide the others.
        lines = source.read_text(encoding="utf-8", errors="replace").splitlines()
        header = _parse(lines[0]) if lines else None
        if header is None or _HEADER_KEY not in header:
            found = "an empty file" if not "".join(lines).strip() else f"`{lines[0][:60]}`"
            raise ValueError(f"`{source}` should be a smoothdiag trace, whose first line is a header. Found {found}.")
        if header[_HEADER_KEY] != FORMAT_VERSION:
            raise ValueError(
                f"`{source}` should have format version {FORMAT_VERSION}. Found {header[_HEADER_KEY]!r}; "
                "read it with the version of smoothdiag that wrote it."
            )
        self.meta = {key: value for key, value in header.items() if key != _HEADER_KEY}
        for number, line in enumerate(lines[1:], start=2):
            if not line.strip():
                continue
            row = _parse(line)
            try:
                if row is None:
                    raise ValueError("half-written" if number == len(lines) else "not JSON")
                self._rows.append(_clean(row))
            except ValueError as error:
                self.problems.append(f"line {number} left out: {error}")
        if self.problems:
            warnings.warn(f"{source}: {'; '.join(self.problems)}", SmoothdiagWarning, stacklevel=4)

    def _load_table(self, source: Path) -> None:
        import pandas as pd

        try:
            # keep_default_na would turn a group called "NA" or "None" into a missing value.
            frame = (
                pd.read_csv(source, keep_default_na=False, na_values=[""])
                if source.suffix == ".csv"
                else pd.read_parquet(source)
            )
        except pd.errors.EmptyDataError:
            frame = pd.DataFrame()
        missing = [name for name in _REQUIRED if name not in frame.columns]
        if missing:
            raise ValueError(
                f"`{source}` should be a smoothdiag trace with the columns {', '.join(_REQUIRED)}. "
                f"Found {', '.join(map(str, frame.columns)) or 'an empty file'}."
            )
        for row in frame.to_dict("records"):
            self.append({str(k): v for k, v in row.items() if not (k in _DEFAULTS and pd.isna(v))})


def _clean(row: Mapping[str, Any]) -> dict[str, Any]:
    missing = [name for name in _REQUIRED if name not in row]
    if missing:
        raise ValueError(f"A row should have the columns {', '.join(_REQUIRED)}. Missing: {', '.join(missing)}.")
    clean: dict[str, Any] = {}
    for name, kind in COLUMNS.items():
        value = row.get(name, _DEFAULTS.get(name, math.nan))
        try:
            clean[name] = kind(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"Column `{name}` should be {kind.__name__}. Found `{value!r}`.") from error
    return clean | {key: _plain(key, value) for key, value in row.items() if key not in COLUMNS}


def _plain(name: str, value: Any) -> str | int | float | bool | None:
    if isinstance(value, str) and value in ("nan", "inf", "-inf"):
        return float(value)
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise ValueError(f"Column `{name}` should hold a number, a string or None. Found `{value!r}`.")


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
