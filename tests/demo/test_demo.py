"""demo: it leaves its files, tells the story in its order, and gives the threshold that AutoClip found to paste."""

import math
import re
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from smoothdiag import Trace, fit_smoothness
from smoothdiag.cli import main
from smoothdiag.demo import Corpus, standard_library_text
from smoothdiag.demo.figures import SMOOTHED, plot_curves
from smoothdiag.demo.law import L0, L1, scanned_landscape, scanned_regression, what_follows, windows
from smoothdiag.demo.story import paste, table
from smoothdiag.demo.training import AUTO, NOTHING, USUAL, Run
from smoothdiag.fits import Verdict
from smoothdiag.report.page import write_report

NAMES = ("landscape", "regression", "training")
FILES = [f"{name}.{kind}" for name in NAMES for kind in ("jsonl", "png")] + ["curves.png", "summary.txt", "report.html"]
RUNS = {
    NOTHING: Run([30.0] * 40, 26.0),
    USUAL: Run([2.5] * 40, 2.4, 1.0),
    AUTO: Run([2.2] * 40, 2.3, 0.0903, "AutoClip: no step is longer than 2.\nNEXT: nothing to do.\nlongest step 2"),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> Path:
    """The folder of one short demo on a text of a few sentences, with small batches and a report of the training."""
    folder = tmp_path_factory.mktemp("demo")
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 100)
    out = folder / "out"
    out.mkdir()
    (out / "training.jsonl").write_text('{"smoothdiag_trace": 1, "precious": true}\n')

    def reported(traces, path) -> None:
        assert list(traces) == list(NAMES)
        assert all(len(Trace.read(trace)) > 10 for trace in traces.values())
        write_report({"training": traces["training"]}, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smoothdiag.demo.language.BATCH_SIZE", 4)
        patch.setattr("smoothdiag.demo.story.write_report", reported)
        assert main(["demo", "--text", str(text), "--steps", "32", "--out", str(out), "--device", "cpu"]) == 0
    return out


@pytest.mark.thorough
def test_demo_leaves_its_files_and_keeps_an_earlier_trace(told) -> None:
    found = {path.name for path in told.iterdir()}
    assert found == {*FILES, "training.1.jsonl"}
    assert Trace.read(told / "training.1.jsonl").meta == {"precious": True}
    rows = Trace.read(told / "training.jsonl").to_frame()
    assert set(rows["estimator"]) == {"local", "local_clip"}
    assert set(rows["lr"]) == {24.0}
    for name in NAMES[:2]:
        assert set(Trace.read(told / f"{name}.jsonl").to_frame()["estimator"]) == {"hessian_norm"}


@pytest.mark.thorough
def test_summary_tells_the_story_in_its_order(told) -> None:
    text = (told / "summary.txt").read_text()
    parts = [
        "1. DOES SMOOTHNESS",
        "VERDICT L0L1",
        "SO: ",
        "2. A RATE",
        f"\n{NOTHING}",
        f"\n{USUAL}",
        f"\n{AUTO}, which",
    ]
    parts += ["3. A THRESHOLD", "WHY: longest", "THE FIT OF landscape", "THE FIT OF training"]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    (pasted,) = re.findall(r"clip_grad_norm_\(model.parameters\(\), max_norm=([\d.e-]+)\)", text)
    rows = Trace.read(told / "training.jsonl").to_frame().query("estimator == 'local_clip' and step < 30")
    lengths = (rows["grad_norm"] / rows["smoothness"])[-13:]
    longest = 1.2 * lengths.median() * math.sqrt(max(rows["signal"][-13:].mean(), 0.2) / 0.5)
    assert float(pasted) == pytest.approx(longest / 24, rel=0.01)


def test_table_and_lines_to_paste_hold_the_numbers_of_the_runs() -> None:
    lines = table(RUNS, 100)
    assert [re.findall(r"\d+\.\d{3}$", line) for line in lines[1:4]] == [["26.000"], ["2.400"], ["2.300"]]
    assert "max_norm = 0.0903" in lines[3]
    assert "guessing is 4.61" in lines[4]
    pasted = "\n".join(paste(RUNS[AUTO], 24.0))
    for line in (
        "max_norm=0.0903)  # at lr=24",
        "max_grad_norm=0.0903",
        "gradient_clip_val=0.0903",
        "WHY: longest step",
    ):
        assert line in pasted
    assert paste(replace(RUNS[AUTO], threshold=math.nan), 24.0)[0].startswith("AutoClip")


def test_curves_are_told_apart_without_colour() -> None:
    mpl.use("agg")
    ax = plot_curves(RUNS, 24.0, 4.6, Figure().subplots())
    lines = ax.get_lines()
    assert len({line.get_linestyle() for line in lines[:3]}) == 3
    assert lines[0].get_xdata()[0] == SMOOTHED - 1
    np.testing.assert_allclose(lines[1].get_ydata(), 2.5)
    assert ax.get_legend().get_texts()[0].get_text() == f"{NOTHING}: ends at 30"


def test_windows_hold_frequencies_and_the_next_character() -> None:
    corpus = Corpus.from_text("abc" * 1000)
    features, following = windows(corpus, 5, seed=0)
    torch.testing.assert_close(features.square().sum(1), torch.ones(5))
    # Of 64 characters in turn the first one stands 22 times, and the one after the last follows it.
    assert torch.equal(corpus.codes.unique()[features[:, 1:].argmax(1)], (following - 2) % 3 + 1)


def test_what_follows_depends_on_the_verdict() -> None:
    norms = np.logspace(-1, 1, 60)
    frame = pd.DataFrame({"grad_norm": norms, "smoothness": 1 + 2 * norms, "saturation": 0.1})
    fit = fit_smoothness(frame.sample(frac=1, random_state=0), num_boot=20)
    said = {verdict: what_follows(replace(fit, flags=(), verdict=verdict)) for verdict in Verdict}
    assert "threshold of" in said[Verdict.L0L1]
    assert "a power found" in said[Verdict.POWER]
    assert "nothing to clip" in said[Verdict.CONSTANT]
    assert "decides nothing" in said[Verdict.NOT_IDENTIFIED]


def test_the_scan_of_the_landscape_finds_its_constants() -> None:
    fit = scanned_landscape(Trace())
    assert fit.verdict is Verdict.L0L1
    assert [fit.L0, fit.L1] == pytest.approx([L0, L1], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_scan_of_the_regression_finds_a_constant(seed) -> None:
    fit = scanned_regression(Corpus.from_text(standard_library_text()), Trace(), seed)
    assert fit.verdict is Verdict.CONSTANT
