"""doctor: in whole scripts every planted fault is reported with its line, and correct scripts raise no alarm."""

import contextlib
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from asserts import assert_identical, state_of
from places import REPOSITORY

from smoothdiag.doctor import Fault, explain, run_script
from smoothdiag.doctor.watching import watch_all

FOLDER = Path(__file__).parent / "scripts"
FAULTY, CORRECT = (sorted((FOLDER / kind).glob("*.py")) for kind in ("faulty", "correct"))
CELLS = sorted((Path(__file__).parent / "cells").glob("*.py"))
RANKED = {"ddp", "fsdp2", "shard_norms"}
"""Scripts that are started once for each rank."""
PLANTED = re.compile(r"# fault: ([a-z-]+) (\d+)/(\d+)")


def single(scripts):
    return [pytest.param(path, id=path.stem) for path in scripts if path.stem not in RANKED]


def ranked(scripts):
    return [pytest.param(path, id=path.stem) for path in scripts if path.stem in RANKED]


def planted(script: Path) -> list[tuple]:
    """Returns what comments say is wrong: name, line, how often, of how many."""
    lines = enumerate(script.read_text().splitlines(), 1)
    return [(m[1], line, int(m[2]), int(m[3])) for line, text in lines if (m := PLANTED.search(text))]


@pytest.mark.thorough
@pytest.mark.parametrize("script", single(FAULTY))
def test_planted_fault_is_named_with_its_line(script) -> None:
    report, code = run_script(script)
    assert code == 0
    assert [(f.name, f.line, f.count, f.of) for f in report.findings] == planted(script)
    for each in report.findings:
        assert each.file == str(script)
        assert f"{script}:{each.line}" in str(report)
        assert each.code in script.read_text()
        assert each.change in str(report)


def test_every_fault_is_planted_somewhere() -> None:
    in_cells = {name for path in CELLS for name in re.findall(r"# fault: ([a-z-]+)", path.read_text())}
    in_scripts = {name for script in FAULTY for name, *_ in planted(script)}
    assert in_scripts | in_cells == {fault.slug for fault in Fault}
    assert all(planted(script) for script in FAULTY)


def test_every_fault_has_a_section_on_the_page_which_the_package_holds_too() -> None:
    page = (REPOSITORY / "docs" / "doctor.md").read_text()
    sections = re.findall(r"^### (.*?)(?=^#)", page, re.MULTILINE | re.DOTALL)
    assert [each.split()[0] for each in sections] == [fault.slug for fault in Fault]
    for section, fault in zip(sections, Fault, strict=True):
        assert explain(fault.slug).split() == section.split()
    with pytest.raises(ValueError, match=r"`name` should be one of clip-after-step, .*\. Found `clip`\."):
        explain("clip")


@pytest.mark.thorough
@pytest.mark.parametrize("script", single(CORRECT))
def test_correct_script_raises_no_alarm_and_trains_the_same(script, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path)])
    states = []
    for watch in (contextlib.nullcontext, watch_all):
        torch.manual_seed(0)
        with watch() as watcher:
            names = runpy.run_path(str(script), run_name="__main__")
        trainer = names.get("trainer")
        model = names.get("model") or names.get("body") or names.get("generator") or trainer.lightning_module
        states.append(state_of(model) | {"logged": names.get("logged"), "norm": names.get("norm")})
    assert watcher.observer.findings() == []
    assert watcher.observer.steps >= 4
    assert_identical(states[1], states[0])


def report_of_ranks(script: Path, folder: Path) -> dict:
    """Returns what the first of two ranks reports; the other one has to keep quiet."""
    command = [sys.executable, "-m", "smoothdiag.cli", "doctor", "--json", script, folder / "meet"]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        first, second = (rank.communicate(timeout=900)[0] for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert '"findings"' not in second
    return json.loads(first.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("script", ranked([*FAULTY, *CORRECT]))
def test_ranks_see_what_is_planted(script, tmp_path) -> None:
    report = report_of_ranks(script, tmp_path)
    assert report["steps"] >= 3
    assert [(f["name"], f["line"], f["count"], f["of"]) for f in report["findings"]] == planted(script)
