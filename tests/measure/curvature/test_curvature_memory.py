"""measure.curvature.operator: products cost the memory they promise, as the profile of every allocation shows."""

import pytest
import torch
from curved import objective_of
from losses import classification
from peaks import peak_of
from torch import Tensor, nn

from smoothdiag import DirectionalCurvature, HessianNorm, Sharpness, Step, vectors
from smoothdiag.measure.curvature import hvp, lanczos, spectral_density, trace


class Deep(nn.Module):
    """A network whose activations take some twenty times the memory of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(24, 24) for _ in range(8)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.mark.thorough
@pytest.mark.parametrize("rung", ["central", "one_sided"])
def test_differences_take_hardly_more_memory_than_a_gradient(rung, tmp_path, record_property) -> None:
    model = Deep()
    batch = (torch.randn(512, 24), torch.randint(24, (512,)))
    objective = objective_of(model, classification, batch)
    copy = sum(4 * p.numel() for p in model.parameters())
    v = vectors.random_like(objective.point(), seed=0)

    def gradient() -> None:
        model.zero_grad()
        classification(model, batch).backward()
        model.zero_grad()

    def products(backend: str) -> None:
        with hvp(objective, backend=backend) as product:
            for _ in range(3):
                product(v)

    one = peak_of(gradient, tmp_path)
    found = peak_of(lambda: products(rung), tmp_path)
    exact = peak_of(lambda: products("retained"), tmp_path)
    record_property("peak", f"{found / one:.2f} gradients, or one and {(found - one) / copy:.1f} copies")
    assert one > 15 * copy
    assert found < 1.4 * one
    assert found - one < 10 * copy
    assert exact > 2 * one  # so that the profile is seen to tell one way from another


class Wide(nn.Module):
    """A network whose parameters take all the memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(160, 160, bias=False) for _ in range(12)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def copies_of(action, folder) -> float:
    return peak_of(action, folder) / (4 * 12 * 160**2)


def wide():
    torch.manual_seed(0)
    return objective_of(Wide(), classification, (torch.randn(2, 160), torch.randint(160, (2,))))


SLACK = 0.8
"""Copies for the tensors that an operation makes one at a time, and for the chunks in which a restart turns vectors."""


def test_a_search_holds_a_vector_a_product_or_the_vectors_it_may(tmp_path) -> None:
    # A diagonal operator makes one vector of its own, the product.
    scale = torch.linspace(-1, 1, 300_000)
    start = [torch.randn(300_000, generator=torch.Generator().manual_seed(0))]

    def search(products: int, most: int | None = None) -> float:
        found = []
        peak = copies_of(
            lambda: found.append(
                lanczos(lambda v: [scale * v[0]], start, tol=1e-9, max_products=products, most_vectors=most)
            ),
            tmp_path,
        )
        assert found[-1].num_products == products
        return peak

    assert search(6) <= 6 + 4 + SLACK
    assert search(14) <= 14 + 4 + SLACK
    assert search(14, 8) <= 8 + 1 + SLACK


@pytest.mark.parametrize(
    ("measure", "most"),
    [
        (HessianNorm(tol=1e-9, max_products=6, backend="central"), 6 + 4),
        (HessianNorm(tol=1e-9, max_products=12, backend="central"), 12),
        (HessianNorm(tol=1e-9, max_products=6, backend="one_sided"), 6 + 4),
        (Sharpness(tol=1e-9, max_products=12, backend="one_sided"), 12),
    ],
    ids=repr,
)
def test_an_eigenvalue_takes_four_vectors_more_than_products_and_never_more_than_twelve(
    measure, most, tmp_path
) -> None:
    objective = wide()
    start = objective.point()
    end, step = [0.99 * x for x in start], {"lr": 0.1, "full_precision": True}
    found = []
    peak = copies_of(lambda: found.append(measure(Step(0, objective, start, end, **step)).smoothness), tmp_path)
    assert found[0] > 0
    assert peak <= most + SLACK


def test_curvature_along_a_direction_takes_seven_vectors(tmp_path) -> None:
    objective = wide()
    start = objective.point()
    end = [0.99 * x for x in start]
    measure = DirectionalCurvature(backend="central")
    assert copies_of(lambda: measure(Step(0, objective, start, end, lr=0.1)), tmp_path) <= 7 + SLACK


def test_density_and_trace_hold_a_vector_a_product_and_a_third_of_that(tmp_path) -> None:
    scale, like = torch.linspace(-1, 1, 300_000), [torch.zeros(300_000)]
    times = {"matvec": lambda v: [scale * v[0]], "like": like, "num_products": 12}
    assert copies_of(lambda: spectral_density(**times, num_vectors=2), tmp_path) <= 12 + 2 + SLACK
    assert copies_of(lambda: trace(**times), tmp_path) <= 4 + 4 + SLACK
