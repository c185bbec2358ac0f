"""measure.estimators.hessian: both ends of the spectrum are right within 1% or NaN, and never an error of division."""

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from networks import Point
from torch import Tensor

import smoothdiag as sd
from smoothdiag import vectors


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turned(eigenvalues: Tensor, seed: int) -> Tensor:
    basis = torch.linalg.qr(random(seed + 100, len(eigenvalues), len(eigenvalues)))[0]
    return basis @ torch.diag(eigenvalues) @ basis.T


def wishart(n: int, seed: int) -> Tensor:
    factor = random(seed, n, n)
    return factor.T @ factor / n


def parts(low: float, high: float, n: int) -> Tensor:
    return torch.linspace(low, high, n, dtype=torch.float64)


MATRICES: dict[str, Callable[[int], Tensor]] = {
    "definite": lambda seed: wishart(40, seed),
    "indefinite": lambda seed: wishart(40, seed) - 0.5 * torch.eye(40, dtype=torch.float64),
    "negative definite": lambda seed: -wishart(40, seed) - 0.1 * torch.eye(40, dtype=torch.float64),
    "two clusters": lambda seed: turned(torch.cat([parts(-1, -0.999, 10), parts(1, 1.001, 30)]), seed),
    "one cluster and one beside it": lambda seed: turned(
        torch.cat([parts(-0.001, -0.001, 1), parts(0.9, 1, 39)]), seed
    ),
    "low rank": lambda seed: turned(torch.cat([torch.zeros(30, dtype=torch.float64), parts(0.1, 1, 10)]), seed),
    "six decades": lambda seed: turned(10 ** parts(-6, 0, 40), seed),
    "identity": lambda seed: 2 * torch.eye(7, dtype=torch.float64),
    "zero": lambda seed: torch.zeros(7, 7, dtype=torch.float64),
    "1x1, positive": lambda seed: torch.tensor([[2.0]], dtype=torch.float64),
    "1x1, negative": lambda seed: torch.tensor([[-2.0]], dtype=torch.float64),
    "1x1, zero": lambda seed: torch.tensor([[0.0]], dtype=torch.float64),
    "2x2, indefinite": lambda seed: turned(parts(-1, 2, 2), seed),
    "2x2, singular": lambda seed: turned(parts(0, 2, 2), seed),
}


def rows_of(hessian: Tensor, seed: int, dtype: torch.dtype, estimator: sd.Estimator, steps: int) -> list[dict]:
    hessian, model = hessian.to(dtype), Point(random(seed, len(hessian)).to(dtype))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    probe = sd.Probe(
        model, optimizer, lambda m, _: m.x @ hessian @ m.x / 2, estimators=[estimator], schedule=sd.every(1)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(steps):
            probe.observe(torch.zeros(1))
            optimizer.zero_grad()
            (model.x @ hessian @ model.x / 2).backward()
            optimizer.step()
    return list(probe.trace)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", MATRICES)
def test_both_ends_are_right_or_not_told(name, dtype) -> None:
    for seed in range(2):
        hessian = MATRICES[name](seed)
        exact = torch.linalg.eigvalsh(hessian)
        for row in rows_of(hessian, seed, dtype, sd.HessianNorm(), steps=2):
            assert row["status"] == "ok"
            noise = 1e-5 * float(exact.abs().max()) if dtype == torch.float32 else 1e-12
            assert row["smoothness"] == pytest.approx(float(exact.abs().max()), rel=2e-3, abs=noise)
            for end, truth in (("max", float(exact[-1])), ("min", float(exact[0]))):
                value, residual = row[f"eigenvalue_{end}"], row[f"residual_{end}"]
                assert math.isnan(value) or value == pytest.approx(truth, rel=0.01, abs=noise), (end, residual)
                assert residual >= 0
            ends = [row["eigenvalue_max"], row["eigenvalue_min"]]
            assert any(abs(end) == row["smoothness"] for end in ends), "the end searched for is always told"
            if (len(hessian) < 3 and "singular" not in name) or name in ("identity", "zero"):
                assert not any(map(math.isnan, ends))


@pytest.mark.thorough
@pytest.mark.parametrize("estimator", [sd.HessianNorm(), sd.Sharpness(), sd.DirectionalCurvature()], ids=repr)
@pytest.mark.parametrize("curvature", [2.0, -2.0], ids=["up", "down"])
def test_a_single_parameter_is_measured(estimator, curvature) -> None:
    expected = abs(curvature) if type(estimator) is sd.HessianNorm else curvature
    for seed in range(6):  # noise cancels the gradient for every second one
        for row in rows_of(torch.tensor([[curvature]]), seed, torch.float32, estimator, steps=2):
            assert (row["status"], row["smoothness"]) == ("ok", pytest.approx(expected))


@pytest.mark.parametrize("dim", [1, 2, 3, 50])
def test_noise_never_cancels_a_direction(dim) -> None:
    for seed in range(20):
        for direction in (
            random(seed, dim),
            1e-320 * random(seed, dim),
            torch.zeros(dim),
            torch.full((dim,), math.inf),
        ):
            assert 0.5 < float(vectors.norm(vectors.mixed([direction], seed=seed))) < 1.5
