"""README.md: the examples run as they stand, and every figure and command that the page names exists."""

import re
import subprocess
import sys

import matplotlib as mpl
import pytest
import torch
from places import REPOSITORY
from trainers import settings_of_the_process, trainer_of

from smoothdiag.cli import main

pytestmark = pytest.mark.thorough

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_examples_run_one_after_the_other(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    mpl.use("agg")
    torch.manual_seed(0)
    names: dict = {}
    for example in EXAMPLES[:-1]:
        exec(example, names)
    assert names["scanned"].num_scans > 4
    printed = capsys.readouterr().out
    assert "VERDICT" in printed
    assert "no threshold" in printed
    assert "longest step" in printed


def test_the_callback_is_bound_as_the_readme_says(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with settings_of_the_process():
        trainer = trainer_of(tmp_path, max_grad_norm=0.0)
        exec(EXAMPLES[-1], {"trainer": trainer})
        trainer.train()
    assert "smoothdiag/longest_step" in trainer.state.log_history[-2]


def test_images_and_pages_exist() -> None:
    for path in re.findall(r"\]\(([^)]*)\)", README):
        assert path.startswith("https://pytorch.org") or (REPOSITORY / path.split("#")[0]).is_file(), path


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < 120


@pytest.mark.parametrize("command", [*re.findall(r"`smoothdiag ([\w-]+)", README), "demo", "plot", "clip"])
def test_commands_exist(command, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"smoothdiag {command}" in capsys.readouterr().out


def test_commands_run_as_a_module() -> None:
    run = [sys.executable, "-m", "smoothdiag.cli", "plot", "--help"]
    assert "smoothdiag plot" in subprocess.run(run, capture_output=True, text=True, check=True).stdout
