"""doctor.command, doctor.script: a script runs as it does under Python itself, and the report follows it."""

import json
import os
import signal
import subprocess
import sys

import pytest

from smoothdiag.cli import main
from smoothdiag.doctor import run_script

LOOP = """
import sys, torch
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model(torch.ones(1, 2)).sum().backward()
optimizer.step()
torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
"""


def run(tmp_path, code, *arguments) -> int:
    """Returns the exit code of the command on a script with this code."""
    script = tmp_path / "train.py"
    script.write_text(code)
    options = [each for each in arguments if each == "--json"]
    rest = [each for each in arguments if each != "--json"]
    try:
        return main(["doctor", *options, str(script), *rest])
    except SystemExit as end:
        return end.code


def test_report_follows_what_the_script_prints(tmp_path, capsys) -> None:
    assert run(tmp_path, f"{LOOP}\nprint('trained')") == 0
    trained, _, head, _, titles, row, *_ = capsys.readouterr().out.splitlines()
    assert trained == "trained"
    assert head == "smoothdiag doctor: 1 finding in 1 step"
    assert titles.split() == ["severity", "finding", "seen", "line"]
    assert row.split() == ["error", "clip-after-step", *["1", "of", "1", "step"], f"{tmp_path}/train.py:7"]


def test_stdout_is_one_json_document(tmp_path, capsys) -> None:
    assert run(tmp_path, f"{LOOP}\nprint('trained')", "--json") == 0
    captured = capsys.readouterr()
    trained, report = captured.err.strip(), json.loads(captured.out)
    (found,) = report["findings"]
    assert (trained, report["steps"]) == ("trained", 1)
    assert (found["name"], found["file"], found["line"]) == ("clip-after-step", str(tmp_path / "train.py"), 7)
    assert found["code"] == "torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)"
    assert found["link"] == "docs/doctor.md#clip-after-step"


@pytest.mark.parametrize(("end", "code", "message"), [
    ("sys.exit(3)", 3, ""),
    ("sys.exit()", 0, ""),
    ("sys.exit('no data')", 1, "no data"),
    ("raise ValueError('wrong shape')", 1, "ValueError: wrong shape"),
    ("raise KeyboardInterrupt", 130, "KeyboardInterrupt"),
])  # fmt: skip
def test_exit_code_is_kept_and_the_report_comes_all_the_same(tmp_path, capsys, end, code, message) -> None:
    before = sys.argv, list(sys.path), sys.modules["__main__"]
    assert run(tmp_path, f"{LOOP}\n{end}") == code
    captured = capsys.readouterr()
    assert "clip-after-step: 1 of 1 step\n" in captured.out
    assert message in captured.err
    assert (sys.argv, sys.path, sys.modules["__main__"]) == before
    if "raise" in end:
        assert captured.err.count("File ") == 1, "only the script's own frame"
        assert 'train.py", line 9, in <module>' in captured.err


@pytest.mark.thorough
def test_script_finds_what_it_finds_under_python(tmp_path, capsys) -> None:
    (tmp_path / "beside.py").write_text("name = 'beside'")
    code = "import sys, beside\nprint(__name__, __file__, sys.argv, sys.path[0], beside.name)"
    assert run(tmp_path, code, "--lr", "3", "-h") == 0
    under_doctor = capsys.readouterr().out.splitlines()[0]
    command = [sys.executable, str(tmp_path / "train.py"), "--lr", "3", "-h"]
    under_python = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert under_doctor == under_python.strip()


WHERE = """
import os, sys
print(__name__, __file__, __package__, getattr(__spec__, "name", None), sys.argv, sys.path[:2])
os.chdir("/")
def f(x: int): pass
print(f.__annotations__, __cached__, os.path.exists(__file__), sys.modules["__main__"].__dict__ is globals())
"""


@pytest.mark.thorough
@pytest.mark.parametrize("options", [["inner/train.py"], ["-m", "inner.train"]])
def test_main_module_is_as_under_python(tmp_path, options) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "train.py").write_text(WHERE)
    outputs = []
    for command in ([sys.executable], [sys.executable, "-m", "smoothdiag.cli", "doctor"]):
        done = subprocess.run([*command, *options, "-x"], cwd=tmp_path, capture_output=True, text=True, check=True)
        outputs.append(done.stdout.splitlines()[:2])
    assert outputs[0] == outputs[1]


def test_only_the_first_process_reports_and_on_a_line_of_its_own(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(os, "getpid", os.getpid)
    assert run(tmp_path, f"{LOOP}\nimport os; os.getpid = lambda: -1", "--json") == 0  # as after os.fork
    assert capsys.readouterr().out == ""
    monkeypatch.undo()
    assert run(tmp_path, f"{LOOP}\nprint(1, end='')") == 0
    printed, report, *_ = capsys.readouterr().out.splitlines()
    assert printed == "1"
    assert report == "smoothdiag doctor: 1 finding in 1 step"


def test_exception_goes_to_the_hook_of_the_script(tmp_path, capsys) -> None:
    code = "import sys\nsys.excepthook = lambda kind, error, trace: print(kind.__name__, trace.tb_lineno)\n1 / 0"
    hook = sys.excepthook
    assert run(tmp_path, code) == 1
    assert capsys.readouterr().out.startswith("ZeroDivisionError 3\n")
    assert sys.excepthook is hook


def test_nothing_seen_is_said(tmp_path, capsys) -> None:
    assert run(tmp_path, "") == 0
    assert "no optimizer step was seen in this process" in capsys.readouterr().out
    for end, code in (("raise ValueError", 1), ("import sys; sys.exit(2)", 2)):
        assert run(tmp_path, end) == code
        assert f"the script ended with exit code {code} before its first optimizer step" in capsys.readouterr().out


STEPS = """
import torch
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(9):
    try:
        try:
            optimizer.zero_grad()
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
        except Exception:
            print("caught")
    finally:
        print("after", step)
print("end")
"""


def test_run_ends_after_the_steps_asked_for(tmp_path, capsys) -> None:
    script = tmp_path / "train.py"
    script.write_text(STEPS)
    for steps, last in ((3, ["after 2"]), (9, ["after 8"]), (10, ["after 8", "end"])):
        assert main(["doctor", "--steps", str(steps), str(script)]) == 0
        *printed, _, report = capsys.readouterr().out.splitlines()
        assert printed == [f"after {step}" for step in range(min(steps, 9))] + last[1:]
        assert report == f"smoothdiag doctor: no findings in {min(steps, 9)} steps."
    assert main(["doctor", "--steps", "0", str(script)]) == 2
    assert "`steps` should be at least 1. Found 0." in capsys.readouterr().err


def test_finding_is_explained_by_its_name(capsys) -> None:
    for name, code in (("clip-as-norm", 0), ("clip", 2)):
        with pytest.raises(SystemExit) as end:
            main(["doctor", "--explain", name])
        assert end.value.code == code
    captured = capsys.readouterr()
    assert captured.out.startswith("clip-as-norm\n\nThe loop calls `clip_grad_norm_(parameters, inf)` to read the")
    assert "invalid choice: 'clip' (choose from" in captured.err


def test_reader_that_leaves_early_makes_no_traceback(tmp_path, capsys, monkeypatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        assert run(tmp_path, f"{LOOP}\nsys.exit(3)") == 3
        broken.write("more")  # as Python does at its end
    assert capsys.readouterr().err == ""


@pytest.mark.thorough
def test_report_comes_before_a_signal_ends_the_process(tmp_path) -> None:
    script = tmp_path / "train.py"
    script.write_text(f"{LOOP}\nimport os\nos.kill(os.getpid(), 15)\nprint('on')")
    command = [sys.executable, "-m", "smoothdiag.cli", "doctor", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGTERM, "")
    assert done.stdout.startswith("\nsmoothdiag doctor: 1 finding in 1 step\n")
    assert "on" not in done.stdout.split()


HANDLERS = """
import os, signal
def handle(number, frame):
    if callable(earlier):
        earlier(number, frame)
    os.environ["HANDLED"] = "yes"
earlier = signal.getsignal(15)
if {own}:
    signal.signal(15, handle)
signal.raise_signal(15)
"""
FORKS = """
import os, signal
child = os.fork()
if not child:
    os._exit(0 if signal.getsignal(15) is signal.SIG_DFL else 1)
raise SystemExit(os.waitpid(child, 0)[1])
"""


@pytest.mark.parametrize("own", [False, True])
def test_handler_of_the_script_decides(tmp_path, monkeypatch, own) -> None:
    monkeypatch.setenv("HANDLED", "no")
    calls = []
    monkeypatch.setattr(os, "kill", lambda *call: calls.append(call))
    script, told = tmp_path / "train.py", []
    script.write_text(HANDLERS.format(own=own))
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert run_script(script, before_termination=told.append)[1] == 0
    finally:
        left = signal.signal(signal.SIGTERM, before)
    assert calls == ([] if own else [(os.getpid(), signal.SIGTERM)])
    assert len(told) == (0 if own else 1)
    assert os.environ["HANDLED"] == ("yes" if own else "no")
    assert (left is signal.SIG_DFL) is not own


@pytest.mark.thorough
def test_signal_ends_what_the_script_forks_as_without_the_doctor(tmp_path) -> None:
    script = tmp_path / "train.py"
    script.write_text(FORKS)
    assert run_script(script, before_termination=print)[1] == 0


def test_further_ranks_keep_quiet(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run(tmp_path, LOOP) == 0
    assert capsys.readouterr().out == ""


def test_missing_script_is_named(tmp_path, capsys) -> None:
    assert main(["doctor", str(tmp_path / "none.py")]) == 2
    assert "`script` should be a Python file. Found `" in capsys.readouterr().err
