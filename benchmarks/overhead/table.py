"""Rows of the table, with limit, goal and figure side by side; their file and their text."""

import json
import math
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

MARKS = "<!-- begin: {} by probe_overhead.py -->", "<!-- end: {} by probe_overhead.py -->"
"""What stands on a page around a block that the script writes."""


@dataclass(frozen=True)
class Row:
    """One figure beside what no method can be below and what is aimed at.

    Attributes:
        what: What is measured, and on what.
        limit: The least that any method needs; NaN if nobody knows.
        goal: What is aimed at; NaN if there is none.
        figure: Median, or the one value of what does not vary.
        least: Lower quartile; NaN if the value does not vary.
        most: Upper quartile.
        part: Part of the script that measures it.
    """

    what: str
    limit: float
    goal: float
    figure: float
    least: float = math.nan
    most: float = math.nan
    part: str = ""

    @classmethod
    def of(cls, what: str, limit: float, goal: float, values: Sequence[float]) -> "Row":
        """Returns the row of values that vary: their median and quartiles."""
        least, figure, most = (float(x) for x in np.quantile(np.asarray(values, float), [0.25, 0.5, 0.75]))
        return cls(what, limit, goal, figure, least, most)

    @property
    def verdict(self) -> str:
        if math.isnan(self.goal) or math.isnan(self.figure):
            return ""
        # As many digits as the table shows.
        return "met" if round(self.figure, 2) <= self.goal else "missed"


def environment(device: torch.device) -> dict[str, Any]:
    """Returns where and when the figures were measured."""
    git = ["git", "-C", str(Path(__file__).parents[2])]
    commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "--", "smoothdiag"], capture_output=True, text=True).stdout
    return {
        "date": date.today().isoformat(),
        "processor": processor(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "commit": commit + (" with changes" if changed.strip() else ""),
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write(path: Path, rows: Iterable[Row], about: dict[str, Any]) -> None:
    """Writes rows and environment; figures that do not exist are null."""
    entries = [{k: None if v != v else v for k, v in asdict(row).items()} for row in rows]
    path.write_text(json.dumps({"environment": about, "rows": entries}, indent=1) + "\n")


def read(path: Path) -> tuple[list[Row], dict[str, Any]]:
    """Returns the rows and the environment of a file."""
    found = json.loads(path.read_text())
    rows = [Row(**{k: math.nan if v is None else v for k, v in row.items()}) for row in found["rows"]]
    return rows, found["environment"]


def number(x: float) -> str:
    return "" if math.isnan(x) else f"{x:.2f}" if abs(x) < 10 and x != round(x) else f"{x:.3g}"


def cells(row: Row) -> list[str]:
    spread = "" if math.isnan(row.least) else f"{number(row.least)} to {number(row.most)}"
    return [row.what, number(row.limit), number(row.goal), number(row.figure) or "not measured", spread, row.verdict]


HEAD = ["what", "limit", "goal", "figure", "quartiles", ""]


def text(rows: Iterable[Row]) -> str:
    """Returns the table for a terminal."""
    lines = [HEAD, *map(cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def markdown(rows: Iterable[Row], about: dict[str, Any]) -> str:
    """Returns the table for a page, with the environment below it."""
    lines = [HEAD, ["---"] * len(HEAD), *map(cells, rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    where = f"{about['processor']}, {about['threads']} thread" if about["device"] == "cpu" else about["device"]
    few = ", few rounds (`--quick`)" if about["quick"] else ""
    return f"{table}\n\n{about['date']}, {where}, torch {about['torch']}, commit {about['commit']}{few}."


def filled(page: str, blocks: dict[str, str]) -> str:
    """Returns a page with new blocks between those pairs of marks that it has."""
    for name, block in blocks.items():
        begin, end = (mark.format(name) for mark in MARKS)
        if begin in page:
            before, rest = page.split(begin)
            page = f"{before}{begin}\n\n{block}\n\n{end}{rest.split(end)[1]}"
    return page
