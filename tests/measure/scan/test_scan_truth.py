"""measure.scan: on landscapes with known gradients and Hessians every row says the truth."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import smoothdiag as sd
from smoothdiag.problems import Problem

START = torch.tensor([0.9, -0.4, 0.7, 0.2, -0.5, 0.3], dtype=torch.float64)
CASES = {
    "exponential": sd.problems.exponential(L0=1.5, L1=2.0, dim=6),
    "cosh": sd.problems.cosh(L0=1.0, L1=2.0, dim=6),
    "quadratic": sd.problems.quadratic([0.5, 1.0, 2.0, -3.0, 5.0, 8.0]),
    "power": sd.problems.power(4.0, dim=6),
}


def scanned(problem: Problem, start: Tensor = START, **options) -> pd.DataFrame:
    model = problem.as_module(start)
    return sd.scan(model, lambda model, batch: model(), [None], progress=False, **options).to_frame()


@pytest.mark.parametrize("name", CASES)
def test_every_row_has_the_gradient_norm_and_the_hessian_norm_of_the_landscape(name) -> None:
    problem, points = CASES[name], []

    def noted(step: sd.Step) -> sd.Estimate:
        points.append(step.start[0].clone())
        return sd.HessianNorm(tol=0.03)(step)

    frame = scanned(problem, estimators=[noted], max_loss=1e3)
    frame = frame[frame["status"] == "ok"]
    assert frame["scan"].nunique() > 12
    assert len(frame) == len(points) > 30
    norms = [float(problem.gradient(x).norm()) for x in points]
    np.testing.assert_allclose(frame["grad_norm"], norms, rtol=1e-12)
    np.testing.assert_allclose(frame["smoothness"], [float(problem.hessian_norm(x)) for x in points], rtol=0.03)
    np.testing.assert_allclose(frame["loss"], [float(problem.value(x)) for x in points], rtol=1e-12)
    np.testing.assert_allclose(frame["distance"], [float((x - START).norm()) for x in points], rtol=1e-12)
    np.testing.assert_allclose(frame["relative_distance"] * float(START.norm()), frame["distance"], rtol=1e-12)


def test_the_usual_measurement_of_the_exponential_is_its_law() -> None:
    frame = scanned(CASES["exponential"])
    measured = frame[frame["status"] == "ok"]
    np.testing.assert_allclose(measured["smoothness"], 1.5 + 2 * measured["grad_norm"], rtol=1e-4)
    assert (measured["estimator"] == "hessian_norm").all()
    assert (measured["data"] == "fixed").all()
    assert measured["lr"].isna().all()


def test_a_quadratic_is_constant_on_every_line_although_the_curvature_along_its_gradient_is_not() -> None:
    start = torch.tensor([3.0, 1.0, 0.3, 0.1, 0.03, 0.01], dtype=torch.float64)
    problem = sd.problems.quadratic([0.1, 0.3, 1.0, 3.0, 10.0, 30.0])
    frame = scanned(problem, start, max_loss=1e3)
    measured = frame[frame["status"] == "ok"]
    np.testing.assert_allclose(measured["smoothness"], 30.0, rtol=1e-3)
    assert np.log10(measured["grad_norm"].max() / measured["grad_norm"].min()) > 1


@pytest.mark.parametrize("name", ["exponential", "quadratic"])
def test_log_gradient_norm_moves_by_the_spacing_from_point_to_point(name) -> None:
    frame = scanned(CASES[name], max_loss=1e3, spacing=0.4)
    start = frame[frame["scan"] == "start"]
    for line, rows in frame[(frame["scan"] != "start") & (frame["status"] == "ok")].groupby("scan"):
        norms = np.log([*start["grad_norm"], *rows["grad_norm"]])
        moved = np.abs(np.diff(norms))
        assert ((moved >= 0.3 - 1e-9) & (moved <= 0.5 + 1e-9)).all(), line
        assert rows["point"].tolist() == list(range(1, len(rows) + 1))
        assert (np.diff([0.0, *rows["relative_distance"]]) >= 0.04 - 1e-9).all() or "random" in line


def test_lines_end_at_three_times_the_loss_of_chance() -> None:
    # At x the loss is above the loss 0 at the origin, so chance is the loss at x.
    frame = scanned(CASES["exponential"])
    limit = 3 * float(CASES["exponential"].value(START))
    assert frame["max_loss"].dropna().tolist() == pytest.approx([limit])
    assert frame.attrs["scan"]["max_loss"] == pytest.approx(limit)
    measured = frame[frame["status"] == "ok"]
    assert measured["loss"].max() <= limit
    ended = frame[frame["status"] == "end_of_line"]
    assert set(ended["ended"]) == {"loss"}
    assert (ended["loss"] > limit).all()
    assert ended["smoothness"].isna().all()


def test_chance_is_the_loss_with_all_parameters_at_zero_where_that_is_larger() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 5)
    batch = torch.randn(8, 4), torch.randint(5, (8,))

    def loss_fn(model, batch):
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(50):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    trace = sd.scan(model, loss_fn, [batch], budget=60, progress=False)
    assert trace.meta["scan"]["max_loss"] == pytest.approx(3 * math.log(5), rel=1e-6)


def test_a_loss_below_zero_has_a_limit_above_it() -> None:
    frame = scanned(sd.problems.quadratic([-1.0, -2.0]), torch.tensor([1.0, 1.0], dtype=torch.float64))
    # The loss with all parameters at zero is 0, the larger one, and gives no scale.
    assert frame["max_loss"][0] == math.inf
    assert frame["loss"].min() < frame["loss"][0] < 0


def test_descent_follows_the_gradient_and_never_climbs() -> None:
    start = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    frame = scanned(sd.problems.exponential(1.0, 1.0, 3), start, directions=["descent"])
    rows = frame[frame["status"] == "ok"]
    assert (np.diff(rows["loss"]) < 0).all()
    assert (np.abs(np.diff(np.log(rows["grad_norm"]))) >= 0.3).all()
    np.testing.assert_allclose(rows["smoothness"], 1 + rows["grad_norm"], rtol=1e-3)
    assert len(rows) == 9


def test_descent_shortens_its_steps_where_curvature_grows() -> None:
    # At this point the curvature .05 allows a step of 10, which would leap over the minimum at 3 pi / 2.
    start = torch.tensor([math.pi + 0.05], dtype=torch.float64)
    rows = scanned(sd.problems.sine(), start, directions=["descent"], points=3)
    assert len(rows) == 4
    assert (np.diff(rows["loss"]) < 0).all()
    assert rows["distance"].max() < math.pi / 2 - 0.05  # it never leaps over the minimum


def test_a_loss_that_is_constant_along_a_line_ends_it_without_a_point() -> None:
    frame = scanned(
        sd.problems.exp_linear([1.0, 0.0]),
        torch.tensor([1.0, 1.0], dtype=torch.float64),
        directions=["to side", "gradient up"],
        toward={"side": {"x": torch.tensor([1.0, 2.0], dtype=torch.float64)}},
    )
    (side,) = frame[frame["scan"] == "to side"].to_dict("records")
    assert side["ended"] == "distance"
    assert side["relative_distance"] == pytest.approx(4)
    assert (frame[frame["scan"] == "gradient up"]["status"] == "ok").any()


def test_a_line_to_the_starting_point_leads_nowhere_and_costs_nothing() -> None:
    start = torch.tensor([1.0, 1.0], dtype=torch.float64)
    frame = scanned(sd.problems.quadratic([1.0, 2.0]), start, directions=["to x"], toward={"x": {"x": start}})
    last = frame.iloc[-1]
    assert [last["scan"], last["ended"], last["num_grads"], last["distance"]] == ["to x", "no direction", 0, 0]


def test_a_point_that_is_not_finite_ends_its_line_and_is_recorded() -> None:
    # -log x has no value below zero.
    frame = scanned(
        sd.problems.neg_log(),
        torch.tensor([1.0], dtype=torch.float64),
        directions=["gradient up"],
        points=20,
        max_loss=99,
    )
    last = frame.iloc[-1]
    assert last["status"] == "non_finite"
    assert last["ended"] == "not finite"
    assert (frame["status"].iloc[:-1] == "ok").all()
    measured = frame[frame["status"] == "ok"]
    np.testing.assert_allclose(measured["smoothness"], measured["grad_norm"] ** 2, rtol=0.01)
