"""tests: `make quick` refuses processes and frameworks, and has tests of every part of the package."""

import importlib
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from places import REPOSITORY
from quick import is_left_out, no_frameworks, no_processes

WITH_FRAMEWORKS = {"integrations"}


def rooms() -> list[str]:
    """Returns every part of the package, and every folder of it that has tests of its own."""
    package, tests = REPOSITORY / "smoothdiag", REPOSITORY / "tests"
    folders = {path.parent.relative_to(package) for path in package.rglob("*.py") if path.stem != "__init__"}
    parts = {folder.parts[0] if folder.parts else "." for folder in folders}
    parts |= {folder.as_posix() for folder in folders if (tests / folder).is_dir()}
    return sorted(parts - WITH_FRAMEWORKS)


@pytest.mark.parametrize("room", rooms())
def test_every_part_of_the_package_has_quick_tests(room: str) -> None:
    tests = list((REPOSITORY / "tests" / room).glob("test_*.py" if room == "." else "**/test_*.py"))
    assert tests
    assert not all(map(is_left_out, tests)), "every file is marked as a whole"


@pytest.mark.parametrize(
    "start",
    [
        lambda: subprocess.run([sys.executable, "-c", ""], check=True),
        lambda: multiprocessing.get_context("spawn").Process(target=print).start(),
        lambda: os.system("true"),
        lambda: os.posix_spawn(sys.executable, [sys.executable, "-c", ""], {}),
        lambda: os.fork() or os._exit(0),
    ],
    ids=["subprocess", "multiprocessing", "system", "posix_spawn", "fork"],
)
def test_quick_test_starts_no_process(start: Callable[[], object]) -> None:
    with no_processes(), pytest.raises(pytest.fail.Exception, match="not start a process.*`pytest.mark.thorough`"):
        start()


def test_quick_test_imports_no_framework(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with no_frameworks(), pytest.raises(pytest.fail.Exception, match="not import `wandb`.*`pytest.mark.thorough`"):
        importlib.import_module("wandb")


@pytest.mark.parametrize(
    ("line", "whole"),
    [
        ("pytestmark = pytest.mark.thorough", True),
        ('pytestmark = pytest.mark.thorough(reason="starts processes")', True),
        ("pytestmark = [\n    pytest.mark.gpu,\n    pytest.mark.skipif(True),\n]", True),
        ("pytestmark = [pytest.mark.slow]", True),
        ('pytestmark = pytest.mark.usefixtures("alone")', False),
        ("@pytest.mark.thorough\ndef test_() -> None: ...", False),
    ],
)
def test_files_marked_as_a_whole_are_recognised(tmp_path: Path, line: str, whole: bool) -> None:
    path = tmp_path / "test_planted.py"
    path.write_text(f"import pytest\n\n{line}\n", encoding="utf-8")
    assert is_left_out(path) == whole
