"""examples/huggingface.py, benchmarks/frameworks: example and benchmark run on a text of a few lines."""

import gzip
import logging
import runpy
import sys
from collections.abc import Iterator
from unittest.mock import patch

import pytest
from places import REPOSITORY
from trainers import settings_of_the_process

from smoothdiag import Trace

pytestmark = pytest.mark.thorough


@pytest.fixture
def data(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "data" / "tinyshakespeare"
    folder.mkdir(parents=True)
    with gzip.open(folder / "input.txt.gz", "wt", encoding="utf-8") as stream:
        stream.write("What is a threshold, that it should not move?\n" * 60)
    monkeypatch.setenv("SMOOTHDIAG_DATA", str(folder.parent))


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    with settings_of_the_process():
        yield
    logging.disable(logging.NOTSET)


def run(script: str, *options: str) -> None:
    with patch.object(sys, "argv", [script, *options]):
        runpy.run_path(str(REPOSITORY / script), run_name="__main__")


def test_example_ends_in_a_fit_and_a_threshold(data, tmp_path, capsys) -> None:
    run("examples/huggingface.py", "--steps", "20", "--auto-clip", "--output", str(tmp_path / "run"))
    printed = capsys.readouterr().out
    assert "VERDICT" in printed
    assert "this is max_norm" in printed.splitlines()[-1]
    rows = Trace.read(tmp_path / "run" / "smoothdiag.jsonl")
    assert {row["step"] for row in rows if row["estimator"] == "path"} == {0, 5, 10, 15}


def test_example_says_which_text_is_missing(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SMOOTHDIAG_DATA", str(tmp_path))
    with pytest.raises(SystemExit, match="Set SMOOTHDIAG_DATA to the folder that holds it"):
        run("examples/huggingface.py")


@pytest.mark.slow
def test_benchmark_prints_a_line_for_a_rate(data, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    run("benchmarks/frameworks/trainer_thresholds.py", "--lr", "1", "--seeds", "0", "--steps", "10")
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("1 0 "))
    losses = [float(word) for word in line.split()[2:11]]
    best = min(loss for loss in losses[:8] if loss == loss)
    assert f"{losses[8] / best - 1:+.1%}"[:-3] in line
