"""benchmarks/reproduce: thresholds, lengths and speeds of Scion follow closed forms, and the page has the results."""

import importlib
import math
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from places import REPOSITORY
from torch import nn

FOLDER = REPOSITORY / "benchmarks" / "reproduce"
NAMES = ("experiment", "kept", "learning", "scion", "scion_norms", "scion_tables")


@pytest.fixture(scope="module")
def bench():
    before = list(sys.path)
    sys.path[:0] = [str(folder) for folder in (FOLDER, FOLDER.parent / "autoclip", FOLDER.parent)]
    found = SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    sys.path[:] = before
    return found


def tied(bench):
    """A model whose only weight is embedding and head at once."""
    model = nn.Module()
    model.tokens, model.head = nn.Embedding(3, 2), nn.Linear(2, 3, bias=False)
    model.head.weight = model.tokens.weight
    return model


def gradient():
    return torch.tensor([[1.0, -2.0], [0.5, 0.25], [-1.0, 0.25]])


def optimizer_of(bench, model, method, rate, threshold=1.0, momentum=0.9):
    return bench.scion.optimizer_of(bench.scion.Run("gpt", method, "fixed", rate, 0), threshold)(model)


def test_threshold_is_the_dual_norm_of_the_first_average(bench, monkeypatch) -> None:
    model = tied(bench)
    monkeypatch.setattr(bench.scion, "loss_fn", lambda model, batch: (model.head.weight * gradient()).sum())
    # sum of absolute entries over inputs, times the radius, times 1 - momentum
    assert bench.scion.first_norm(model, "gpt", None) == pytest.approx(0.1 * 3000 * 5 / 2, rel=1e-5)
    assert model.head.weight.grad is None


@pytest.mark.parametrize(("threshold", "share"), [(750.0, 1.0), (1500.0, 0.5), (375.0, 1.0)])
def test_lengths_are_shares_of_the_longest_step(bench, threshold: float, share: float) -> None:
    model = tied(bench)
    optimizer = optimizer_of(bench, model, bench.scion.CLIPPED, 0.001, threshold)
    observe = bench.scion.length_observer(model, optimizer)
    before = model.head.weight.detach().clone()
    model.head.weight.grad = gradient()
    optimizer.step()  # the average is a tenth of the gradient, its dual norm 750
    assert observe() == pytest.approx(share, rel=1e-3)
    expected = before - share * 0.001 * 3000 / 2 * gradient().sign()
    torch.testing.assert_close(model.head.weight.detach(), expected)


def test_scion_without_the_clip_makes_steps_of_one_length(bench) -> None:
    model = tied(bench)
    optimizer = optimizer_of(bench, model, bench.scion.PLAIN, 0.001)
    observe = bench.scion.length_observer(model, optimizer)
    for size in (1e-3, 1.0, 1e3):
        model.head.weight.grad = size * gradient()
        optimizer.step()
        assert observe() == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize(("method", "clips"), [("SHORT", True), ("FRANK_WOLFE", False)])
def test_short_step_is_that_of_the_released_code(bench, method: str, clips: bool) -> None:
    model = tied(bench)
    with torch.no_grad():
        model.head.weight.copy_(gradient().sign())
    rate, rho = 0.001, 1000.0
    optimizer = optimizer_of(bench, model, getattr(bench.scion, method), rate, rho)
    x = model.head.weight.detach().clone()
    model.head.weight.grad = gradient()
    optimizer.step()
    ball = -1500 * gradient().sign()  # minimiser over the ball of radius 3000
    inner = float((0.1 * gradient() * (x - ball)).sum())  # <d, x - lmo>
    share = min(1.0, inner / rho) if clips else 1.0
    torch.testing.assert_close(model.head.weight.detach(), x - rate * share * (x - ball), rtol=1e-4, atol=1e-4)
    assert (share < 1) == clips


def test_share_of_steps_is_read_off_the_smoothed_curve(bench) -> None:
    curves = {"step": [10, 20, 30, 40], "valid": [4.0, 3.0, 2.0, 1.0]}  # smoothed: 4, 3.5, 3, 2
    assert bench.scion_tables.share_to(curves, 3.25) == pytest.approx(25 / 40)
    assert bench.scion_tables.percent(bench.scion_tables.share_to(curves, 1.5)) == "not reached"


def rows_of(bench, losses):
    """Grids on the choosing seed with these losses at the five rates, and steps of half the longest."""
    scion = bench.scion
    runs = [
        {"task": t, "method": m, "schedule": s, "rate": rate, "seed": scion.CHOSEN_BY, "why": "", "final": loss}
        for t, m, s in scion.compared()
        for rate, loss in zip(scion.rates(t, m), losses, strict=True)
    ]
    return pd.DataFrame([run | {"curves": {"seen": [0.25, 0.75]}} for run in runs])


def test_every_method_tries_as_many_rates(bench) -> None:
    assert {len(bench.scion.rates(task, method)) for task, method, _ in bench.scion.compared()} == {5}


def test_best_rates_go_to_other_seeds_with_an_equally_long_scion(bench) -> None:
    scion = bench.scion
    assert scion.then("quick", pd.DataFrame()) == {}
    runs = list(scion.then("quick", rows_of(bench, (3.0, 4.0, math.nan, 1.0, 2.0))).values())
    assert all(run.seed in scion.JUDGED_BY[run.task] for run in runs)
    assert {run.rate for run in runs if not run.why} == {0.00036, 0.016, 1e-2}
    equal = [run for run in runs if run.why == "equal length"]
    assert {(run.task, run.method, run.rate) for run in equal} == {
        ("gpt", scion.PLAIN, 0.00018),
        ("cnn", scion.PLAIN, 0.008),
    }
    published = {(run.task, run.method, run.rate) for run in runs if run.why == "published rate"}
    assert published == {
        (task, m, rate) for task, rate in scion.PUBLISHED.items() for m in (scion.CLIPPED, scion.PLAIN)
    }
    assert scion.best(rows_of(bench, (1.0,) * 5).iloc[1:], "gpt", scion.CLIPPED, "fixed") is None


@pytest.mark.parametrize(("method", "factor"), [("CLIPPED", 1), ("HIGHER", 4), ("HIGHEST", 16), ("PLAIN", 1)])
def test_thresholds_are_multiples_of_the_first(bench, monkeypatch, method: str, factor: float) -> None:
    scion = bench.scion
    used = []
    monkeypatch.setattr(scion, "threshold_of", lambda *_: 10.0)
    monkeypatch.setattr(scion, "optimizer_of", lambda case, threshold: used.append(threshold))
    monkeypatch.setattr(scion, "train", lambda *_, **__: {"valid": [2.0, 1.0], "right": [0.5]})
    case = scion.Run("gpt", getattr(bench.scion_tables, method), "fixed", 0.001, 0)
    found = scion.run(case, bench.experiment.Place("quick", torch.device("cpu"), REPOSITORY))
    assert used == [found["threshold"]] == [10.0 * factor]
    assert found["final"] == 1.5


def test_clipped_and_plain_scion_are_compared_on_the_same_seeds(bench) -> None:
    tables = bench.scion_tables
    runs = pd.DataFrame(
        {"task": "gpt", "why": "published rate", "method": m, "seed": seed, "final": 2.0 - gain - seed / 10,
         "threshold": 1.0, "curves": {"step": [10, 20], "valid": [3.0, 2.0]}}
        for m, gain in ((tables.CLIPPED, 0.25), (tables.PLAIN, 0.0)) for seed in (2, 1)
    )  # fmt: skip
    lines = tables.at_published(runs, "gpt", {"gpt": (1, 2)}).splitlines()
    assert lines[2:5] == [
        "| ClippedScion | 1.650, 1.550 | 1.600 |",
        "| Scion | 1.900, 1.800 | 1.850 |",
        "| difference | -0.250, -0.250 | -0.250 |",
    ]


def test_steps_at_the_published_rate_stand_beside_those_of_scion_itself(bench) -> None:
    tables = bench.scion_tables
    curves = {
        tables.CLIPPED: {1: [2.0, 1.0, 1.0], 2: [2.0, 1.5, 1.0]},
        tables.PLAIN: {1: [2.0, 2.0, 0.5], 2: [2.0] * 3},
    }
    runs = pd.DataFrame(
        {"task": "gpt", "why": "published rate", "method": m, "seed": seed, "final": 1.5, "threshold": 9.6,
         "curves": {"step": [10, 20, 30], "valid": valid}}
        for m, by_seed in curves.items() for seed, valid in by_seed.items()
    )  # fmt: skip
    lines = [line.split(" | ")[:2] for line in tables.at_published(runs, "gpt", {"gpt": (1, 2)}).splitlines()[5:]]
    assert lines == [
        ["| steps of ClippedScion to Scion's loss", "67%, 100%"],
        ["| steps of Scion itself to it", "100%, not reached"],
        ["| steps of Scion on the other seeds to it", "(not reached), (100%)"],
        ["| threshold of ClippedScion", "10, 10"],
    ]


def test_thresholds_stand_beside_the_published_ones(bench) -> None:
    tables = bench.scion_tables
    runs = pd.DataFrame(
        {"task": "gpt", "method": m, "seed": seed, "threshold": factor * (10.4 - seed)}
        for m, factor in tables.CLIPS.items() for seed in (1, 0, 0)
    )  # fmt: skip
    assert tables.thresholds(runs, {"gpt": 600.0}).splitlines()[2:4] == [
        "| GPT, Tiny Shakespeare | ClippedScion | 600 | 10, 9 | 9 to 10 |",
        "| GPT, Tiny Shakespeare | ClippedScion, threshold x 4 | 600 | 42, 38 | 38 to 42 |",
    ]


def test_parameters_are_sorted_into_layers(bench) -> None:
    names = ("tokens.weight", "places", "blocks.0.qkv.weight", "blocks.0.qkv.bias", "blocks.1.norms.0.weight")
    found = [bench.scion_norms.layer(name) for name in names]
    assert found == ["embedding and head", "positions", "blocks.0.qkv", "biases and gains", "biases and gains"]


def test_shuffling_leaves_no_relation_and_the_same_values(bench) -> None:
    norms = bench.scion_norms
    x = np.linspace(1, 10, 60)
    rows = pd.DataFrame({"grad_norm": x, "smoothness": 1 + 2 * x, "group": ["a"] * 30 + ["b"] * 30, "step": range(60)})
    shuffled = norms.shuffled(rows, 0)
    for group in "ab":
        own, new = (frame.loc[frame["group"] == group, "smoothness"] for frame in (rows, shuffled))
        assert sorted(own) == sorted(new)
        assert not np.array_equal(own, new)
    one = rows.assign(group="a")
    # A rank correlation of 60 pairs without a relation exceeds 1.96 / sqrt(59) once in twenty times.
    assert norms.rank_of_chance([one]) == pytest.approx(1.96 / math.sqrt(59), rel=0.25)


def test_fits_say_what_the_rows_are(bench) -> None:
    x = 10 ** np.sin(np.arange(100.0))
    rows = pd.DataFrame({"grad_norm": x, "smoothness": 1 + 2 * x, "step": range(100), "estimator": "local"})
    found = bench.scion_norms.told([rows.assign(group="all", status="ok", saturation=0.1)], "local", "all")
    assert (found["verdict"], found["shuffled_verdict"] == "L0L1") == ("L0L1", False)
    assert (found["L0"], found["L1"]) == (pytest.approx(1, rel=1e-3), pytest.approx(2, rel=1e-3))
    assert found["rank"] == pytest.approx(1)


def test_dry_scan_measures_only_the_last_weights(bench, tmp_path) -> None:
    torch.manual_seed(0)
    model, batch = bench.scion.course("gpt", "quick").model(), tuple(torch.randint(65, (2, 2, 32)))
    optimizer = optimizer_of(bench, model, bench.scion.CLIPPED, 0.001)
    found = SimpleNamespace(data=lambda: SimpleNamespace(validation=batch))
    place = bench.experiment.Place("full", torch.device("cpu"), tmp_path, dry=True)
    assert bench.scion_norms.scan(model, optimizer, found, place) == {"points": 1}


def test_page_has_the_tables_of_the_results(bench) -> None:
    experiment = bench.scion.EXPERIMENT
    rows = bench.kept.Kept(FOLDER / "results" / "scion-quick.jsonl").frame()
    page = (REPOSITORY / experiment.page).read_text(encoding="utf-8")
    found = experiment.tables(rows)
    assert page.count("<!-- begin: ") == len(found)
    assert bench.experiment.put(page, "scion.py", found) == page
