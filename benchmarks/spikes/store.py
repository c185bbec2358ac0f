"""The files of the benchmark: runs, what each rule flagged, and curves; every line is added whole."""

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

HERE = Path(__file__).parent
RUNS, FLAGS = HERE / "runs.csv", HERE / "flags.csv"

RUN_COLUMNS = (
    "run", "pool", "part", "model", "cause", "seed", "optimizer", "schedule", "narrow", "kind",
    "attempt", "start", "spike", "last", "column", "size", "steps", "initial", "final", "pair_final",
)  # fmt: skip

FLAG_COLUMNS = ("run", "rule", "steps", "answers", "seconds")


def read(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    """Returns the complete lines of a table; an empty table if there is no file."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1].decode()
    if not whole:
        return pd.DataFrame(columns=list(columns))
    return pd.read_csv(io.StringIO(whole), dtype={"steps": str, "answers": str} if "rule" in columns else None)


def append(path: Path, columns: tuple[str, ...], row: Mapping[str, Any]) -> None:
    """Adds a line and waits until it is on the disk; a last line that was cut short goes first."""
    content = path.read_bytes() if path.exists() else b""
    if content and not content.endswith(b"\n"):
        path.write_bytes(content[: content.rfind(b"\n") + 1])
    with path.open("a", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        if not content:
            writer.writeheader()
        writer.writerow(row)
        stream.flush()
        os.fsync(stream.fileno())


def curve_path(folder: Path, run: str) -> Path:
    return folder / f"{run.replace('/', '~').replace(' ', '-')}.csv"


def write_curve(folder: Path, run: str, curve: pd.DataFrame) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    curve.to_csv(curve_path(folder, run), index=False, float_format="%.7g")


def said(steps: list[int]) -> str:
    return " ".join(map(str, steps))


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    first, *lines = (f"| {' | '.join(map(str, line))} |" for line in [head, *rows])
    return "\n".join([first, f"|{'---|' * len(head)}", *lines])
