"""benchmarks/reproduce/which_law.py: landscapes have their law, networks are scanned, the page is the results."""

import importlib
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from places import REPOSITORY
from scipy.stats import norm

pytestmark = pytest.mark.thorough

FOLDER = REPOSITORY / "benchmarks" / "reproduce"


@pytest.fixture(scope="module")
def bench():
    sys.path[:0] = [str(FOLDER), str(FOLDER.parent / "autoclip")]
    names = ("checkpoints", "experiment", "kept", "law_chances", "law_figures", "law_tables", "which_law")
    found = SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    del sys.path[:2]
    return found


@pytest.fixture(scope="module")
def rows(bench):
    return bench.kept.Kept(FOLDER / "results" / "which_law-quick.jsonl").frame()


@pytest.fixture
def place(bench, tmp_path):
    return lambda dry: bench.experiment.Place("quick", torch.device("cpu"), tmp_path, dry)


IMAGES = (torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 10)
TOKENS = (torch.arange(32).view(2, 16), torch.arange(1, 33).view(2, 16))
MADE_UP = {
    "LSTM": TOKENS,
    "GPT": TOKENS,
    "ViT": IMAGES,
    "ResNet": IMAGES,
    "MLP, ReLU": IMAGES,
    "MLP, GELU": IMAGES,
    "logistic": (torch.eye(8, 123), torch.arange(8.0) % 2),
}


@pytest.fixture
def made_up(bench, monkeypatch):
    """Networks learn a few examples that need no data set; validation has twice as many as a training batch."""

    def data_of(subject):
        batch = MADE_UP[subject]
        return bench.checkpoints.Data(lambda seed: iter([batch] * 9), tuple(torch.cat([x, x]) for x in batch))

    monkeypatch.setattr(bench.checkpoints, "data_of", data_of)


def test_every_case_has_a_key_of_its_own_and_every_subject_its_stages(bench) -> None:
    cases = bench.which_law.cases("quick")
    assert len(cases) == len(bench.checkpoints.SUBJECTS) * 3 * 3 + len(bench.checkpoints.NETS) * 2
    paths = {bench.which_law.path_of(FOLDER, case, "lines") for case in cases.values()}
    assert len(paths) == len(cases)


@pytest.mark.parametrize(
    "subject",
    [pytest.param(name, marks=pytest.mark.slow if name in ("GPT", "ResNet", "MLP, ReLU") else ()) for name in MADE_UP],
)
def test_network_trains_and_its_scan_writes_three_traces(bench, place, made_up, tmp_path, subject) -> None:
    checkpoint = bench.checkpoints.Checkpoint(subject, 50, 0)
    found = bench.which_law.run(checkpoint, place(True))
    assert found["gradients"] > 0
    assert np.isfinite(found["loss"])
    assert sorted(path.name.split("-")[0] for path in tmp_path.iterdir()) == ["descent", "lines", "secants"]


def test_a_scan_sees_as_many_held_out_examples_as_a_training_batch_has(bench, made_up) -> None:
    batch = bench.checkpoints.held_out(bench.checkpoints.Checkpoint("ViT", 0, 0), torch.device("cpu"))
    assert [len(part) for part in batch] == [8, 8]
    again = bench.checkpoints.held_out(bench.checkpoints.Checkpoint("ViT", 400, 0), torch.device("cpu"))
    torch.testing.assert_close(batch, again, rtol=0, atol=0)
    other = bench.checkpoints.held_out(bench.checkpoints.Checkpoint("ViT", 0, 1), torch.device("cpu"))
    assert not torch.equal(batch[0], other[0])
    more = bench.checkpoints.held_out(bench.checkpoints.Checkpoint("ViT", 0, 0, times=2), torch.device("cpu"))
    torch.testing.assert_close(more[0][:8], batch[0], rtol=0, atol=0)
    assert len(more[0]) == 16


def test_training_moves_weights_by_heavy_ball_from_the_seed(bench, made_up) -> None:
    checkpoint, device = bench.checkpoints.Checkpoint("logistic", 2, 0), torch.device("cpu")
    start, end = (bench.checkpoints.trained(checkpoint, steps, device) for steps in (0, 2))
    w, velocity = start.weight.detach().clone(), 0
    (x, y), rate = MADE_UP["logistic"], bench.checkpoints.SUBJECTS["logistic"].rate
    bias = start.bias.detach().clone()
    velocity_b = 0
    for _ in range(2):
        wrong = torch.sigmoid(x @ w.T + bias).squeeze(1) - y
        velocity = 0.9 * velocity + wrong[None] @ x / len(y)
        velocity_b = 0.9 * velocity_b + wrong.mean()
        w, bias = w - rate * velocity, bias - rate * velocity_b
    torch.testing.assert_close(end.weight.detach(), w)
    torch.testing.assert_close(end.bias.detach(), bias)


@pytest.mark.parametrize(("subject", "L0", "L1"), [("quadratic", 1.0, 0.0), ("exponential", 0.7, 2.0)])
def test_landscape_has_its_law(bench, place, subject, L0, L1) -> None:
    found = bench.which_law.run(bench.checkpoints.Checkpoint(subject, 0, 0), place(False))
    assert found["verdict"] == bench.checkpoints.KNOWN[subject].law
    assert found["L0"] == pytest.approx(L0, rel=0.02)
    assert found["L1"] == pytest.approx(L1, rel=0.02, abs=1e-3)
    if subject == "quadratic":
        assert np.isnan(found["down_rank"])
        assert found["secant"] < 0.9  # along the gradient: below the Hessian norm
    else:
        assert found["down_rank"] == pytest.approx(1)


def test_rank_down_the_gradient(bench) -> None:
    frame = pd.DataFrame({"grad_norm": [8.0, 4, 2, 1], "smoothness": [1.0, 2, 3, 9], "loss": [4.0, 3, 2, 1]})
    frame = frame.assign(estimator="hessian_norm", status="ok")
    found = bench.which_law.arriving(frame)
    assert (found["down_rank"], found["down_hessian"], found["down_loss"]) == (-1, 9, 0.25)
    assert found["down_decades"] == pytest.approx(np.log10(8))
    assert np.isnan(bench.which_law.arriving(frame.assign(smoothness=[1, 1.05, 1.01, 1]))["down_rank"])


def test_secants_are_compared_at_the_same_points(bench) -> None:
    at = {"scan": ["start", "a", "a"], "point": [0, 1, 2], "status": "ok"}
    lines = pd.DataFrame({**at, "distance": [0.0, 1, 2], "smoothness": [2.0, 4, 8]})
    secants = pd.DataFrame({**at, "distance": [0.0, 1, 2.5], "smoothness": [1.0, 1, 1]})
    found = bench.which_law.beside(lines, secants.assign(status=["ok", "kink_limited", "ok"], estimator="local"))
    assert (found["same_points"], found["secant"]) == (2, 0.375)
    assert found["kinks"] == pytest.approx(1 / 3)


def test_span_and_ends(bench) -> None:
    tables = bench.law_tables
    assert tables.span([0.5, float("nan"), 2.0]) == ".50 to 2.00"
    assert tables.span([-0.25]) == "-.25"
    assert tables.span([]) == "-"
    assert tables.ends(pd.Series([1.0, 0.5]), pd.Series([2.0, 3.0]), 1) == ".5 to 3.0"
    assert tables.short(512.4, 0) == "512"


def test_smoothness_rises_where_the_fit_says_so(bench) -> None:
    """The line must rise 1.25-fold: on a quadratic the interval of L1 may miss zero by a rounding."""
    rng = np.random.default_rng(0)
    x = np.exp(np.tile([0.0, 1.0, 2.0, 2.5], 12))
    lines = {"scan": np.repeat([f"gradient in w{k}" for k in range(12)], 4), "point": np.tile(range(4), 12)}
    lines |= {"grad_norm": x, "distance": np.tile(range(4), 12), "estimator": "hessian_norm", "status": "ok"}
    lines |= {"loss": 1 + x, "num_grads": 4, "relative_distance": 0.1}
    start = {"scan": "start", "point": 0, "grad_norm": 1.0, "distance": 0.0, "estimator": "hessian_norm"}
    start |= {"status": "ok", "loss": 2.0, "num_grads": 4, "relative_distance": 0.0}

    def leaving(smoothness):
        first, others = [start | {"smoothness": 1.0}], lines | {"smoothness": smoothness}
        both = pd.concat([pd.DataFrame(first), pd.DataFrame(others)])
        return bench.which_law.leaving(both.assign(step=0))

    flat = leaving(1 + 1e-4 * x + 1e-6 * rng.normal(size=len(x)))
    rising = leaving(x * np.exp(0.3 * rng.normal(size=len(x))))
    assert flat["L1_low"] > 0
    assert bench.law_tables.rises(pd.DataFrame([flat, rising])).tolist() == [False, True]


def test_what_is_said_without_a_verdict(bench) -> None:
    """An interval that reaches 1 says nothing, and one that begins at 1.15 is not above the library's own margin."""
    rows = pd.DataFrame({"subject": "GPT", "verdict": "NOT_IDENTIFIED", "reason": "", "factor": [1.0, 2.0, 3.0, 4.0]})
    rows = rows.assign(L1_low=[0.0, 0.1, 0.0, 0.2], L0=[0.0, 1, 1, 1])
    rows = rows.assign(exponent_low=[0.2, 1.0, 1.15, 1.2], exponent_high=[0.9, 3.0, 3.0, 3.0])
    rows.loc[3, "reason"] = "range (few). What can be said: smoothness rises along these lines, by a factor of 9."
    flat = rows.assign(subject="quadratic").iloc[:2]
    lines = [line.split(" | ") for line in bench.law_tables.said(rows, flat).splitlines()[2:]]
    assert lines[0][1:] == ["4", "2.50", "1.30 to 3.70", "2", "1", "1", "1", "2", "1 |"]
    assert lines[-1] == ["| constant by law", "2", "1.50", "1.10 to 1.90", "1", "0", "1", "1", "0", "0 |"]


@pytest.mark.parametrize(
    ("law", "rises", "below", "above"), [("constant", 0, 3, 0), ("exponent .5", 3, 3, 0), ("exponent 1", 3, 0, 0)]
)
def test_simulated_scans_that_hardly_scatter_say_what_is_true(bench, monkeypatch, place, law, rises, below, above):
    """A scatter of a thousandth: nothing rises at a constant law, and the exponent's interval holds the truth."""
    chances = bench.law_chances
    monkeypatch.setitem(chances.SCANS, "quick", 3)
    found = chances.run(chances.Cell(chances.TRUE[law], 1e-3, 0), place(False))
    assert (found["scans"], found["rises"], found["below"], found["above"]) == (3, rises, below, above)
    assert found["factor"] == pytest.approx(1, abs=0.05)  # around the line, which bends off the exponent .5


def test_no_two_scatters_are_simulated_from_the_same_seeds(bench) -> None:
    chances = bench.law_chances
    cells = chances.cases("quick").values()
    assert len(cells) == 9
    for law in chances.TRUE:
        firsts = sorted(cell.first for cell in cells if cell.law.name == law)
        assert np.diff(firsts).tolist() == [chances.SCANS["quick"]] * 2


def test_chances_are_scaled_to_the_scans_of_networks(bench, rows) -> None:
    row = {"law": "constant", "scans": 100, "points": 37.0, "decades": 1.0, "factor": 1.5}
    row |= {"slope": 9, "rises": 8, "below": 20, "above": 1, "clearly": 0}
    both = pd.DataFrame([row | {"between": 0.5}, row | {"between": 1.0, "rises": 12}])
    lines = [line.split(" | ") for line in bench.law_chances.tables(both.assign(seconds=30.0))["chances"].splitlines()]
    assert lines[4][5:] == ["18", "20", "40", "2", "0 |"]
    assert [cell.split(" ")[0] for cell in lines[5][5:]] == ["4.9", "5.4", "10.8", ".5", ".0"]
    z, n, p = norm.ppf(0.95), 200, 0.1  # Wilson's interval solves (p - share)^2 = z^2 share (1 - share) / n
    low, high = sorted(np.roots([1 + z**2 / n, -2 * p - z**2 / n, p**2]))
    assert lines[5][6] == f"5.4 ({54 * low:.1f} to {54 * high:.1f})"
    usual = bench.law_tables.usual(rows)
    assert bench.law_chances.OF == sum(name in bench.checkpoints.NETS for name in usual["subject"]) - 9


def test_simulated_scans_are_as_long_and_scatter_as_much_as_those_of_networks(bench, rows) -> None:
    usual = bench.law_tables.usual(rows)
    nets = usual[usual["subject"].isin(bench.checkpoints.NETS) & (usual["subject"] != "logistic")]
    found = bench.kept.Kept(FOLDER / "results" / "law_chances-quick.jsonl").frame()
    constant = found[found["law"] == "constant"].sort_values("between")
    assert constant["factor"].tolist() == pytest.approx(
        nets["factor"].quantile([1 / 6, 1 / 2, 5 / 6]).tolist(), rel=0.05
    )
    assert constant["decades"].to_numpy() == pytest.approx(nets["decades"].median(), rel=0.1)
    assert constant["points"].to_numpy() == pytest.approx(nets["points"].median(), rel=0.15)


def test_descents_are_counted_one_way_or_the_other(bench) -> None:
    rows = pd.DataFrame({"stage": [0, 0, 50, 50], "down_rank": [0.9, -0.9, 0.2, np.nan], "down_points": [9, 8, 17, 2]})
    rows["subject"] = ["ViT", "GPT", "GPT", "GPT"]
    lines = [line.split(" | ")[1:] for line in bench.law_tables.ways(rows).splitlines()[2:]]
    expected = [
        "2 | 1 | 1 | 0 |",
        "2 | 0 | 0 | 2 |",
        "4 | 1 | 1 | 2 |",
        "2 | 0 | 1 | 1 |",
        "3 | 1 | 0 | 2 |",
        "1 | 0 | 1 | 0 |",
    ]
    assert [" | ".join(line) for line in lines] == expected


def test_page_has_the_sizes_of_the_networks(bench) -> None:
    page = (REPOSITORY / bench.which_law.EXPERIMENT.page).read_text(encoding="utf-8")
    sizes = [f"{sum(p.numel() for p in net.model().parameters()):,}" for net in bench.checkpoints.NETS.values()]
    table = page.split("| network | data | weights |")[1].split("\n\n")[0]
    assert {line.split("|")[-2].strip() for line in table.splitlines()[2:]} == set(sizes)


def test_grid_shows_every_verdict(bench, rows) -> None:
    figure = bench.law_figures.draw_grid(rows, FOLDER)
    rows = bench.law_tables.usual(rows)
    left, right = figure.axes
    letters = [text.get_text() for text in left.texts if text.get_text() in "CLPG?"]
    expected = [bench.law_figures.VERDICTS[verdict][0] for verdict in rows["verdict"]]
    assert sorted(letters) == sorted(expected)
    assert len(right.patches) == len(rows)
    plus = [text for text in right.texts if text.get_text() == "+"]
    assert len(plus) == (rows["down_rank"] > bench.law_figures.CLEAR).sum()


def test_results_are_whole_and_every_missing_verdict_has_a_cause(bench, rows) -> None:
    assert set(rows["key"]) == set(bench.which_law.cases("quick"))
    assert ((rows["verdict"] == "NOT_IDENTIFIED") == (rows["why"].fillna("") != "")).all()


def test_page_has_the_tables_of_the_results(bench, rows) -> None:
    page = (REPOSITORY / bench.which_law.EXPERIMENT.page).read_text(encoding="utf-8")
    found = bench.which_law.tables(rows)
    assert page.count("by benchmarks/reproduce/which_law.py -->") == len(found)
    assert bench.experiment.put(page, "which_law.py", found) == page


def test_page_has_the_chances_of_the_results(bench) -> None:
    chances = bench.law_chances
    kept = bench.kept.Kept(FOLDER / "results" / "law_chances-quick.jsonl").frame()
    assert set(kept["key"]) == set(chances.cases("quick"))
    page = (REPOSITORY / chances.EXPERIMENT.page).read_text(encoding="utf-8")
    found = chances.tables(kept)
    assert page.count("by benchmarks/reproduce/law_chances.py -->") == len(found)
    assert bench.experiment.put(page, "law_chances.py", found) == page
