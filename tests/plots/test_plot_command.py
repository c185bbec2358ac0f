"""plots.command, plots.saving: every kind of figure comes from the command line, of several runs too."""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from smoothdiag.cli import main
from smoothdiag.plots.command import KINDS
from smoothdiag.trace import Trace


def write(path: Path, seed: int = 0) -> None:
    rng, rows = np.random.default_rng(seed), []
    for step, norm in enumerate(10 ** rng.uniform(-1, 1, 40)):
        row = {"step": step, "grad_norm": norm, "saturation": 0.1, "lr": 0.1, "loss": 1.0, "stability_limit": 20.0}
        row |= {"smoothness": (1 + norm) * np.exp(0.1 * rng.standard_normal())}
        ours = {"estimator": "local_clip", "longest_step": 0.5, "threshold": 5.0, "peak_lr": 0.1}
        rows += [row | {"estimator": "local", "group": group} for group in ("all", "head")]
        rows += [row | {"estimator": "sharpness"}, row | ours]
    with Trace(path) as trace:
        trace.extend(rows)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("one", "two")):
        write(tmp_path / f"{name}.jsonl", seed)
    return tmp_path


FEW = ["--num-boot", "20"]


@pytest.mark.thorough
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_one_figure_of_several_runs_too(kind, folder, capsys) -> None:
    assert main(["plot", "one.jsonl", "two.jsonl", "--kind", kind, "-o", "new/x.svg", *FEW]) == 0
    assert capsys.readouterr().out == "new/x.svg\n"
    assert [path.name for path in folder.rglob("*.svg")] == ["x.svg"]
    ElementTree.parse(folder / "new/x.svg")
    said = (folder / "new/x.svg").read_text(encoding="utf-8")  # its comments hold the texts of the figure
    tells_runs_apart = kind in ("trace", "sharpness", "clipping", "spikes", "constants")
    assert [f"<!-- {name} -->" in said for name in ("one", "two")] == [tells_runs_apart] * 2


@pytest.mark.parametrize("suffix", ["svg", "pdf"])
def test_vector_files_are_the_same_each_time(suffix, folder) -> None:
    for name in ("a", "b"):
        assert main(["plot", "one.jsonl", "--kind", "trace", "-o", f"{name}.{suffix}"]) == 0
    assert (folder / f"a.{suffix}").read_bytes() == (folder / f"b.{suffix}").read_bytes()


def test_history_of_a_file_stands_in_for_that_of_the_trace(folder, capsys) -> None:
    history = pd.DataFrame({"step": [1], "longest_step": [0.9], "threshold": [0.9], "lr": [0.1]})
    history.to_csv(folder / "history.csv")
    assert main(["plot", "one.jsonl", "--kind", "clipping", "--history", "history.csv"]) == 0
    assert main(["plot", "one.jsonl", "two.jsonl", "--kind", "clipping", "--history", "history.csv"]) == 2
    assert "`--history` should be given once for each of 2 traces. Found 1." in capsys.readouterr().err


def test_flags_of_before_and_a_kind_exclude_each_other(folder) -> None:
    for flag in ("--over-steps", "--sharpness", "--by-group"):
        with pytest.raises(SystemExit):
            main(["plot", "one.jsonl", flag, "--kind", "fit"])
