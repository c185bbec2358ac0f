"""measure.scan.command: `smoothdiag scan` measures saved weights, says where its trace is, and prints the fit."""

import json
import re

import pytest
import torch

from smoothdiag import Trace
from smoothdiag.cli import main

SETUP = """
import torch
import smoothdiag as sd

def make():
    model = sd.problems.exponential(L0=1.0, L1=2.0, dim=3).as_module(torch.ones(3, dtype=torch.float64))
    return model, lambda model, batch: model(), [None]

def half():
    return torch.nn.Linear(1, 1)

number = 3
"""
ONES = {"x": torch.full((3,), 0.5, dtype=torch.float64)}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "setup_of_scan.py").write_text(SETUP)
    return tmp_path


def scan(*arguments: str) -> int:
    return main(["scan", "setup_of_scan.py:make", "--no-progress", "--budget", "120", *arguments])


def test_the_trace_comes_first_and_then_the_fit(capsys) -> None:
    assert scan() == 0
    out = capsys.readouterr().out
    trace = Trace.read("scan.jsonl")
    used = sum(row["num_grads"] for row in trace)
    assert out.startswith(f"scan.jsonl: {len(trace)} rows, {used} gradients\n")
    assert used <= 120
    assert "VERDICT" in out


def test_the_fit_as_json_stands_alone_on_the_output(capsys) -> None:
    assert scan("--json", "-o", "other.jsonl") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["num_points"] > 5
    assert err.startswith("other.jsonl: ")


@pytest.mark.parametrize("key", ["", "model", "state_dict", "model_state_dict"])
def test_weights_are_loaded_from_the_usual_places(key, capsys) -> None:
    torch.save({key: ONES, "epoch": 3} if key else ONES, "weights.pt")
    assert scan("--weights", "weights.pt", "--step", "7") == 0
    trace = Trace.read("scan.jsonl")
    assert trace[0]["param_norm"] == pytest.approx(0.5 * 3**0.5)
    assert trace[0]["step"] == 7


def test_further_options_reach_the_scan(capsys) -> None:
    torch.save(ONES, "end.pt")
    options = ["--toward", "end=end.pt", "--direction", "to end", "--direction", "random 1", "--points", "2"]
    assert scan(*options, "--seed", "3", "--max-loss", "50") == 0
    meta = Trace.read("scan.jsonl").meta["scan"]
    assert meta["directions"] == ["to end", "random 1"]
    assert (meta["seed"], meta["max_loss"], meta["points"], meta["budget"]) == (3, 50.0, 2, 120)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["setup_of_scan.py"], "should name a file and a function in it. Found `setup_of_scan.py`"),
        (["setup_of_scan.py:3"], "should name a file and a function in it"),
        (["nothing.py:make"], "There is no file `nothing.py`"),
        (["setup_of_scan.py:nothing"], "should have a function `nothing`. Found NoneType"),
        (["setup_of_scan.py:number"], "should have a function `number`. Found int"),
        (["setup_of_scan.py:half"], r"`half` should return \(model, loss_fn, batches\). Found Linear"),
        (["setup_of_scan.py:make", "--weights", "no.pt"], "There are no weights at `no.pt`"),
        (["setup_of_scan.py:make", "--weights", "setup_of_scan.py"], "should be weights that torch.save wrote"),
        (["setup_of_scan.py:make", "--weights", "list.pt"], "should hold a state dict. Found list"),
        (["setup_of_scan.py:make", "--weights", "other.pt"], "`--weights` should fit the model.*Missing key"),
        (["setup_of_scan.py:make", "--toward", "end.pt"], "`--toward` should be NAME=CKPT. Found `end.pt`"),
        (["setup_of_scan.py:make", "--direction", "up"], "Found 'up'"),
        (["setup_of_scan.py:make", "-o", "scan.csv"], "`--out` should end in .jsonl"),
        (["setup_of_scan.py:make", "--budget", "0"], "`budget` should be a whole number of at least 1"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(arguments, message, capsys) -> None:
    torch.save([1], "list.pt")
    torch.save({"y": torch.ones(3)}, "other.pt")
    assert main(["scan", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert re.search(message, err), err
