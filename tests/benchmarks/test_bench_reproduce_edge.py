"""benchmarks/reproduce: limits in a norm hold on a quadratic, levels are what they say, page has tables."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from places import REPOSITORY
from scripts import modules
from torch import nn

import smoothdiag as sd
from smoothdiag.geometry import Product, Spectral

pytest.importorskip("sklearn", reason="the measurements of benchmarks/stability.py need it")

FOLDER = REPOSITORY / "benchmarks" / "reproduce"


@pytest.fixture(scope="module")
def bench():
    return modules(FOLDER, "experiment", "kept", "edgenets", "ownnorm", "edgetables", "edge")


@pytest.fixture
def bowl(bench) -> nn.Module:
    torch.manual_seed(0)
    return bench.edgenets.Bowl().double()


def greatest(bench) -> float:
    """S of the quadratic <W, A W A> / 2: by von Neumann's inequality the sum of squared eigenvalues of A."""
    return sum(a**2 for a in bench.edgenets.QUADRATIC)


def spectral(parameters, lr):
    return sd.GGNC(parameters, lr, threshold=math.inf, geometry=Spectral(exact=True), momentum=0.0)


def descend(model, optimizer, num_steps: int) -> None:
    for _ in range(num_steps):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()


# The limit in a norm


def test_largest_curvature_in_the_spectral_ball_is_that_of_von_neumann(bench, bowl) -> None:
    loss = sd.objective(bowl, bench.edgenets.own_value, [None])
    geometry = Product((Spectral(exact=True),))
    with sd.hvp(loss) as hessian:
        for seed in range(3):
            start = [-x for x in geometry.lmo([torch.randn(6, 6, generator=torch.Generator().manual_seed(seed))])]
            found, at = bench.ownnorm.ascend(hessian, geometry, [x.double() for x in start], 60)
            assert float(geometry.norm(at)) == pytest.approx(1)
            assert found == pytest.approx(greatest(bench), rel=1e-3)
            # every start ascends, and what it finds never exceeds S
            assert bench.ownnorm.dot(start, hessian([x.double() for x in start])) <= found <= greatest(bench) + 1e-9
    line = [torch.eye(6, dtype=torch.float64)]
    with sd.hvp(loss) as hessian:
        assert bench.ownnorm.dot(line, hessian(line)) == pytest.approx(greatest(bench))


@pytest.mark.parametrize(("factor", "grows"), [(0.99, False), (1.01, True)])
def test_spectral_descent_diverges_along_the_line_of_largest_curvature_iff_the_rate_exceeds_2_over_S(
    bench, bowl, factor, grows
) -> None:
    lr = factor * 2 / greatest(bench)
    with torch.no_grad():
        bowl.weight.copy_(1e-3 * torch.eye(6))
    descend(bowl, spectral(bowl.parameters(), lr), 50)
    # (1 - eta S)^50 times the start, still along the line
    assert float(bowl.weight[0, 0].detach()) == pytest.approx(1e-3 * (1 - 2 * factor) ** 50, rel=1e-6)
    assert (float(bowl.weight.detach().norm()) > 1e-3 * 6**0.5) is grows


@pytest.mark.parametrize(("factor", "grows"), [(0.98, False), (1.05, True)])
def test_that_line_attracts_so_random_starts_diverge_above_the_limit_too(bench, bowl, factor, grows) -> None:
    before = float(bowl.weight.detach().norm())
    descend(bowl, spectral(bowl.parameters(), factor * 2 / greatest(bench)), 220)
    assert (float(bowl.weight.detach().norm()) > before) is grows


def test_loss_of_spectral_descent_falls_below_2_over_S_from_everywhere(bench, bowl) -> None:
    before = float(bowl().detach())
    for _ in range(100):
        descend(bowl, spectral(bowl.parameters(), 0.999 * 2 / greatest(bench)), 1)
        assert float(bowl().detach()) < before
        before = float(bowl().detach())


@pytest.mark.parametrize("start", [0.37, 5.0])
def test_muon_ends_at_its_limit_on_a_quadratic_because_the_gradient_shrinks(bench, bowl, start) -> None:
    lr, geometry = 0.1, Product((Spectral(exact=True),))
    with torch.no_grad():
        bowl.weight.copy_(start * torch.eye(6))
    optimizer = sd.GGNC(bowl.parameters(), lr / 1e-9, threshold=1e-9, geometry=Spectral(exact=True), momentum=0.0)
    seen = []
    for step in range(200):
        descend(bowl, optimizer, 1)
        if step >= 100:
            seen.append(float(geometry.dual_norm([bowl.weight.grad])))
    # to and fro between a and a - lr: the mean dual norm is S lr / 2, whatever S
    assert np.mean(seen) == pytest.approx(lr * greatest(bench) / 2, rel=1e-6)


def test_own_curvature_of_a_probe_is_exact_and_counts_the_radius_of_the_optimizer(bench, bowl) -> None:
    optimizer = torch.optim.Muon(bowl.parameters(), lr=0.02, weight_decay=0.0, momentum=0.0, nesterov=False)
    found = []
    estimators, every = [bench.ownnorm.OwnCurvature()], sd.every(1)
    with sd.Probe(
        bowl, optimizer, bench.edgenets.own_value, estimators=estimators, schedule=every, probe_batches=[None]
    ) as probe:
        for _ in range(3):
            start = bowl.weight.detach().clone()
            descend(bowl, optimizer, 1)
            found.append((start, bowl.weight.detach() - start))
    scales = torch.tensor(bench.edgenets.QUADRATIC, dtype=torch.float64)
    rows = probe.trace.to_frame()
    assert len(rows) == 3
    for (start, update), (_, row) in zip(found, rows.iterrows(), strict=True):
        gradient = scales[:, None] * start * scales
        u, values, vt = torch.linalg.svd(gradient)
        factor = u @ vt
        assert row["grad_norm"] == pytest.approx(float(values.sum()))
        assert row["smoothness"] == pytest.approx(float((factor * (scales[:, None] * factor * scales)).sum()))
        assert row["smoothness"] - 1e-9 <= row["largest"] <= greatest(bench) + 1e-9
        assert row["update"] == pytest.approx(float((update * (scales[:, None] * update * scales)).sum()))
        assert row["slope"] == pytest.approx(float((update * gradient).sum()))
        assert row["step_norm"] == pytest.approx(0.02 * 1.0, rel=0.25)  # Newton-Schulz is off by up to a fifth


# Levels


def test_level_of_an_own_norm_is_what_steps_gain_to_second_order_over_first_order(bench) -> None:
    steps = [0, 60, 80]
    own = pd.DataFrame(
        {
            "estimator": "own",
            "step": steps,
            "window": [1, 20, 22],
            "smoothness": [1.0, 30.0, 50.0],
            "largest": [2.0, 40.0, 60.0],
            "grad_norm": [5.0, 2.0, 1.0],
            "step_norm": 0.1,
            "update": 0.2,
            "slope": -0.1,
            "loss": 1.0,
            "grows": False,
        }
    )
    critical = pd.DataFrame({"estimator": "critical_step", "step": steps, "critical_multiple": [2.0, 2.0, 2.0]})
    found = bench.edge.own_levels({"data": pd.concat([own, critical])}, 0.1, 100)
    assert found["along"] == pytest.approx(0.1**2 * (30 + 50) / 2 / (0.1 * 3))
    assert found["largest"] == pytest.approx(0.1**2 * (40 + 60) / 2 / (0.1 * 3))
    assert found["update"] == pytest.approx(0.1 / 0.1)
    assert (found["critical"], found["curvature_growth"]) == (0.5, 25)
    own["grows"] = True
    found = bench.edge.own_levels({"data": pd.concat([own, critical])}, 0.1, 100)
    assert found["along"] == pytest.approx(0.1 * (30 * 4 + 50 * 1) / 2 / (4 + 1))


def test_a_quadratic_stays_below_the_edge_of_gradient_descent_and_the_run_knows_its_sharpness(bench, tmp_path) -> None:
    place = bench.experiment.Place("quick", torch.device("cpu"), tmp_path)
    found = bench.edge.run(bench.edge.Run("quadratic", "SGD", 0.05, None, 60), place)
    assert found["full_limit"] == found["small_limit"] == pytest.approx(2)
    assert found["sharpness"] == pytest.approx(16 * 0.05, rel=1e-3)
    assert found["batch_sharpness"] <= found["sharpness"] * (1 + 1e-6)
    assert len(found["steps"]) == len(found["curve"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "quadratic_SGD_0.05_all_0_batch.csv",
        "quadratic_SGD_0.05_all_0_data.csv",
    ]


def test_momentum_has_both_limits(bench, tmp_path) -> None:
    place = bench.experiment.Place("quick", torch.device("cpu"), tmp_path)
    found = bench.edge.run(bench.edge.Run("quadratic", "momentum 0.9", 0.05, None, 30), place)
    assert (found["full_limit"], found["small_limit"]) == pytest.approx((3.8, 0.2))


def test_tables_say_below_at_above_and_rising(bench) -> None:
    assert bench.edgetables.place(pd.Series([0.95, 1.05])) == "at"
    assert bench.edgetables.place(pd.Series([0.5, 1.05])) == "at and below"
    assert bench.edgetables.place(pd.Series([1.2])) == "above"
    run = {"net": "MLP", "optimizer": "SGD", "lr": 0.2, "batch": 8.0, "momentum": 0.0, "full_limit": 2.0}
    run |= {"small_limit": 2.0, "sharpness": 1.0, "batch_sharpness": 1.2, "mean_curvature": 0.5, "loss": 0.1}
    run |= {"unweighted": 1.1, "batch_highest": 1.5, "num_steps": 70}
    table = bench.edgetables.small_table(pd.DataFrame([run | {"halves": [1.0, 1.4]}]))
    assert "| MLP | SGD, lr 0.2 | 8 | 2, 2 | 0.50 | 0.60 | 0.55 | 0.25 | 0.75 | 0.60 | below, rising |" in table
    assert table.endswith("| 0.1 | 70 |")
    control = run | {"lr": 0.02, "batch_sharpness": 0.3}
    other = control | {"optimizer": "momentum 0.9", "small_limit": 0.2}
    held = bench.edgetables.held_table(pd.DataFrame([run, control, other]))
    assert "SGD, lr 0.02 |" not in held
    assert "| MLP | momentum 0.9, lr 0.02 | 8 | batch sharpness | 10 | 15.0 | 15.0 at lr 0.02 | yes |" in held
    assert "| MLP | SGD, lr 0.2 | 8 | batch sharpness | 10 | 6.0 | 15.0 at lr 0.02 | yes |" in held


# The page


def test_page_has_the_tables_of_the_stored_runs(bench) -> None:
    rows = bench.kept.Kept(FOLDER / "results" / "edge-quick.jsonl").frame()
    assert set(rows["key"]) == set(bench.edge.cases("quick"))
    page = (REPOSITORY / "docs" / "reproduce" / "edge.md").read_text(encoding="utf-8")
    tables = bench.edge.tables(rows)
    assert bench.experiment.put(page, "edge.py", tables) == page
    assert all(table in page for table in tables.values())
