"""benchmarks/reproduce: the four ways of Zhang et al. 2019 give closed forms, change no run, and fill their page."""

import importlib
import itertools
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from places import REPOSITORY
from torch import nn
from torch.nn import functional as F

import smoothdiag as sd

pytestmark = pytest.mark.thorough

FOLDER = REPOSITORY / "benchmarks" / "reproduce"
PAGE = REPOSITORY / "docs" / "reproduce" / "zhang2019.md"


@pytest.fixture(scope="module")
def bench():
    before = list(sys.path)
    sys.path.insert(0, str(FOLDER))
    names = ("zhang_ways", "zhang_judged", "zhang2019_lstm", "zhang2019_resnet", "experiment", "kept")
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    sys.path[:] = before


class Bowl(nn.Module):
    """c w^2 / 2 for a batch c, with a buffer that counts evaluations."""

    def __init__(self, w: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([w], dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(()))

    def loss(self, c: float) -> torch.Tensor:
        self.seen += 1
        return c * self.w.square().sum() / 2


# The released way


def test_sum_of_gradients_with_the_noise_of_a_piece(bench) -> None:
    model = Bowl(2.0)
    found = bench.zhang_ways.add_up([model.w], (model.loss(c) for c in (1.0, 2.0, 6.0)))
    assert found.total[0].item() == pytest.approx(18)
    assert (found.pieces, found.mean_norm) == (3, pytest.approx(6))
    assert found.noise == pytest.approx(np.std([2.0, 4.0, 12.0], ddof=1))
    assert found.loss == pytest.approx(2 * 3.0)


def test_released_rows_are_those_of_a_quadratic_cut_in_two_ways(bench) -> None:
    model, start = Bowl(1.0), [torch.tensor([3.0], dtype=torch.float64)]
    one, other = [1.0, 2.0, 6.0], [1.0, 4.0]

    def losses(cut):
        return (model.loss(c) for c in cut)

    released, alike, still = bench.zhang_ways.on_tenth(model, start, losses, (one, other))
    # From w = 3 to the midpoint w = 2: the sums are 9 w and 5 w.
    assert released["smoothness"] == pytest.approx(abs(5 * 2 - 9 * 3) / 1)
    assert released["grad_norm"] == pytest.approx(9 * 3 / 3)
    assert released["saturation"] == pytest.approx(17 / (10 + 27))
    assert alike["smoothness"] == pytest.approx(9 / 3)
    assert alike["grad_norm"] == released["grad_norm"]
    assert still["smoothness"] == pytest.approx((9 - 5) * 3 / 1)
    assert released["noise_line"] == pytest.approx(math.sqrt(2) * np.std([3.0, 6.0, 18.0], ddof=1) / 2)
    assert (released["pieces"], released["pieces_there"]) == (3, 2)
    assert (model.w.item(), model.seen.item()) == (1.0, 0.0)
    assert len(bench.zhang_ways.on_tenth(model, start, losses, (one, one))) == 2
    assert bench.zhang_ways.on_tenth(model, [model.w.detach().clone()], losses, (one, other)) == []


def test_pieces_have_the_lengths_of_the_released_code_and_reach_beyond_the_tenth(bench) -> None:
    pieces = bench.zhang2019_lstm.pieces
    lengths = np.array([n for _, n in pieces(2e6, 2_000_100, 70, np.random.default_rng(0))])
    short = lengths < 50
    assert short.mean() == pytest.approx(0.05, abs=0.005)
    assert lengths[~short].mean() == pytest.approx(69.5, abs=0.1)  # whole numbers below a normal one with mean 70
    assert lengths[~short].std() == pytest.approx(5, abs=0.15)
    assert lengths[short].mean() == pytest.approx(34.5, abs=0.5)
    tenths = [pieces(363.1, 3631, 70, np.random.default_rng(seed)) for seed in range(60)]
    assert {5, 6} <= {len(found) for found in tenths} <= {5, 6, 7, 8}
    for found in (*tenths, pieces(908, 908, 18, np.random.default_rng(0))):
        assert found[0][0] == 0
        assert all(a + n == b for (a, n), (b, _) in itertools.pairwise(found))
    assert all(found[-1][0] < 363.1 <= found[-1][0] + found[-1][1] for found in tenths)
    assert found[-1][0] + found[-1][1] <= 907  # the last word has no next one


# The language model


def test_folding_keeps_frequent_words_and_no_code_becomes_much_more_frequent(bench) -> None:
    lstm = bench.zhang2019_lstm
    words = torch.from_numpy(np.random.default_rng(0).zipf(1.1, 50_000) % 10_000)
    folded = lstm.folded(words, 1000)
    frequent = words < 500
    assert torch.equal(folded[frequent], words[frequent])
    assert set(folded[~frequent].tolist()) <= set(range(500, 1000))
    counts = torch.bincount(folded)
    assert counts[500:].max() < counts[:500].max() / 10
    assert torch.equal(lstm.folded(words, 10_000), words)
    assert lstm.entropy(torch.tensor([0, 0, 1, 3])) == pytest.approx(1.5 * math.log(2))


def test_loss_is_cross_entropy_with_penalties_and_the_state_goes_on(bench) -> None:
    torch.manual_seed(0)
    lstm = bench.zhang2019_lstm
    model = lstm.WordLSTM(11, 4, 6).double()
    text = torch.randint(11, (13, 3))
    batch = lstm.batch_of(text, (0, 12), model.fresh(3))
    outputs, _ = model(batch[0], batch[2:])
    logits = torch.stack([outputs[t] @ model.embed.weight.T + model.bias for t in range(12)])
    expected = F.cross_entropy(logits.view(-1, 11), text[1:].reshape(-1))
    expected = expected + 2 * (outputs**2).mean() + ((outputs[1:] - outputs[:-1]) ** 2).mean()
    torch.testing.assert_close(lstm.loss_fn(model, batch), expected)
    state, parts = model.fresh(3), []
    for piece in ((0, 5), (5, 7)):
        words, *_ = lstm.batch_of(text, piece, state)
        found, state = model(words, state)
        parts.append(found)
    torch.testing.assert_close(torch.cat(parts), outputs)


def test_measuring_in_all_ways_changes_no_bit_of_a_run(bench, monkeypatch, tmp_path) -> None:
    lstm, random = bench.zhang2019_lstm, np.random.default_rng(0)
    text, valid = (torch.from_numpy(random.integers(0, 20, n)) for n in (400, 200))
    monkeypatch.setattr(lstm.sources, "penn_treebank", lambda vocabulary: (text, valid))
    monkeypatch.setattr(lstm, "VOCABULARY", 20)
    scale = lstm.Scale(vocabulary=20, width=4, hidden=6, columns=4, length=8, rows=50, seeds=1)
    place = bench.experiment.Place("quick", torch.device("cpu"), tmp_path)
    seen = []

    class Nothing:
        def __init__(self, model, *args, **options) -> None:
            self.model = model
            seen.append(model)

        def observe(self, batch) -> None: ...
        def before(self, loss) -> None: ...
        def after(self) -> None: ...
        def close(self) -> None: ...

    measured = bench.zhang_ways.Ways
    for ways in (Nothing, lambda model, *args, **options: seen.append(model) or measured(model, *args, **options)):
        monkeypatch.setattr(lstm, "Ways", ways)
        lstm.train(lstm.CASES[0], scale, 3, place, tmp_path / "run.jsonl")
    for one, other in zip(seen[0].parameters(), seen[1].parameters(), strict=True):
        assert torch.equal(one, other)
    frame = sd.Trace.read(tmp_path / "run.jsonl").to_frame()
    counts = frame.groupby(["estimator", "data"]).size()
    steps = frame["step"].max() + 1
    assert steps > 8
    assert {counts[way] for way in bench.zhang_ways.WAYS.values()} == {steps}
    assert counts["successive", "two batches"] == steps - 1
    assert counts["hessian_norm", "held-out"] == math.ceil(steps / lstm.HESSIAN_EVERY)
    path = frame[frame["estimator"] == "path"].set_index("step")
    tenth = frame[frame["estimator"] == "released"].set_index("step")
    sixths = 6 * path["step_norm"] / (2 * tenth["step_norm"])  # one of five points of the same step
    np.testing.assert_allclose(sixths, sixths.round().clip(1, 5), rtol=1e-3)


# What rows show


def table(x, y, run="0"):
    return pd.DataFrame({"step": range(len(x)), "grad_norm": x, "smoothness": y, "saturation": 0.1, "run": run})


def test_slope_and_correlations_are_those_of_the_planted_power(bench) -> None:
    judged, random = bench.zhang_judged, np.random.default_rng(0)
    x = np.exp(random.normal(size=400))
    y = x**1.5 * np.exp(0.2 * random.normal(size=400))
    rows = judged.select_rows(judged.as_frame(table(x, y)), None, "all")
    found = judged.described(rows, 1.0)
    assert found["slope"] == pytest.approx(1.5, abs=0.03)
    low, high = found["slope_interval"]
    assert low < found["slope"] < high
    assert high - low == pytest.approx(2 * 1.645 * 0.2 / np.sqrt(400), rel=0.25)  # of independent rows
    assert found["partial"] > 0.9
    assert 0 < found["shuffled"] < 0.15
    assert (found["saturated"], found["rows"]) == (0.0, 400)
    drifting = replace(rows, x=np.exp(0.01 * rows.step), y=np.exp(0.02 * rows.step + 0.1 * random.normal(size=400)))
    assert judged.related(drifting)["rank"] > 0.9
    assert not abs(judged.related(drifting)["partial"]) > 0.2


@pytest.mark.parametrize(("power", "says"), [(1.0, "agree"), (0.0, "contradict")])
def test_hessian_norms_beside_local_rows_agree_with_the_line_or_contradict_it(bench, tmp_path, power, says) -> None:
    judged, ways = bench.zhang_judged, bench.zhang_ways
    random, path = np.random.default_rng(0), tmp_path / "run.jsonl"
    x = np.exp(random.normal(size=300))
    with sd.Trace(path) as trace:
        for estimator, data in ways.WAYS.values():
            for step, norm in enumerate(x):
                row = {"estimator": estimator, "data": data, "step": step, "grad_norm": norm, "loss": 1.0}
                row |= {"pieces": 1, "pieces_there": 1} if estimator == ways.RELEASED else {}
                trace.append(row | {"smoothness": norm * np.exp(0.1 * random.normal()), "saturation": 0.1})
        alike = {"estimator": ways.ALIKE, "data": "tenth", "saturation": 0.1}
        for step, norm in enumerate(x):
            trace.append(alike | {"step": step, "grad_norm": norm, "smoothness": norm})
            if step % 3 == 0:
                row = {"estimator": ways.HESSIAN, "data": "held-out", "step": step, "grad_norm": norm}
                trace.append(row | {"smoothness": norm**power * np.exp(0.1 * random.normal())})
    found = judged.judged([path])
    tables = judged.tables(pd.DataFrame([{"key": "run", "seconds": 60.0, **found}]))
    assert "Hessian norm, held-out batch" in tables["seeds"].splitlines()[-1]
    cells = [cell.strip() for cell in tables["hessian"].splitlines()[-1].split("|")]
    assert cells[2] == "100"
    assert float(cells[5].split()[0]) == pytest.approx(power, abs=0.05)
    assert cells[9] == says


def test_columns_of_a_table_follow_the_order_of_the_rows(bench) -> None:
    judged = bench.zhang_judged
    x = np.linspace(1, 2, 30)
    frames = [table(x, x).assign(noise_line=10.0 + np.arange(30)), table(x, x).assign(noise_line=100.0 + np.arange(30))]
    data = judged.as_frame([frame.sample(frac=1, random_state=0) for frame in frames])
    rows = judged.select_rows(data, None, "all")
    expected = np.where(rows.run == 0, 10.0, 100.0) + rows.step
    np.testing.assert_array_equal(judged.matched(data, rows, "noise_line"), expected)


def test_fixed_images_are_the_same_for_every_seed_and_no_two_alike(bench, monkeypatch) -> None:
    resnet = bench.zhang2019_resnet
    images = (torch.arange(50.0).view(50, 1), torch.arange(50))
    monkeypatch.setattr(resnet.sources, "cifar10", lambda pixels: (images, images))
    first = resnet.fixed_images(16, 2, 8)
    torch.manual_seed(1)
    again = resnet.fixed_images(16, 2, 8)
    assert all(torch.equal(one[1], other[1]) for one, other in zip(first, again, strict=True))
    labels = torch.cat([y for _, y in first])
    assert len(labels.unique()) == 16


# The page


@pytest.mark.parametrize(("script", "rows"), [("zhang2019_lstm", 4), ("zhang2019_resnet", 3)])
def test_page_has_the_tables_of_the_results(bench, script: str, rows: int) -> None:
    page = PAGE.read_text(encoding="utf-8")
    results = bench.kept.Kept(FOLDER / "results" / f"{script}-quick.jsonl").frame()
    assert len(results) == rows
    tables = bench.zhang_judged.tables(results)
    assert page.count(f"by benchmarks/reproduce/{script}.py -->") >= 4
    assert bench.experiment.put(page, f"{script}.py", tables) == page
