"""measure.scan.scanning: ||H|| is as accurate on small nets as it claims, by products as cheap as the net allows."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian
from torch.nn import functional as F

import smoothdiag as sd
from smoothdiag import vectors
from smoothdiag.measure.scan.lines import Targets, direction
from smoothdiag.measure.scan.scanning import FAR


def classification(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def net(activation: type[nn.Module]) -> nn.Module:
    widths = (8, 12, 12, 4)
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1])


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(32, 8, generator=generator), torch.randint(4, (32,), generator=generator)


def trained(activation: type[nn.Module], batch: tuple[Tensor, Tensor]) -> nn.Module:
    torch.manual_seed(0)
    model = net(activation)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        classification(model, batch).backward()
        optimizer.step()
    return model


def dense_norm(model: nn.Module, batch: tuple[Tensor, Tensor], point: list[Tensor]) -> float:
    """Returns ||H|| of the whole matrix in float64."""
    names, shapes = [n for n, _ in model.named_parameters()], [p.shape for p in point]
    wide = copy.deepcopy(model).double()

    def loss(flat: Tensor) -> Tensor:
        parts = torch.split(flat, [s.numel() for s in shapes])
        named = {n: part.view(s) for n, part, s in zip(names, parts, shapes, strict=True)}
        return F.cross_entropy(functional_call(wide, named, (batch[0].double(),)), batch[1])

    matrix = hessian(loss)(torch.cat([x.double().flatten() for x in point]))
    return float(torch.linalg.eigvalsh(matrix).abs().max())


@pytest.mark.parametrize("activation", [nn.GELU, pytest.param(nn.Tanh, marks=pytest.mark.slow)])
def test_every_row_of_a_net_in_float32_is_near_the_dense_hessian_in_float64(activation, batch) -> None:
    model = trained(activation, batch)
    loss = sd.objective(model, classification, [batch])
    x, g = loss.point(), loss.evaluate().gradient
    targets = Targets({name: place for place, (name, _) in enumerate(model.named_parameters())})
    trace = sd.scan(model, classification, [batch], progress=False, max_loss=20.0)
    errors, where = [], []
    for row in trace:
        if row["status"] != "ok":
            continue
        u = [0 * y for y in x] if row["scan"] == "start" else direction(row["scan"], x, g, targets, seed=0)
        truth = dense_norm(model, batch, vectors.add_scaled(x, u, row["distance"]))
        errors.append(abs(np.log(row["smoothness"] / truth)))
        where.append(row["relative_distance"])
    assert len(errors) > 40
    assert errors[0] < 2e-3
    assert np.median(errors) < 0.01
    assert np.quantile(errors, 0.9) < 0.05
    assert max(where) > FAR


def test_smooth_nets_are_measured_by_one_sided_products_near_the_start_only(batch) -> None:
    trace = sd.scan(trained(nn.GELU, batch), classification, [batch], progress=False, max_loss=20.0)
    rows = [row for row in trace if row["status"] == "ok"]
    assert rows[0]["hvp"] == "retained"
    assert "within" in rows[0]["hvp_reason"]
    further = rows[1:]
    assert {row["hvp"] for row in further if row["relative_distance"] > FAR} == {"retained"}
    near = [row for row in further if row["relative_distance"] <= FAR]
    assert np.mean([row["hvp"] == "one_sided" for row in near]) > 0.8
    assert np.median([row["num_grads"] for row in near]) <= 8


def test_nets_with_many_kinks_are_measured_by_exact_products() -> None:
    torch.manual_seed(2)
    batch = torch.randn(1024, 8), torch.randint(4, (1024,))
    trace = sd.scan(trained(nn.ReLU, batch), classification, [batch], progress=False)
    rows = [row for row in trace if row["status"] == "ok"]
    assert len(rows) > 25
    assert {row["hvp"] for row in rows[len(rows) // 2 :]} == {"retained"}


def test_a_point_that_cheap_products_cannot_measure_is_measured_again(batch, monkeypatch) -> None:
    from smoothdiag.measure.scan import scanning

    model = trained(nn.GELU, batch)
    original = scanning.HessianNorm.__call__

    def failing(self: sd.HessianNorm, step: sd.Step) -> sd.Estimate:
        found = original(self, step)
        is_cheap = getattr(self.backend, "backend", "") == "one_sided"
        return scanning.replace(found, status=sd.Status.RADIUS_DEPENDENT) if is_cheap else found

    monkeypatch.setattr(scanning.HessianNorm, "__call__", failing)
    trace = sd.scan(model, classification, [batch], directions=["random 1"], points=4, progress=False)
    rows = [row for row in trace if row["estimator"] == "hessian_norm" and row["status"] != "end_of_line"]
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["hvp"] for row in rows} == {"retained"}
    # The scan gives cheap products up after two failures.
    assert rows[3]["num_grads"] < rows[1]["num_grads"]
