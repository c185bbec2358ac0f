"""Cells of the doctor's table: scripts with planted faults, and what the doctor says of them."""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from places import REPOSITORY
from torch import distributed as dist

from smoothdiag.doctor import Finding
from smoothdiag.doctor.watching import watch_all

FOLDER = REPOSITORY / "tests" / "doctor" / "cells"
FRAMEWORKS = ("accelerated", "huggingfaces", "lightnings")
"""Files that import a framework."""
_PLANTED = re.compile(r"# fault: ([a-z-]+)(?: \d+/\d+)?(?:: (.*))?$")
_BELOW = re.compile(r"# fault below: ([a-z-]+)")


@dataclass(frozen=True)
class Cell:
    """One script: the beginning of a file and one of its parts, under the line numbers of the file.

    A comment ``# fault: name`` plants a fault in its line, ``# fault: name: words`` also says what the advice has to
    name, and ``# fault below: name`` plants a further fault in the next line.
    """

    path: Path
    prelude: int
    start: int
    end: int

    @property
    def lines(self) -> list[str]:
        """The lines of the script; those of other cells are empty."""
        lines = self.path.read_text().splitlines()
        return [line if k < self.prelude or self.start <= k < self.end else "" for k, line in enumerate(lines)]

    @property
    def title(self) -> str:
        """The name of the cell."""
        return f"{self.path.stem}: {self.lines[self.start].removeprefix('# --- ')}"

    @property
    def planted(self) -> set[tuple[str, int]]:
        """The faults and their lines."""
        found = {(m[1], k) for k, line in enumerate(self.lines, 1) if (m := _PLANTED.search(line))}
        return found | {(m[1], k + 1) for k, line in enumerate(self.lines, 1) if (m := _BELOW.search(line))}

    @property
    def advice(self) -> list[str]:
        """Words that the advice has to contain."""
        return [m[2] for line in self.lines if (m := _PLANTED.search(line)) and m[2]]

    def run(self) -> dict:
        """Runs the script and returns its names."""
        torch.manual_seed(0)
        names = {"__name__": "__main__", "__file__": str(self.path)}
        code = compile("\n".join(self.lines) + "\n", str(self.path), "exec", dont_inherit=True)
        try:
            with mock.patch.object(sys, "argv", [str(self.path)]):
                exec(code, names)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        return names

    def judge(self) -> tuple[list[Finding], dict]:
        """Returns what the doctor finds, and the names of the script."""
        with watch_all() as watcher:
            names = self.run()
        return watcher.observer.findings(), names

    def complaint(self, found: list[Finding]) -> str:
        """Returns what is wrong with the findings; empty if they are those planted."""
        said = {(each.name, each.line) for each in found}
        if said != self.planted or not all(each.file == str(self.path) for each in found):
            return f"{self.title}: found {said or 'nothing'}, planted {self.planted or 'nothing'}"
        changes = [each.change for each in found]
        missing = [words for words in self.advice if not any(words in change for change in changes)]
        return f"{self.title}: the advice names no {missing}: {changes}" if missing else ""


def cells() -> Iterator[Cell]:
    """Yields all cells of the table."""
    for path in sorted(FOLDER.glob("*.py")):
        lines = path.read_text().splitlines()
        starts = [k for k, line in enumerate(lines) if line.startswith("# --- ")]
        for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
            yield Cell(path, starts[0], start, end)


def scripts() -> Iterator[Cell]:
    """Yields the whole scripts beside the table that need no framework and no further ranks."""
    for path in sorted(FOLDER.parent.glob("scripts/*/*.py")):
        text = path.read_text()
        if not re.search("accelerate|lightning|transformers|RANK", text):
            yield Cell(path, 0, 0, len(text.splitlines()))
