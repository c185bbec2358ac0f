"""The table of runs: one line per run, written once, when the run ends."""

import csv
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

KEY = ("workload", "lr", "seed", "arm", "steps")

COLUMNS = (
    *KEY,
    "kind",
    "initial",
    "final",
    "tail",
    "best",
    "diverged",
    "clip_share",
    "probe_gradients",
    "train_gradients",
    "seconds",
    "longest_step",
    "reason",
)


class Case(NamedTuple):
    """The columns that identify a run."""

    workload: str
    lr: float
    seed: int
    arm: str
    steps: int


def read_whole(path: Path) -> str:
    """Returns the complete lines of the file, even while another process adds to it."""
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1].decode()


def mend(path: Path) -> None:
    """Removes a last line that was cut short from the file, so that lines can be added."""
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        path.write_text(read_whole(path), encoding="utf-8")


def done(path: Path) -> set[Case]:
    """Returns the runs that are in the file.

    Raises:
        ValueError: If the file has other columns.
    """
    if not path.exists() or not (whole := read_whole(path)):
        return set()
    first, *lines = whole.splitlines()
    if first.split(",") != list(COLUMNS):
        raise ValueError(f"Parameter `out` should be a file of this benchmark. Found `{path}` with other columns.")
    rows = csv.DictReader(lines, fieldnames=COLUMNS)
    return {Case(row["workload"], float(row["lr"]), int(row["seed"]), row["arm"], int(row["steps"])) for row in rows}


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Adds a line to the file, makes the file if necessary, and waits until the line is on the disk."""
    new = not path.exists() or path.stat().st_size == 0
    with path.open("a", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        # One line for each run: that is how a line that was cut short is told.
        writer.writerow({**row, "reason": " ".join(str(row["reason"]).split())})
        stream.flush()
        os.fsync(stream.fileno())


def remaining(cases: Iterable[Case], finished: set[Case]) -> list[Case]:
    return [case for case in cases if case not in finished]
