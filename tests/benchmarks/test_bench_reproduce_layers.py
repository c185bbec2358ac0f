"""benchmarks/reproduce/layers.py: fits and secants against closed forms and the probe; the page is the results."""

import importlib
import math
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from places import REPOSITORY
from scipy.optimize import minimize

import smoothdiag as sd

pytestmark = pytest.mark.thorough

FOLDER = REPOSITORY / "benchmarks" / "reproduce"


@pytest.fixture(scope="module")
def bench():
    sys.path[:0] = [str(FOLDER), str(FOLDER.parent / "autoclip")]
    names = ("experiment", "kept", "layer_figures", "layer_runs", "layer_tables", "layers")
    found = SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    del sys.path[:2]
    return found


@pytest.fixture(scope="module")
def rows(bench):
    return bench.kept.Kept(FOLDER / "results" / "layers-quick.jsonl").frame()


def short_run(bench, name="exponential", deviation=0.0, **changes):
    """A run on a landscape, measured at every step."""
    problem = bench.layers.LANDSCAPES[name]
    options = {
        "name": name,
        "model": lambda: bench.layer_runs.Noisy(problem, 3.0),
        "data": bench.layer_runs.noise(deviation, problem.dim),
        "loss_fn": bench.layer_runs.own_loss,
        "optimizer": bench.layer_runs.normalised(0.05),
        "batch": 16,
        "factor": 1.0,
        "seed": 0,
        "steps": 20,
        "every": 1,
    }
    return bench.layer_runs.Run(**{**options, **changes})


def measured(bench, run) -> pd.DataFrame:
    return pd.DataFrame(bench.layer_runs.measured(run, torch.device("cpu"))[0])


@pytest.mark.parametrize("penalty", [0.0, 1.0, 10.0])
def test_hinge_fit_is_the_minimum_of_its_loss(bench, penalty) -> None:
    random = np.random.default_rng(0)
    x = random.uniform(1, 5, 40)
    y = 0.3 + 2 * x + random.normal(size=40)

    def loss(constants):
        rest = y - constants[0] - constants[1] * x
        return np.sum(rest**2) + penalty * np.sum(np.maximum(rest, 0) ** 2)

    best = minimize(loss, [1.0, 1.0], bounds=[(0, None), (0, None)], method="L-BFGS-B", options={"ftol": 1e-14})
    assert bench.layers.hinge_fit(x, y, penalty) == pytest.approx(best.x, abs=1e-4)
    assert bench.layers.hinge_fit(x, 5 - x / 2, penalty)[1] == 0


def test_other_batches_on_a_flat_landscape_measure_noise_over_the_step(bench) -> None:
    run = short_run(bench, "quadratic", 50.0, steps=60)
    own = measured(bench, run).query("norm == 'own'")
    expected = math.sqrt(2) * 50.0 * math.sqrt(20) / math.sqrt(16) / 0.05
    assert own["other"].mean() == pytest.approx(expected, rel=0.05)
    assert own["null"].mean() == pytest.approx(expected, rel=0.05)
    assert own["same"].max() < 1.01  # the largest eigenvalue
    assert own["length"].to_numpy() == pytest.approx(0.05)


def test_short_displacement_measures_the_law_of_every_layer(bench) -> None:
    """The steps are radial, where the Hessian of the exponential is largest: ||H|| = .7 + 2 ||g||."""
    found = measured(bench, short_run(bench))
    law = 0.7 + 2 * found["short norm"]
    assert (found["short"] / law).to_numpy() == pytest.approx(np.ones(len(found)), rel=2e-3)
    assert (found["null"] == 0).all()
    np.testing.assert_allclose(found["same"], found["other"], rtol=1e-9)


def test_short_displacement_does_not_depend_on_the_length_of_the_steps(bench) -> None:
    one, four = (measured(bench, short_run(bench, factor=factor, steps=1)) for factor in (1.0, 4.0))
    np.testing.assert_allclose(one["short"], four["short"], rtol=1e-6)
    np.testing.assert_allclose(4 * one["length"], four["length"])


def random_text(batch):
    def batches(seed):
        generator = torch.Generator().manual_seed(seed)
        while True:
            tokens = torch.randint(65, (batch, 17), generator=generator)
            yield tokens[:, :-1], tokens[:, 1:]

    from batching import Data

    return Data(batches, next(batches(99)))


@pytest.fixture
def gpt_run(bench):
    runs, loss_fn = bench.layer_runs, bench.layers.class_loss
    return runs.Run("gpt", runs.gpt, random_text, loss_fn, runs.scion, 4, 1.0, 0, 2, 1)


def test_steps_are_those_of_scion(bench, gpt_run) -> None:
    rows = measured(bench, gpt_run)
    own = rows[rows["norm"] == "own"].set_index("layer")
    step = bench.layer_runs.LONGEST_STEP
    assert own.loc["tokens.weight", "length"].to_numpy() == pytest.approx(3000 * step, rel=1e-5)
    hidden = own.loc["blocks.0.mix.weight", "length"].to_numpy() / (50 * step)
    assert ((hidden > 0.9) & (hidden < 1.22)).all()  # where Newton-Schulz leaves the largest singular value
    assert set(own.index) == {n for n, p in bench.layer_runs.gpt().named_parameters() if p.ndim > 1}


def test_same_examples_are_measured_as_the_probe_measures_them(bench, gpt_run) -> None:
    """The probe's own norm divides the norm of a layer by its radius, and multiplies the dual norm by it."""
    rows = measured(bench, gpt_run)
    torch.manual_seed(0)
    model = bench.layer_runs.gpt()
    optimizer, data = bench.layer_runs.scion(model, 1.0), random_text(4)
    estimators = [sd.PathSmoothness(), sd.PathSmoothness(geometry="optimizer"), sd.DebiasedSmoothness()]
    probe = sd.Probe(
        model,
        optimizer,
        gpt_run.loss_fn,
        estimators=estimators,
        schedule=sd.every(1),
        probe_batches=bench.layer_runs.halves(data.validation),
        group_by=lambda name: name,
    )
    batches = data.batches(0)
    for _ in range(2):
        batch = next(batches)
        optimizer.zero_grad()
        gpt_run.loss_fn(model, batch).backward()
        optimizer.step()
    trace = probe.trace.to_frame()
    for estimator, norm in (("path", "Euclidean"), ("path_own", "own")):
        probed = trace[trace["estimator"] == estimator].set_index(["group", "step"])
        for row in rows[rows["norm"] == norm].to_dict("records"):
            there = probed.loc[(row["layer"], row["step"] - 1)]
            tied = row["layer"] in ("tokens.weight", "places.weight")
            radius = 1.0 if norm == "Euclidean" else bench.layer_runs.RADII["tied" if tied else "hidden"]
            assert row["length"] == pytest.approx(radius * there["step_norm"], rel=1e-3)
            assert row["same"] == pytest.approx(there["smoothness"] / radius**2, rel=1e-2)


def test_part_of_a_layer_has_words_for_every_matrix(bench) -> None:
    parts = [bench.layer_tables.part_of(name) for name, p in bench.layer_runs.gpt().named_parameters() if p.ndim > 1]
    assert set(parts) == set(bench.layer_tables.WORDS)


def test_tables_come_from_a_part_of_the_runs(bench, rows) -> None:
    found = bench.layers.tables(rows[rows["key"] == "gpt/1/128/1"])
    assert "NOT_IDENTIFIED 8" in found["constants"]
    assert all(found.values())


def test_constant_that_is_the_step_is_told_from_one_that_is_the_landscape(bench) -> None:
    """Hidden matrices have L1 = √2 / t at steps a factor of four apart; the embedding has twice its landscape's L1."""
    step = pd.DataFrame({"factor": [1.0, 4.0], "batch": 16, "part": "up", "other L1": [8.0, 2.0], "short fit": 1.0})
    step = step.assign(**{"other share": 1.0})
    landscape = step.assign(part="tokens", **{"other L1": [8.0, 7.0], "short fit": [4.0, 3.5], "other share": [1, 3.5]})
    lines = bench.layer_tables.follows(pd.concat([step, landscape])).splitlines()[2:]
    assert lines[0].split(" | ")[1:] == ["4", "4", "1", "1.00", "2.00 to 8.00", "2.00 to 8.00 |"]
    assert lines[1].split(" | ")[1:] == ["4", "1.1", "1.1", "1.00 to 3.50", "2.00", "2.00 |"]


def test_page_has_the_size_of_the_model(bench) -> None:
    page = (REPOSITORY / bench.layers.EXPERIMENT.page).read_text(encoding="utf-8")
    weights = sum(p.numel() for p in bench.layer_runs.gpt().parameters())
    assert page.count(f"{weights:,} weights") == 2
    assert 124e6 > 1000 * weights  # "more than a thousand times larger"


def test_results_are_whole(bench, rows) -> None:
    assert set(rows["key"]) == set(bench.layers.cases("quick"))
    assert len(bench.layer_tables.layers_of(rows)) == 15 * 20 + 6 * 8


def test_figure_draws_every_layer(bench, rows) -> None:
    figure = bench.layer_figures.draw(rows, FOLDER)
    labels = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert labels == list(bench.layer_tables.WORDS.values())


def test_figure_shows_every_median_and_marks_bars_that_it_cuts(bench, rows) -> None:
    left, right = bench.layer_figures.draw(rows, FOLDER).axes
    lowest = min(np.min(line.get_ydata()) for line in left.lines)
    assert lowest > left.get_ylim()[0]
    edge = right.get_xlim()[1]
    bars = [path.vertices for bar in right.collections for path in bar.get_paths()]
    cut = sorted(bar[0, 1] for bar in bars if bar[:, 0].max() > edge)
    arrows = sorted(line.get_ydata()[0] for line in right.lines if line.get_marker() == ">")
    assert arrows == cut != []


def test_page_has_the_tables_of_the_results(bench, rows) -> None:
    page = (REPOSITORY / bench.layers.EXPERIMENT.page).read_text(encoding="utf-8")
    found = bench.layers.tables(rows)
    assert page.count("by benchmarks/reproduce/layers.py -->") == len(found)
    assert bench.experiment.put(page, "layers.py", found) == page
