"""console, cli: a command prints no traceback where nobody reads, the disk is full, or the input is hostile."""

import gzip
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from smoothdiag import Trace, console
from smoothdiag.cli import main

LOOP = """
import torch
from torch.nn.utils import clip_grad_norm_
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model(torch.ones(3, 2)).mean().backward()
optimizer.step()
"""


def write_trace(path: Path, groups: tuple[str, ...] = ("all",), seed: int = 0) -> Path:
    with Trace(path) as trace:
        for step, norm in enumerate(10 ** np.random.default_rng(seed).uniform(-1, 1, 60)):
            for group in groups:
                row = {"step": step, "estimator": "local", "group": group, "grad_norm": norm, "smoothness": 1 + norm}
                trace.append(row | {"saturation": 0.1, "lr": 0.1, "loss": 1.0})
    return path


def test_counts_have_their_nouns_in_the_right_number() -> None:
    assert [console.counted(number, "row") for number in (0, 1, 2)] == ["0 rows", "1 row", "2 rows"]
    assert [console.counted(n, "line is", "lines are") for n in (0, 1, 2)] == [
        "0 lines are",
        "1 line is",
        "2 lines are",
    ]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_trace(tmp_path / "run.jsonl")
    (tmp_path / "log.csv").write_text("step,grad_norm\n1,0.5\n2,1.5\n")
    (tmp_path / "train.py").write_text(LOOP)
    (tmp_path / "talks.py").write_text(f"{LOOP}\nprint('word ' * 100000)")
    (tmp_path / "leaves.py").write_text(f"{LOOP}\nprint('word')\nraise SystemExit(3)")
    return tmp_path


PRINTING = {
    "fit": (["fit", "run.jsonl"], 141),
    "fit as JSON, more than a buffer": (["fit", "run.jsonl", "--json"], 141),
    "fit by group": (["fit", "run.jsonl", "--by-group"], 141),
    "plot": (["plot", "run.jsonl", "--over-steps"], 141),
    "clip": (["clip", "run.jsonl"], 141),
    "import": (["import", "log.csv"], 141),
    "version": (["--version"], 141),
    "help": (["fit", "--help"], 141),
    "doctor": (["doctor", "train.py"], 0),  # the script's own code: it trained to its end
    "doctor explains": (["doctor", "--explain", "clip-never-binds"], 141),
    "doctor, the script prints": (["doctor", "talks.py"], 141),
    "doctor, the script ends otherwise": (["doctor", "leaves.py"], 3),
}


@pytest.mark.thorough
@pytest.mark.parametrize(("arguments", "code"), PRINTING.values(), ids=PRINTING)
def test_nothing_is_said_where_nobody_reads(arguments, code, folder, capsys, monkeypatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = main(arguments)
            except SystemExit as end:
                found = end.code
        assert found == code
        broken.write("more")  # as Python does at its end
    assert capsys.readouterr().err == ""


@pytest.mark.thorough
@pytest.mark.parametrize("module", ["smoothdiag", pytest.param("smoothdiag.cli", marks=pytest.mark.slow)])
def test_a_process_ends_quietly_too(module, folder) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as broken:
        command = [sys.executable, "-m", module, "clip", "run.jsonl"]
        done = subprocess.run(command, stdout=broken, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.thorough
def test_a_process_without_output_works(folder) -> None:
    command = f"exec {sys.executable} -m smoothdiag clip run.jsonl >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], check=False).returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("arguments", [["clip", "run.jsonl"], ["fit", "run.jsonl", "--json"]], ids=["short", "long"])
def test_a_full_disk_is_one_line(arguments, folder, capsys, monkeypatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(arguments) == 2
        full.write("more")
    error = capsys.readouterr().err
    assert error.startswith(f"smoothdiag {arguments[0]}: ")
    assert error.count("\n") == 1


HOSTILE = {
    "missing": lambda path: None,
    "folder": lambda path: path.mkdir(),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(3000)),
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 20),
    "half a gzip": lambda path: path.write_bytes(gzip.compress(b"step,grad_norm\n1,2\n" * 99, mtime=0)[:40]),
    "a word": lambda path: path.write_text("hello\n"),
    "a list": lambda path: path.write_text("[1, 2]\n"),
    "a number": lambda path: path.write_text("3\n"),
    "nested": lambda path: path.write_text("[" * 100000),
    "a header alone": lambda path: path.write_text('{"smoothdiag_trace": 1}\n'),
    "another version": lambda path: path.write_text('{"smoothdiag_trace": 99}\n'),
    "names alone": lambda path: path.write_text("step,grad_norm,smoothness\n"),
}
READING = {
    "fit": ["fit", "{}"],
    "fit by group": ["fit", "--by-group", "{}"],
    "plot": ["plot", "{}"],
    "plot over steps": ["plot", "--over-steps", "{}"],
    "plot sharpness": ["plot", "--sharpness", "{}"],
    "clip": ["clip", "{}"],
    "import": ["import", "{}"],
}
NAMES = ["bad.jsonl", "bad.csv", "bad.parquet", "bad.json", "bad", "with a\n\x1b[31mline.jsonl"]


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES, ids=["jsonl", "csv", "parquet", "json", "no suffix", "odd name"])
@pytest.mark.parametrize("content", HOSTILE)
@pytest.mark.filterwarnings("ignore::smoothdiag.SmoothdiagWarning")
def test_hostile_input_is_one_line_and_code_2(content, name, tmp_path, capsys) -> None:
    HOSTILE[content](tmp_path / name)
    for command, arguments in READING.items():
        assert main([part.format(tmp_path / name) for part in arguments]) == 2, command
        out, error = capsys.readouterr()
        assert (out, error.count("\n")) == ("", 1), (command, error)
        assert error.startswith(f"smoothdiag {arguments[0]}: "), (command, error)
        assert error.rstrip("\n").isprintable(), (command, error)


WRONG = {
    "no such group": ["fit", "run.jsonl", "--group", "nobody"],
    "no such group among several": ["fit", "run.jsonl", "--by-group", "--group", "nobody"],
    "several groups for one fit": ["fit", "run.jsonl", "--group", "a", "--group", "b"],
    "several estimators for one fit": ["clip", "run.jsonl", "--estimator", "a", "--estimator", "b"],
    "several groups over steps": ["plot", "run.jsonl", "--over-steps", "--group", "a", "--group", "b"],
    "too few resamples": ["fit", "run.jsonl", "--num-boot", "1"],
    "negative seed": ["clip", "run.jsonl", "--seed", "-1"],
    "quantile that is none": ["fit", "run.jsonl", "--quantile", "nan"],
    "rate that is none": ["clip", "run.jsonl", "--lr", "nan"],
    "image below a file": ["plot", "run.jsonl", "--out", "log.csv/x.png"],
    "image that is a folder": ["plot", "run.jsonl", "--out", "."],
    "image of unknown kind": ["plot", "run.jsonl", "--out", "x.nonsense"],
    "trace below a file": ["import", "log.csv", "--out", "run.jsonl/x.jsonl"],
    "threshold that is none": ["import", "log.csv", "--threshold", "nan"],
    "script that is missing": ["doctor", "nowhere.py"],
    "script that is a folder": ["doctor", "."],
    "steps that are none": ["doctor", "--steps", "0", "train.py"],
    "text that is missing": ["demo", "--text", "nowhere.txt"],
    "text that is a folder": ["demo", "--text", "."],
    "demo below a file": ["demo", "--text", "talks.py", "--steps", "1", "--out", "log.csv/demo"],
}


@pytest.mark.thorough
@pytest.mark.parametrize("arguments", WRONG.values(), ids=WRONG)
@pytest.mark.filterwarnings("ignore::smoothdiag.SmoothdiagWarning")
def test_wrong_arguments_are_one_line_and_code_2(arguments, folder, capsys) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"smoothdiag {arguments[0]}: ")
    assert error.count("\n") == 1


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("command", READING)
def test_no_permission_is_one_line(command, folder, capsys) -> None:
    (folder / "run.jsonl").chmod(0)
    assert main([part.format("run.jsonl") for part in READING[command]]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.thorough
def test_commands_take_several_runs(folder, capsys) -> None:
    write_trace(folder / "other run.jsonl", seed=1)
    for arguments in (["fit"], ["clip"], ["plot", "--out", "new/folder/x.png"]):
        assert main([arguments[0], "run.jsonl", "other run.jsonl", *arguments[1:]]) == 0
        assert capsys.readouterr().err == ""
    assert sorted(path.name for path in (folder / "new/folder").iterdir()) == ["x.fit.png", "x.png"]
    main(["fit", "run.jsonl", "other run.jsonl"])
    assert "runs                  2" in capsys.readouterr().out


@pytest.mark.thorough
def test_groups_can_be_chosen_and_drawn(folder, capsys) -> None:
    write_trace(folder / "groups.jsonl", ("all", "body", "head"))
    command = ["--by-group", "--group", "head", "--group", "all", "--num-boot", "20", "--seed", "1"]
    assert main(["fit", "groups.jsonl", *command]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith(("all ", "body ", "head "))] == ["head", "all"]
    assert main(["plot", "groups.jsonl", *command]) == 0
    assert capsys.readouterr().out.split() == ["groups.groups.png", "groups.constants.png"]
    assert (folder / "groups.constants.png").read_bytes().startswith(b"\x89PNG")


def test_one_line_escapes_what_moves_the_cursor() -> None:
    assert console.one_line("a\n  b\x1b[31m\0ü\udc80") == r"a b\x1b[31m\x00ü\udc80"
