"""doctor: a table of frameworks, faults and places; each cell is a script that the doctor judges."""

import re
import sys
from pathlib import Path

import pytest
import torch
from asserts import assert_identical, state_of
from torch import distributed as dist

from smoothdiag.doctor.watching import watch_all

FOLDER = Path(__file__).parent / "cells"
PLANTED = re.compile(r"# fault: ([a-z-]+)(?:: (.*))?$")
HEAVY = {"accelerated", "huggingfaces", "lightnings"}


def cells() -> list:
    """Returns the cells of all files: file, first line, last line."""
    found = []
    for path in sorted(FOLDER.glob("*.py")):
        lines = path.read_text().splitlines()
        starts = [k for k, line in enumerate(lines) if line.startswith("# --- ")]
        for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
            marks = [pytest.mark.slow] if path.stem in HEAVY else []
            name = f"{path.stem}: {lines[start].removeprefix('# --- ')}"
            found.append(pytest.param(path, starts[0], start, end, id=name, marks=marks))
    return found


def source(path: Path, prelude: int, start: int, end: int) -> str:
    """Returns the beginning of the file and one cell, with the line numbers of the file."""
    lines = path.read_text().splitlines()
    return "\n".join(line if k < prelude or start <= k < end else "" for k, line in enumerate(lines)) + "\n"


def planted(path: Path, start: int, end: int) -> set[tuple[str, int]]:
    lines = path.read_text().splitlines()
    below = {(m[1], k + 2) for k in range(start, end) if (m := re.search("# fault below: ([a-z-]+)", lines[k]))}
    return below | {(m[1], k + 1) for k in range(start, end) if (m := PLANTED.search(lines[k]))}


def advice(path: Path, start: int, end: int) -> list[str]:
    """Returns what comments say that the advice has to name."""
    lines = path.read_text().splitlines()[start:end]
    return [m[2] for line in lines if (m := PLANTED.search(line)) and m[2]]


def run(path: Path, prelude: int, start: int, end: int) -> dict:
    torch.manual_seed(0)
    names = {"__name__": "__main__", "__file__": str(path)}
    try:
        exec(compile(source(path, prelude, start, end), str(path), "exec", dont_inherit=True), names)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return names


@pytest.mark.parametrize(("path", "prelude", "start", "end"), cells())
def test_cell(path, prelude, start, end, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(path)])
    with watch_all() as watcher:
        watched = run(path, prelude, start, end)
    found = watcher.observer.findings()
    expected = planted(path, start, end)
    if not expected:
        plain = run(path, prelude, start, end)
        assert_identical(state_of(watched["model"]), state_of(plain["model"]))
    assert {(each.name, each.line) for each in found} == expected
    assert all(each.file == str(path) for each in found)
    for words in advice(path, start, end):
        assert any(words in each.change for each in found), [each.change for each in found]
