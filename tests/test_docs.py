"""The README's example runs as it stands, and every figure and command it names exists."""

import re
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import pytest
import torch
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_is_an_example() -> None:
    assert len(EXAMPLES) == 1


@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_run(code, capsys) -> None:
    mpl.use("agg")
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
    loader = [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(60)]
    names = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), "F": F}
    exec(code, names | {"loader": loader})
    printed = capsys.readouterr().out
    assert "VERDICT" in printed
    assert "clip gradients at norm" in printed


def test_images_exist() -> None:
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("command", [*re.findall(r"`smoothdiag (\w+)", README), "demo", "plot", "clip"])
def test_commands_exist(command) -> None:
    run = [sys.executable, "-m", "smoothdiag.cli", command, "--help"]
    assert f"smoothdiag {command}" in subprocess.run(run, capture_output=True, text=True, check=True).stdout
