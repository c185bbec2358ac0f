"""README.md: the examples run as they stand, and every figure and command that the page names exists."""

import re
import subprocess
import sys

import matplotlib as mpl
import pytest
import torch
from networks import mlp
from places import REPOSITORY
from torch.nn import functional as F
from trainers import settings_of_the_process, trainer_of

pytestmark = pytest.mark.thorough

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_examples_run_one_after_the_other(capsys) -> None:
    first, average, scan, clipping, _ = EXAMPLES
    mpl.use("agg")
    model = mlp(4, 16, 3)
    loader = [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(60)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    names = {"model": model, "optimizer": optimizer, "F": F, "loader": loader}
    exec(first, names)
    exec(average, names)
    assert names["optimizer"].param_groups[0]["threshold"] == names["rule"].threshold
    exec(scan, names)
    assert names["scanned"].num_scans > 4
    exec(clipping, names | {"optimizer": optimizer})
    printed = capsys.readouterr().out
    assert "VERDICT" in printed
    assert "no threshold from this fit" in printed
    assert "longest step" in printed


def test_the_callback_is_bound_as_the_readme_says(tmp_path) -> None:
    with settings_of_the_process():
        trainer = trainer_of(tmp_path, max_grad_norm=0.0)
        exec(EXAMPLES[4], {"trainer": trainer})
        trainer.train()
    assert "smoothdiag/longest_step" in trainer.state.log_history[-2]


def test_images_and_pages_exist() -> None:
    for path in re.findall(r"\]\(([^)]*)\)", README):
        assert (REPOSITORY / path).is_file(), path


@pytest.mark.parametrize("command", [*re.findall(r"`smoothdiag (\w+)", README), "demo", "plot", "clip"])
def test_commands_exist(command) -> None:
    run = [sys.executable, "-m", "smoothdiag.cli", command, "--help"]
    assert f"smoothdiag {command}" in subprocess.run(run, capture_output=True, text=True, check=True).stdout
