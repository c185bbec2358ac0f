"""benchmarks/gpu_check: every part runs, and what a part has found stays if the part is stopped."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from places import REPOSITORY
from scripts import load

SCRIPT = REPOSITORY / "benchmarks" / "gpu_check" / "run.py"


@pytest.fixture(scope="module")
def check():
    return load(SCRIPT)


def part_of(check, folder: Path, code: str):
    script = folder / "part.py"
    script.write_text(code)
    return check.Part("part", [str(script)], 60.0)


@pytest.mark.thorough
def test_what_was_found_stays_if_a_part_is_stopped(check, tmp_path) -> None:
    code = "import time\nprint('FOUND {\"waits\": 3}', flush=True)\nprint('a line', flush=True)\ntime.sleep(60)"
    found = list[dict]()
    ended = check.run(part_of(check, tmp_path, code), 2.0, found.append)
    assert found == [{"waits": 3}]
    assert (ended["status"], ended["last_lines"]) == ("stopped after 2 s", ["a line"])


@pytest.mark.thorough
def test_an_error_of_a_part_is_told(check, tmp_path) -> None:
    ended = check.run(part_of(check, tmp_path, "1 / 0"), 30.0, lambda finding: None)
    assert ended["status"] == "exit status 1"
    assert "ZeroDivisionError" in ended["last_lines"][-1]


def test_parts_fit_into_eight_minutes_and_name_what_exists(check) -> None:
    parts = check.parts("cuda", False)
    assert check.TOTAL < 480
    assert sum(part.limit for part in parts) <= 1.1 * check.TOTAL  # the last one may find less time
    for part in parts:
        named = [Path(word) for word in part.command if word.endswith(".py")]
        assert named
        assert all((REPOSITORY / path).is_file() for path in named)
    (tests,) = [part.command for part in parts if part.name == "tests"]
    assert "tests/autoclip/test_autoclip_gpu.py" in tests


def test_tests_are_counted(check) -> None:
    lines = ["FAILED tests/a.py::b - AssertionError", "2 failed, 30 passed, 1 skipped in 9.1s"]
    assert check.tests_counted(lines) == {
        "failed": 2, "passed": 30, "skipped": 1, "failures": ["tests/a.py::b - AssertionError"]
    }  # fmt: skip


@pytest.mark.slow
def test_every_part_runs_without_a_gpu(tmp_path) -> None:
    out = tmp_path / "gpu_check.json"
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr + out.read_text()
    parts = json.loads(out.read_text())["parts"]
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(parts, "ok")
    (environment,) = parts["environment"]["found"]
    assert {"date", "device", "torch", "cuda", "commit"} <= set(environment)
    assert {found["case"] for found in parts["waits"]["found"]} >= {"path row", "default rows", "not due"}
    assert all(found["waits"] == 0 for found in parts["waits"]["found"] if found["case"] in ("not due", "step"))
    assert {found["optimizer"] for found in parts["rows_1k"]["found"]} == {"AdamW, foreach", "AdamW, fused"}
    assert not [found for found in parts["curvature_gpt"]["found"] if "failed" in found and "smooth" in found["case"]]
    assert parts["tests"]["found"] == [{"failures": [], **parts["tests"]["found"][0]}]
