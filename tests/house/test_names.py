"""tests: the names of tests are the same in every process that collects them, as pytest-xdist demands.

Wherever `make test` starts two workers, pytest-xdist compares the names of the fast tests, under two hash seeds.
"""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from places import REPOSITORY

pytestmark = pytest.mark.thorough

# A day later by the clock rather than by waiting. An address or a set order differs between any two processes.
COLLECT = """
import sys, time
now = time.time
time.time = lambda: now() + {later}
import pytest
options = ["--collect-only", "-p", "no:cacheprovider", "-m", "", "-o", "filterwarnings=", "-c", {settings!r}]
options += ["--rootdir", {root!r}]
sys.exit(pytest.main([*options, *{tests!r}]))
"""


def collected(places: list[tuple[Path, str, int]], tests: list[Path]) -> list[list[str]]:
    """Returns the names that processes collect side by side, each with a working directory, a hash seed and a clock."""
    processes = []
    for folder, seed, later in places:
        settings = str(REPOSITORY / "pyproject.toml")
        code = COLLECT.format(later=later, root=str(REPOSITORY), settings=settings, tests=[str(test) for test in tests])
        paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        environment.pop("PYTEST_ADDOPTS", None)
        command = [sys.executable, "-c", code]
        pipes = {"stdout": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=folder, env=environment, **pipes))
    printed = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(places), printed
    return [[line for line in text.splitlines() if "::" in line] for text in printed]


def faults(first: list[str], second: list[str], folder: Path) -> list[str]:
    """Returns the names that differ, come twice, or hold an address or a path of this machine."""
    local = re.compile(rf"0x[0-9a-f]{{6,}}|{re.escape(str(REPOSITORY))}|{re.escape(str(folder))}")
    times = Counter(first)
    return [
        f"{one} / {other}"
        for one, other in zip(first, second, strict=True)
        if one != other or times[one] > 1 or local.search(one)
    ]


def test_names_of_this_session_come_once_and_hold_no_address_and_no_path(request, tmp_path) -> None:
    names = [item.nodeid for item in request.session.items]
    assert faults(names, names, tmp_path) == []


@pytest.mark.slow
def test_two_processes_collect_the_same_names(tmp_path) -> None:
    first, second = collected([(REPOSITORY, "1", 0), (tmp_path, "2", 86400)], [REPOSITORY / "tests"])
    assert len(first) > 3000
    assert faults(first, second, tmp_path) == []


CHANGEABLE = {
    "clock": "gzip.compress(b'')",
    "hash seed": "hash('a')",
    "set": "set('abcdefgh')",
    "working directory": "os.getcwd()",
    "address": "object()",
    "path": "__file__",
    "twice": "'stable'",
}


def test_every_kind_of_name_that_would_change_is_found(tmp_path) -> None:
    test = tmp_path / "test_of_names.py"
    cases = [f"@pytest.mark.parametrize('a', [repr({value})])\ndef test_(a): ...\n" for value in CHANGEABLE.values()]
    blocks = [case.replace("test_", f"test_{place}") for place, case in enumerate(cases)]
    test.write_text("\n".join(["import gzip, os, pytest", *blocks]))
    first, second = collected([(REPOSITORY, "1", 0), (tmp_path, "2", 86400)], [test])
    assert len(faults([*first, first[-1]], [*second, second[-1]], tmp_path)) == len(CHANGEABLE) + 1
