"""measure.estimators.hessian: rows of the curvature estimators agree with the dense Hessian in float64."""

import math

import numpy as np
import pytest
import torch
from asserts import assert_identical, state_of
from curved import flat
from losses import regression
from regressions import small_run, step_over
from torch.func import functional_call
from torch.nn import functional as F

from smoothdiag import (
    DirectionalCurvature,
    HessianNorm,
    Probe,
    Sharpness,
    Status,
    every,
    fit_smoothness,
)
from smoothdiag.adapters import adapter_of

TIGHT = {"tol": 1e-9, "max_products": 100}
ALL = [HessianNorm(**TIGHT), Sharpness(**TIGHT), DirectionalCurvature(), DirectionalCurvature("update")]


def dense(model, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient, and the Hessian row by row."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    sizes = [p.numel() for p in parameters]

    def loss(x: torch.Tensor) -> torch.Tensor:
        parts = {n: t.view_as(p) for n, t, p in zip(names, x.split(sizes), parameters, strict=True)}
        return regression(lambda inputs: functional_call(model, parts, inputs), batch)

    x = flat(parameters)
    return torch.func.grad(loss)(x), torch.autograd.functional.hessian(loss, x)


def run(make, estimators=ALL, steps=1, **arguments):
    """Rows of the last step by (estimator, group); gradient, Hessian, displacement and P of that step."""
    model, _, batches = small_run(steps)
    optimizer = make(model.parameters())
    arguments = {"data": "step"} | arguments
    probe = Probe(model, optimizer, regression, estimators=estimators, schedule=every(1), **arguments)
    for batch in probe.watch(batches):
        before = flat(model.parameters())
        gradient, hessian = dense(model, batch)
        optimizer.zero_grad()
        regression(model, batch).backward()
        optimizer.step()
    matrix = adapter_of(optimizer).preconditioner(list(model.parameters()))
    rows = {(r["estimator"], r["group"]): r for r in probe.trace if r["step"] == steps - 1}
    return rows, gradient, hessian, flat(model.parameters()) - before, None if matrix is None else flat(matrix)


def sgd(p):
    return torch.optim.SGD(p, lr=0.1, momentum=0.9)


def adam(p):
    return torch.optim.Adam(p, lr=0.01)


@pytest.mark.parametrize("backend", ["auto", "retained", "rebuilt", "central"])
def test_rows_are_those_of_the_dense_hessian(backend) -> None:
    estimators = [
        HessianNorm(**TIGHT, backend=backend),
        Sharpness(**TIGHT, backend=backend),
        DirectionalCurvature(backend=backend),
        DirectionalCurvature("update", backend=backend),
    ]
    rows, g, h, d, _ = run(sgd, estimators, steps=2)
    values = np.linalg.eigvalsh(h)
    rel = 1e-6 if backend == "central" else 1e-9
    norm, sharpness = rows["hessian_norm", "all"], rows["sharpness", "all"]
    assert norm["smoothness"] == pytest.approx(np.abs(values).max(), rel=rel)
    assert sharpness["smoothness"] == pytest.approx(values[-1], rel=rel)
    assert rows["batch_sharpness", "all"]["smoothness"] == pytest.approx(float(g @ h @ g / (g @ g)), rel=rel)
    assert rows["batch_sharpness", "all"]["curvature_norm"] == pytest.approx(float((h @ g).norm() / g.norm()), rel=rel)
    assert rows["curvature_update", "all"]["smoothness"] == pytest.approx(float(d @ h @ d / (d @ d)), rel=rel)
    assert {r["hvp"] for r in rows.values()} == {"retained" if backend == "auto" else backend}
    for row in rows.values():
        assert row["grad_norm"] == pytest.approx(float(g.norm()), rel=1e-12)
        assert row["stability_limit"] == pytest.approx(3.8 / 0.1)
        assert row["status"] == "ok"
        assert row["num_hvps"] > 0
    assert math.isnan(norm["two_scale"]) == (backend != "central")
    assert norm["residual"] < 1e-3


def test_preconditioned_rows_are_those_of_the_scaled_hessian() -> None:
    rows, g, h, d, p = run(adam, steps=3)
    scaled = h / p.sqrt() / p.sqrt()[:, None]
    values = np.linalg.eigvalsh(scaled)
    assert rows["hessian_norm_preconditioned", "all"]["smoothness"] == pytest.approx(np.abs(values).max(), rel=1e-8)
    assert rows["sharpness_preconditioned", "all"]["smoothness"] == pytest.approx(values[-1], rel=1e-8)
    assert rows["sharpness", "all"]["smoothness"] == pytest.approx(np.linalg.eigvalsh(h)[-1], rel=1e-8)
    for name, v in (("batch_sharpness", g / p.sqrt()), ("curvature_update", d * p.sqrt())):
        row = rows[f"{name}_preconditioned", "all"]
        assert row["smoothness"] == pytest.approx(float(v @ scaled @ v / (v @ v)), rel=1e-8)
        assert row["grad_norm"] == pytest.approx(float((g / p.sqrt()).norm()), rel=1e-8)
    limits = {name: row["stability_limit"] for (name, _), row in rows.items()}
    assert limits["sharpness_preconditioned"] == pytest.approx(38 / 0.01)
    assert math.isnan(limits["sharpness"])


def test_groups_get_the_norm_of_their_own_block() -> None:
    rows, g, h, _, _ = run(sgd, [HessianNorm(**TIGHT, by_group=True)], group_by=lambda name: name.split(".")[0])
    model, _, _ = small_run(1)
    place = 0
    found = {}
    for name, p in model.named_parameters():
        found.setdefault(name.split(".")[0], []).extend(range(place, place + p.numel()))
        place += p.numel()
    assert {group for _, group in rows} == {"all", *found}
    for group, indices in found.items():
        block = np.linalg.eigvalsh(h[indices][:, indices])
        assert rows["hessian_norm", group]["smoothness"] == pytest.approx(np.abs(block).max(), rel=1e-8)
        assert rows["hessian_norm", group]["grad_norm"] == pytest.approx(float(g[indices].norm()), rel=1e-10)


def test_groups_are_left_out_unless_asked_for() -> None:
    rows, *_ = run(sgd, [HessianNorm()], group_by=lambda name: name.split(".")[0])
    assert set(rows) == {("hessian_norm", "all")}


def test_the_choice_is_made_once_and_its_reason_recorded_once() -> None:
    model, _, batches = small_run(4)
    optimizer = sgd(model.parameters())
    probe = Probe(model, optimizer, regression, estimators=ALL, schedule=every(1), probe_batches=batches[:1])
    for _ in range(4):
        step_over(model, optimizer, probe.watch(batches[:1]))
    reasons = [r.get("hvp_reason") for r in probe.trace]
    assert "symmetric to" in reasons[0]
    assert reasons[1:] == [None] * (len(reasons) - 1)
    products = [r["num_hvps"] for r in probe.trace if r["estimator"] == "sharpness"]
    assert np.mean(products[1:]) < products[0]


def test_warm_starts_are_forgotten_when_the_parameters_change() -> None:
    model, _, batches = small_run(2)
    model[2].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = Probe(model, optimizer, regression, estimators=[HessianNorm(**TIGHT)], schedule=every(1), data="step")
    step_over(model, optimizer, probe.watch(batches[:1]))
    model.requires_grad_(True)
    hessian = dense(model, batches[1])[1]
    step_over(model, optimizer, probe.watch(batches[1:]))
    assert probe.trace[-1]["smoothness"] == pytest.approx(np.abs(np.linalg.eigvalsh(hessian)).max(), rel=1e-8)


def test_a_solver_that_has_not_finished_says_so_and_is_not_fitted() -> None:
    rows, *_ = run(sgd, [HessianNorm(tol=1e-12, max_products=2)])
    (row,) = rows.values()
    assert row["status"] == "not_converged"
    assert row["residual"] > 1e-12
    assert row["num_hvps"] == 2


def test_a_way_that_fails_later_gives_way_to_differences() -> None:
    model, _, batches = small_run(3)
    optimizer = sgd(model.parameters())
    breaks = []

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            if breaks and torch.is_grad_enabled():
                raise RuntimeError("no second derivative today")
            return grad

    def loss_fn(model, batch):
        return Once.apply(regression(model, batch))

    probe = Probe(model, optimizer, loss_fn, estimators=[Sharpness(**TIGHT)], schedule=every(1), data="step")
    for batch in probe.watch(batches):
        breaks[:] = [True] * (probe.steps == 1)
        optimizer.zero_grad()
        hessian = dense(model, batch)[1]
        regression(model, batch).backward()
        optimizer.step()
        assert probe.trace[-1]["smoothness"] == pytest.approx(np.linalg.eigvalsh(hessian)[-1], rel=1e-6)
    assert [r["hvp"] for r in probe.trace] == ["retained", "central", "retained"]
    assert "failed at step 1: no second derivative today" in probe.trace[1]["hvp_reason"]


@pytest.mark.thorough
def test_a_term_that_comes_later_is_noticed() -> None:
    class Head(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z, y):
            ctx.save_for_backward(2 * (z - y) / y.numel())
            return F.mse_loss(z, y)

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.saved_tensors[0], None

    weight = [0.0]

    def loss_fn(model, batch):
        return regression(model, batch) + weight[0] * Head.apply(model(batch[0]), batch[1])

    model, optimizer, (batch,) = small_run(1)
    probe = Probe(model, optimizer, loss_fn, estimators=[Sharpness(), HessianNorm()], schedule=every(1))
    for k in range(45):
        weight[0] = float(k > 4)
        step_over(model, optimizer, probe.watch([batch]), loss_fn)
    ways = [r["hvp"] for r in probe.trace if r["estimator"] == "sharpness"]
    assert ways[:20] == ["retained"] * 20
    assert ways[-5:] == ["central"] * 5


def test_a_gradient_of_no_function_has_no_hessian() -> None:
    def loss_fn(model, batch):
        return F.mse_loss(model(batch[0]), model(batch[0] + 1).detach())

    model, optimizer, (batch,) = small_run(1)
    probe = Probe(model, optimizer, loss_fn, estimators=ALL, schedule=every(1))
    step_over(model, optimizer, probe.watch([batch]), loss_fn)
    assert "not the gradient of one function" in probe.trace[0]["hvp_reason"]
    assert not any(Status[r["status"].upper()].usable for r in probe.trace)


def test_products_that_depend_on_the_radius_say_so() -> None:
    model = torch.nn.ParameterList([torch.full((100,), 1e5), torch.full((3,), 0.1)])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def loss_fn(model, batch):
        return 1e-3 * (model[0] / 1e6).square().sum() + (model[1] ** 4).sum()

    estimators = [DirectionalCurvature(backend="central"), HessianNorm(backend="central")]
    probe = Probe(model, optimizer, loss_fn, estimators=estimators)
    step_over(model, optimizer, probe.watch([0]), loss_fn)
    statuses = {r["estimator"]: r["status"] for r in probe.trace}
    assert statuses["batch_sharpness"] == "radius_dependent"
    assert statuses["hessian_norm"] != "ok"


def test_not_finite_and_zero_are_statuses() -> None:
    model, _, (batch, bad) = small_run(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    probe = Probe(model, optimizer, regression, estimators=ALL, schedule=every(1), data="step")
    step_over(model, optimizer, probe.watch([batch]))
    assert {r["estimator"]: r["status"] for r in probe.trace}["curvature_update"] == "zero_step"
    step_over(model, optimizer, probe.watch([(bad[0] * math.inf, bad[1])]))
    assert {r["status"] for r in probe.trace if r["step"] == 1} == {"non_finite"}


def test_a_flat_loss_has_no_curvature() -> None:
    weight = torch.nn.Linear(3, 1).double()
    optimizer = torch.optim.SGD(weight.parameters(), lr=0.1)
    probe = Probe(weight, optimizer, lambda model, x: model(x).mean(), estimators=[HessianNorm(), Sharpness()])
    probe.observe(inputs := torch.randn(4, 3, dtype=torch.float64))
    weight(inputs).mean().backward()
    optimizer.step()
    assert [(r["smoothness"], r["status"]) for r in probe.trace] == [(0, "ok"), (0, "ok")]


@pytest.mark.thorough
@pytest.mark.parametrize("make", [sgd, adam])
def test_training_is_the_same_with_and_without(make) -> None:
    states = []
    for probed in (False, True):
        torch.manual_seed(0)
        model, _, batches = small_run(4)
        optimizer = make(model.parameters())
        if probed:
            batches = Probe(model, optimizer, regression, estimators=ALL, schedule=every(1)).watch(batches)
        step_over(model, optimizer, batches)
        states.append(state_of(model, optimizer))
    assert_identical(*states)


@pytest.mark.thorough
def test_hessian_norms_can_be_fitted() -> None:
    model, _, batches = small_run(30)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = Probe(model, optimizer, regression, estimators=[HessianNorm()], schedule=every(1))
    step_over(model, optimizer, probe.watch(batches))
    fit = fit_smoothness(probe.trace)
    assert fit.estimator == "hessian_norm"
    assert fit.num_points == 30


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: HessianNorm(tol=0), "tol"),
        (lambda: Sharpness(max_products=0), "max_products"),
        (lambda: HessianNorm(backend="forward"), "backend"),
        (lambda: DirectionalCurvature("sideways"), "direction"),
        (lambda: DirectionalCurvature(backend="forward"), "backend"),
    ],
)
def test_wrong_arguments_are_named(make, name) -> None:
    with pytest.raises(ValueError, match=f"Parameter `{name}` should"):
        make()
