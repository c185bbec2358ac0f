"""benchmarks/verdicts: null cases and laws are what they are called, and a count that was killed goes on."""

import importlib
import json
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from places import REPOSITORY
from scripts import load

pytestmark = pytest.mark.thorough

FOLDER = REPOSITORY / "benchmarks" / "verdicts"
MODULES = ("null_runs", "probed_runs", "tally", "true_laws")
COLUMNS = {"step", "grad_norm", "smoothness", "saturation", "estimator", "data"}


@pytest.fixture(scope="module")
def bench():
    """The modules of the benchmark, which are scripts beside each other and no package."""
    sys.path.insert(0, str(FOLDER))
    yield SimpleNamespace(
        **{name: importlib.import_module(name) for name in MODULES},
        run=load(FOLDER / "run.py"),
        power=load(FOLDER / "power.py"),
    )
    sys.path.remove(str(FOLDER))


def start(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    script.main()


def test_there_are_fifteen_null_cases_most_of_them_run(bench) -> None:
    assert len(bench.null_runs.NULLS) + len(bench.probed_runs.PROBED) == 15
    sampled = [name for name, case in bench.null_runs.NULLS.items() if ", sampled:" in case.__doc__]
    assert len(sampled) == 2


def test_every_simulated_case_gives_rows_by_its_seed_alone(bench) -> None:
    for name, case in bench.null_runs.NULLS.items():
        found = [pd.concat(rows) if isinstance(rows, list) else rows for rows in (case(3), case(3), case(4))]
        pd.testing.assert_frame_equal(found[0], found[1])
        assert set(found[0]) >= COLUMNS, name
        assert (found[0]["grad_norm"].to_numpy() != found[2]["grad_norm"].to_numpy()).all(), name


def test_products_with_the_hessian_are_differences_of_the_gradient(bench, monkeypatch) -> None:
    """Where the Hessian is not a constant matrix written out in the case."""
    gradients = {
        "normalised_weights": lambda w: (
            (np.logspace(-1, 1, 40) - np.logspace(-1, 1, 40) @ w**2 / (w @ w)) * w / (w @ w)
        ),
        "two_layer_linear": lambda w: (w[0] @ w[1] - 1) * w[::-1],
    }
    for name, gradient in gradients.items():
        seen = []
        monkeypatch.setattr(bench.null_runs, "row", lambda *values, seen=seen: seen.append(values[3:]) or {"step": 0})
        bench.null_runs.NULLS[name](0)
        for weights, found, product in seen[:100:10]:
            np.testing.assert_allclose(found, gradient(weights), rtol=1e-9)
            ahead, behind = (gradient(weights + sign * 1e-6 * found) for sign in (1, -1))
            np.testing.assert_allclose(product, (ahead - behind) / 2e-6, rtol=1e-4, atol=1e-4 * np.abs(product).max())


def test_laws_hold_exactly_on_their_landscapes(bench) -> None:
    rows = bench.true_laws.exponential_trained(0)
    np.testing.assert_allclose(rows["smoothness"], 1 + 2 * rows["grad_norm"], rtol=1e-12)
    distances = np.linspace(0.01, 2, 50)
    norms, smoothness = bench.true_laws.cosh(distances)
    np.testing.assert_allclose(smoothness, np.sqrt(1 + 4 * norms**2), rtol=1e-12)
    norms, smoothness = bench.true_laws.hybrid(distances)
    np.testing.assert_allclose(smoothness, np.maximum(1, 2 * norms), rtol=1e-12)


def test_rows_of_a_run_have_the_range_and_the_noise_that_were_asked_for(bench) -> None:
    rows = bench.true_laws.run_rows(np.random.default_rng(0), 1.2, 0.35, 2000, bench.true_laws.line)
    low, high = np.log10(np.quantile(rows["grad_norm"], [0.025, 0.975]))
    assert high - low == pytest.approx(1.2)
    assert np.log(rows["smoothness"] / (1 + 2 * rows["grad_norm"])).std() == pytest.approx(0.35, rel=0.05)


def test_two_cases_are_counted_and_a_count_goes_on_where_it_stopped(bench, monkeypatch, tmp_path, capsys) -> None:
    out = tmp_path / "results.json"
    small = ("--cases", "moving_targets", "quadratic", "--quantiles", 0.8, "--num-boot", 20, "--out", out)
    start(bench.run, monkeypatch, *small, "--seeds", 1)
    before = json.loads(out.read_text())["cases"]
    assert set(before) == {"moving_targets", "quadratic"}
    assert before["quadratic"]["fits"]["0.8"]["0"]["verdict"] == "CONSTANT"
    start(bench.run, monkeypatch, *small, "--seeds", 2)
    printed = capsys.readouterr().out
    assert "| quadratic | 0.8 | 1.6 |  | 2 |" in printed
    after = json.loads(out.read_text())["cases"]
    assert set(after["quadratic"]["fits"]["0.8"]) == {"0", "1"}
    monkeypatch.setattr(bench.run, "CASES", {name: (None, {}) for name in before})  # rows can no longer be made
    start(bench.run, monkeypatch, *small, "--seeds", 2)
    with pytest.raises(SystemExit, match="choose another --out"):
        start(bench.run, monkeypatch, *small, "--num-boot", 21)


def test_misses_are_named(bench) -> None:
    tally = bench.tally.Tally(None)
    laws = [("null", 4, "L0L1"), ("known", 2, "L0L1"), ("law", 5, "NOT_IDENTIFIED")]
    for kind, wrong, verdict in laws:
        right = "CONSTANT" if verdict == "L0L1" else "L0L1"
        fits = {str(i): {"verdict": verdict if i < wrong else right, "flags": [], "decades": 1.0} for i in range(20)}
        tally.cases[kind] = {"kind": kind, "right": "L0L1", "least": 0.8, "fits": {"0.8": fits}}
    lines = [*tally.false_laws(), *tally.true_laws()]
    assert lines[0] == "Nulls: 4 of 20 fits are L0L1, 20.0% (MISSED)"
    assert [line.split(":")[0] for line in lines[1:]] == ["MISSED"] * 3


@pytest.mark.slow
def test_power_is_measured_cell_by_cell(bench, monkeypatch, tmp_path, capsys) -> None:
    out = tmp_path / "power.json"
    small = ("--decades", 0.5, 2, "--noise", 0.2, "--rows", 200, "--seeds", 2, "--num-boot", 100, "--out", out)
    start(bench.power, monkeypatch, *small, "--laws", "line")
    assert "| 2 | 0.2 | 1.00 |" in capsys.readouterr().out
    cells = json.loads(out.read_text())["cells"]
    assert [cell["verdicts"] for cell in cells] == [{"NOT_IDENTIFIED": 2}, {"L0L1": 2}]


@pytest.mark.slow
def test_the_formula_of_the_power_follows_the_slope_of_the_law(bench) -> None:
    root, other = (bench.power.Cell(law, 1.5, 0.35, 400) for law in ("exponent .5", "exponent 1.5"))
    deviation = 1.5 * np.log(10) / (2 * 1.959964)
    for one, slope in ((root, 0.5), (other, 1.5)):
        skill = 1 - (1 + (slope * deviation / 0.35) ** 2) ** -0.75
        assert bench.power.expected(one, 0.95)["skill"] == pytest.approx(skill, rel=0.01)
    line = bench.power.Cell("line", 1.5, 0.35, 400)
    assert bench.power.expected(line, 0.95)["share"] > 0.99
    for refused in (line._replace(decades=0.9), line._replace(rows=79)):
        assert bench.power.expected(refused, 0.95)["share"] == 0
