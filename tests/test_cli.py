"""cli: the commands write their files, print what they found, and turn wrong input into one line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

import smoothdiag
from smoothdiag import Trace
from smoothdiag.cli import main

COMMAND = [sys.executable, "-m", "smoothdiag.cli"]


def test_version_is_printed(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"smoothdiag {smoothdiag.__version__}\n"


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 100)
    return path


@pytest.fixture
def lawful(tmp_path) -> Path:
    """A trace that follows the law (1, 2) over three decades, with a little noise."""
    rng = np.random.default_rng(0)
    path = tmp_path / "lawful.jsonl"
    with Trace(path) as trace:
        for step, x in enumerate(10 ** rng.uniform(-2, 1, 300)):
            y = (1 + 2 * x) * np.exp(0.1 * rng.standard_normal())
            trace.append(
                {"step": step, "grad_norm": x, "smoothness": y, "estimator": "local", "lr": 0.1, "saturation": 0.1}
            )
    return path


@pytest.mark.thorough
def test_a_demo_killed_half_way_leaves_a_trace_that_fits(tmp_path, text, capsys) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [*COMMAND, "demo", "--text", str(text), "--steps", "100000", "--out", str(out), "--device", "cpu"],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    path = out / "landscape.jsonl"
    while process.poll() is None and not (path.exists() and len(path.read_bytes().splitlines()) > 20):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert main(["fit", str(path)]) == 0
    assert "VERDICT" in capsys.readouterr().out


@pytest.mark.filterwarnings("default::smoothdiag.SmoothdiagWarning")
def test_fit_of_a_half_written_trace_says_what_was_left_out_in_one_line(lawful, capsys) -> None:
    lawful.write_bytes(lawful.read_bytes()[:-30])
    shown = warnings.showwarning
    assert main(["fit", str(lawful)]) == 0
    assert warnings.showwarning is shown
    out, err = capsys.readouterr()
    assert "VERDICT L0L1" in out
    assert err == f"smoothdiag fit: warning: {lawful}: line 301 left out: half-written\n"


def test_fit_as_json_can_be_read_back(lawful, capsys) -> None:
    from smoothdiag import SmoothnessFit

    assert main(["fit", str(lawful), "--json", "--quantile", "0.5"]) == 0
    fit = SmoothnessFit.from_dict(json.loads(capsys.readouterr().out))
    assert fit.quantile == 0.5
    assert fit.L0 == pytest.approx(1, rel=0.1)
    assert fit.L1 == pytest.approx(2, rel=0.1)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("flags", "suffix", "names"),
    [([], "", ["figure.png", "figure.fit.png"]), (["--over-steps"], ".png", ["figure.png"])],
    ids=["smoothness", "over steps"],
)
def test_plot_writes_images(lawful, tmp_path, flags, suffix, names, capsys) -> None:
    assert main(["plot", str(lawful), "--out", str(tmp_path / f"figure{suffix}"), *flags]) == 0
    written = [tmp_path / name for name in names]
    assert sorted(tmp_path.glob("figure*")) == sorted(written)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    assert capsys.readouterr().out.split() == [str(path) for path in written]


@pytest.mark.thorough
def test_all_plots_have_names_of_their_own(lawful, tmp_path) -> None:
    assert main(["plot", str(lawful)]) == main(["plot", str(lawful), "--over-steps"]) == 0
    names = ["lawful.fit.png", "lawful.smoothness.png", "lawful.trace.png"]
    assert sorted(p.name for p in tmp_path.glob("*.png")) == names


def test_plot_draws_sharpness_where_there_is_some(lawful, tmp_path, capsys) -> None:
    frame = Trace.read(lawful).to_frame()
    with Trace(tmp_path / "sharp.jsonl") as trace:
        trace.extend(frame.assign(estimator="sharpness", stability_limit=2.0).to_dict("records"))
    assert main(["plot", str(tmp_path / "sharp.jsonl"), "--sharpness"]) == 0
    assert [path.name for path in tmp_path.glob("*.png")] == ["sharp.sharpness.png"]
    assert main(["plot", str(lawful), "--sharpness"]) == 2
    assert "an estimator of curvature" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plot", str(lawful), "--sharpness", "--over-steps"])


@pytest.mark.thorough
def test_fit_by_group_prints_a_line_per_group(lawful, capsys) -> None:
    frame = Trace.read(lawful).to_frame()
    with Trace(lawful.with_name("groups.jsonl")) as trace:
        for group, factor in (("head", 2.0), ("all", 1.0), ("dead", 0.0)):
            trace.extend(frame.assign(group=group, smoothness=factor * frame["smoothness"]).to_dict("records"))
    command = ["fit", str(lawful.with_name("groups.jsonl")), "--by-group", "--quantile", "0.5"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines() if line.endswith("L0L1")] == ["all", "head"]
    assert "dead has no fit" in printed
    assert "quantile 0.5" in printed
    assert main([*command, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert list(plain["fits"]) == ["all", "head"]
    assert list(plain["failed"]) == ["dead"]


def test_a_missing_reader_is_said_in_one_line(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "fastparquet", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    assert main(["fit", str(tmp_path / "t.parquet")]) == 2
    assert "pyarrow" in capsys.readouterr().err


def test_clip_prints_a_threshold_and_a_reason(lawful, capsys) -> None:
    assert main(["clip", str(lawful), "--lr", "0.1"]) == 0
    printed = capsys.readouterr().out
    assert "clip gradients at norm" in printed
    assert "NEXT: set max_norm=" in printed


def test_clip_takes_the_largest_rate_of_the_trace_unless_one_is_given(tmp_path, capsys) -> None:
    path = tmp_path / "run.jsonl"
    with Trace(path) as trace:
        for step, x in enumerate(10 ** np.sin(np.arange(100.0))):
            lr = 0.1 if step else 0.05
            trace.append({"step": step, "grad_norm": x, "smoothness": 1 + 2 * x, "saturation": 0.1, "lr": lr})
    assert main(["clip", str(path), "--num-boot", "20"]) == 0
    printed = capsys.readouterr().out
    assert "NEXT: set max_norm=4.5 at lr=0.1 (" in printed
    assert printed.endswith("the rate 0.1 is the largest of the trace; --lr gives another\n")
    assert main(["clip", str(path), "--lr", "0.05", "--num-boot", "20"]) == 0
    assert "of the trace" not in capsys.readouterr().out
    assert main(["clip", str(path), "--lr", "5", "--num-boot", "20"]) == 0
    assert capsys.readouterr().out.startswith(
        "no threshold to use: the learning rate 5 is too large for any.\nNEXT: lower"
    )


def test_clip_takes_the_momentum_of_the_trace_unless_one_is_given(tmp_path, capsys) -> None:
    path = tmp_path / "run.jsonl"
    with Trace(path, meta={"optimizer": "SGD", "follows_gradients": True, "momentum": 0.9, "gain": 10.0}) as trace:
        for step, x in enumerate(10 ** np.sin(np.arange(100.0))):
            trace.append({"step": step, "grad_norm": x, "smoothness": 1 + 2 * x, "saturation": 0.1})
    assert main(["clip", str(path), "--lr", "0.01", "--num-boot", "20"]) == 0
    printed = capsys.readouterr().out
    assert "NEXT: set max_norm=4.5 at lr=0.01 and momentum=0.9" in printed
    assert "the momentum 0.9, which the trace names" in printed
    assert main(["clip", str(path), "--lr", "0.01", "--num-boot", "20", "--momentum", "0"]) == 0
    assert "NEXT: set max_norm=49.5 at lr=0.01 (" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("exponent", "words"), [(0.5, "NEXT: set max_norm="), (2.0, "`sd.step_rate` makes a learning rate")]
)
def test_clip_on_a_power_gives_the_threshold_of_its_law_or_says_why_there_is_none(exponent, words, tmp_path, capsys):
    rng = np.random.default_rng(0)
    x = 10 ** rng.uniform(-1, 1, 200)
    y = 2 * x**exponent * np.exp(0.1 * rng.standard_normal(200))
    path = tmp_path / "power.jsonl"
    with Trace(path) as trace:
        for step, (norm, smoothness) in enumerate(zip(x, y, strict=True)):
            row = {"step": step, "grad_norm": norm, "smoothness": smoothness, "estimator": "local", "saturation": 0.1}
            trace.append(row)
    assert main(["clip", str(path), "--lr", "0.1"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert words in printed
    if exponent == 0.5:  # 1/(2 c^.5) times 2 (2^.5 - 1) is 0.1 at c = 17.2, and the .95 quantile lies 1.16 times higher
        threshold = float(re.search(r"clip gradients at norm ([\d.]+)", printed)[1])
        assert threshold == pytest.approx(17.2 / 1.18**2, rel=0.2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "nowhere.jsonl"], "There is no trace at `nowhere.jsonl`"),
        (["fit", "{foreign}"], "should be a smoothdiag trace"),
        (
            ["fit", "{lawful}", "--quantile", "1.5"],
            r"Parameter `quantile` should be in \(0, 1\). Found `quantile = 1.5`",
        ),
        (["fit", "{lawful}", "--estimator", "path"], "path"),
        (["clip", "{lawful}", "--lr", "-1"], "Parameter `lr` should be"),
        (["demo", "--steps", "0"], "Parameter `--steps` should be at least 1. Found 0"),
        (["demo", "--text", "{foreign}"], "The text should have at least"),
        (["demo", "--text", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(arguments, message, lawful, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "foreign.txt").write_text("hello\n")
    filled = [a.format(foreign=tmp_path / "foreign.txt", lawful=lawful) for a in arguments]
    assert main(filled) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1


@pytest.mark.thorough
def test_importing_loads_no_plotting_no_tables_no_framework_no_sharding() -> None:
    code = (
        "import sys, smoothdiag; print(sorted({'matplotlib', 'seaborn', 'pandas', 'scipy', 'transformers', "
        "'accelerate', 'lightning', 'tensorboard', 'wandb', 'PIL', 'torch.distributed.tensor'} & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_every_public_name_exists() -> None:
    import smoothdiag

    for name in smoothdiag.__all__:
        assert getattr(smoothdiag, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        smoothdiag.nonsense  # noqa: B018
