"""machines: JSON, annotations and exit codes say what was found, and nothing else reaches stdout."""

import json
import math
import os
import subprocess
import sys

import pytest

from smoothdiag import machines
from smoothdiag.cli import main

LATE = """
import os, sys, torch
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model(torch.ones(1, 2)).sum().backward()
optimizer.step()
torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
print("trained")
"""
CLEAN = LATE.replace("torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)", "")


def found(severity, **more) -> machines.Finding:
    return machines.Finding("name", severity, "text", "remedy", **more)


def ran(*arguments) -> int:
    try:
        return main([*map(str, arguments)])
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize(("severities", "fail_on", "of_script", "code"), [
    ([], "note", 0, 0),
    (["error"], None, 0, 0),
    (["error"], "error", 0, 10),
    (["warning", "note"], "error", 0, 0),
    (["warning"], "warning", 0, 10),
    (["note"], "warning", 0, 0),
    (["note"], "note", 0, 10),
    (["error"], "note", 3, 3),
    ([], None, 1, 1),
])  # fmt: skip
def test_exit_code_follows_the_worst_finding_unless_the_script_failed(severities, fail_on, of_script, code) -> None:
    assert machines.exit_code([found(each) for each in severities], fail_on, of_script) == code


def test_json_holds_no_nan_and_one_line() -> None:
    text = machines.document("doctor", [found("note", more={"x": math.inf})], 0, rate=math.nan, pair=(1.0, math.nan))
    assert "\n" not in text
    whole = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert (whole["rate"], whole["pair"], whole["findings"][0]["x"]) == (None, [1.0, None], None)
    assert (whole["findings"][0]["file"], whole["findings"][0]["line"]) == (None, None)
    assert whole["counts"] == {"error": 0, "warning": 0, "note": 1}


def test_annotations_are_escaped_as_github_reads_them() -> None:
    bad = machines.Finding("a,b:c", "note", "100%\nsure", "it's: x,y", "/r/odd,na:me%.py", 3, 2, 5, "steps")
    line = machines.workflow_commands("doctor", [bad], "/r")
    assert line == (
        "::notice file=odd%2Cna%3Ame%25.py,line=3,title=smoothdiag doctor%3A a%2Cb%3Ac::"
        "100%25%0Asure (2 of 5 steps)%0Ait's: x,y"
    )
    elsewhere = machines.Finding("n", "error", "t", "r", "/other/x.py")
    assert machines.workflow_commands("import", [elsewhere], "/r").startswith("::error file=/other/x.py,title=")


@pytest.mark.parametrize(("code", "options", "expected"), [
    (LATE, [], 0),
    (LATE, ["--fail-on", "error"], 10),
    (CLEAN, ["--fail-on", "note"], 0),
    (LATE + "sys.exit(10)", ["--fail-on", "error"], 10),
    (LATE + "sys.exit(2)", [], 2),
    (LATE + "1 / 0", ["--fail-on", "error"], 1),
])  # fmt: skip
def test_doctor_tells_its_own_exit_code_from_that_of_the_script(tmp_path, capsys, code, options, expected) -> None:
    script = tmp_path / "train.py"
    script.write_text(code)
    assert ran("doctor", "--json", *options, script) == expected
    captured = capsys.readouterr()
    whole = json.loads(captured.out)
    own = 10 if "exit(10)" in code else 2 if "exit(2)" in code else 1 if "1 / 0" in code else 0
    assert (whole["exit_code"], whole["script"]["exit_code"]) == (expected, own)
    assert (f"the script ended with exit code {own}" in captured.err) is (own != 0)
    assert "trained" in captured.err


@pytest.mark.thorough
def test_stdout_is_the_document_alone_whoever_prints(tmp_path) -> None:
    script = tmp_path / "train.py"
    script.write_text(LATE + "os.system('echo child')\nos.write(1, b'raw')\n")
    command = [sys.executable, "-m", "smoothdiag.cli", "doctor", "--json", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["counts"]["error"] == 1
    assert {"trained", "child"} < set(done.stderr.split())
    assert "raw" in done.stderr


@pytest.mark.slow
def test_a_document_comes_before_a_signal_ends_the_process(tmp_path) -> None:
    script = tmp_path / "train.py"
    script.write_text(LATE + "import signal\nos.kill(os.getpid(), signal.SIGTERM)\n")
    command = [sys.executable, "-m", "smoothdiag.cli", "doctor", "--json", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -15
    assert json.loads(done.stdout)["exit_code"] == 143


def test_annotations_of_the_doctor_are_relative_to_where_it_began(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("import os; os.chdir('/')" + LATE)
    assert ran("doctor", "--format", "github", "train.py") == 0
    os.chdir(tmp_path)
    line = capsys.readouterr().out.splitlines()[2]
    assert line.startswith(
        "::error file=train.py,line=7,title=smoothdiag doctor%3A clip-after-step::The clip ran after"
    )


def test_two_formats_at_once_are_refused(tmp_path, capsys) -> None:
    (tmp_path / "train.py").write_text(CLEAN)
    assert ran("doctor", "--json", "--format", "github", tmp_path / "train.py") == 2
    assert "`--format` should be json beside `--json`" in capsys.readouterr().err


def test_log_is_judged_by_its_findings(tmp_path, capsys) -> None:
    log = tmp_path / "log.csv"
    rows = [f"{k},{1 + k % 7 / 10},{3 - k / 100}" for k in range(40)]
    log.write_text("\n".join(["step,grad_norm,loss", *rows]) + "\n")
    assert ran("import", "--fail-on", "note", log) == 0
    capsys.readouterr()
    log.write_text("\n".join(["step,grad_norm,loss", *rows, *(f"{k},nan,nan" for k in range(40, 44))]) + "\n")
    assert ran("import", "--json", "--fail-on", "error", log) == 10
    whole = json.loads(capsys.readouterr().out)
    (dead,) = [each for each in whole["findings"] if each["severity"] == "error"]
    assert (dead["name"], dead["step"], dead["count"], dead["of"]) == ("dead-run", 40, 4, 44)
    assert whole["num_norms"] == 40
    assert ran("import", "--format", "github", log) == 0
    assert capsys.readouterr().out.startswith(
        f"::error file={log},title=smoothdiag import%3A dead-run::The run is dead"
    )
