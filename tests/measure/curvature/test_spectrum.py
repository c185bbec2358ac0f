"""measure.curvature.spectrum: known eigenvalues are found, and the result says where they are not."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from smoothdiag import vectors
from smoothdiag.measure.curvature.krylov import Subspace
from smoothdiag.measure.curvature.quadrature import spectral_density, trace
from smoothdiag.measure.curvature.spectrum import lanczos, power_iteration

N = 300


class Matrix:
    """A symmetric matrix with given eigenvalues in random directions; its vectors are split into two tensors."""

    def __init__(self, eigenvalues, dtype=torch.float64, seed=0) -> None:
        self.eigenvalues = np.sort(np.asarray(eigenvalues, dtype=float))
        n = len(self.eigenvalues)
        source = torch.Generator().manual_seed(seed)
        axes = torch.linalg.qr(torch.randn(n, n, generator=source, dtype=torch.float64))[0]
        self.whole = ((axes * torch.from_numpy(self.eigenvalues)) @ axes.T).to(dtype)
        self.axes, self.products = axes.to(dtype), 0
        self.start = self.split(torch.randn(n, generator=source, dtype=torch.float64).to(dtype))

    def split(self, flat: Tensor) -> list[Tensor]:
        return [flat[: len(flat) // 3], flat[len(flat) // 3 :].reshape(-1, 1)]

    def __call__(self, v) -> list[Tensor]:
        self.products += 1
        return self.split(self.whole @ torch.cat([x.reshape(-1) for x in v]))

    def distance(self, pair) -> float:
        """||Hv - value v||, multiplied out in float64."""
        v = torch.cat([x.reshape(-1) for x in pair.vector]).double()
        return float((self.whole.double() @ v - pair.value * v).norm())

    def axis(self, i: int) -> list[Tensor]:
        """The eigenvector of the i-th eigenvalue from below."""
        return self.split(self.axes[:, i].contiguous())


SPECTRA = {
    "clustered": [1, 0.999, 0.998, 0.997, *np.linspace(0, 0.5, N - 4)],
    "close pair": [1, 0.95, *np.linspace(0, 0.5, N - 2)],
    "negative-dominant": [-10, *np.linspace(0, 1, N - 1)],
    "both signs": [1, -0.9, *np.linspace(-0.5, 0.5, N - 2)],
    "rank one": [3, *np.zeros(N - 1)],
    "negative rank one": [-3, *np.zeros(N - 1)],
    "zero": np.zeros(N),
    "identity": np.full(N, 2.0),
    "decaying": 1 / np.arange(1, N + 1) ** 2,
    "uniform": np.linspace(0, 1, N),
    "huge": np.linspace(0, 1, N) ** 8 * 1e25,
    "tiny": np.linspace(0, 1, N) ** 8 * 1e-25,
    "one": [5.0],
}


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SPECTRA)
def test_lanczos_finds_the_right_ends_or_says_that_it_has_not(name, dtype) -> None:
    matrix = Matrix(SPECTRA[name], dtype)
    low, high = matrix.eigenvalues[[0, -1]]
    exact = {"norm": high if high >= -low else low, "largest": high, "smallest": low}
    for target, value in exact.items():
        found = lanczos(matrix, matrix.start, target=target, max_products=60)
        (pair,) = found.pairs
        noise = (1e-5 if dtype is torch.float32 else 1e-12) * found.norm
        if found.converged:
            # A cluster narrower than the residual is one eigenvalue to the solver.
            assert abs(pair.value - value) <= max(pair.residual * abs(pair.value), 2e-3 * (high - low), noise)
        assert matrix.distance(pair) == pytest.approx(
            pair.residual * abs(pair.value) if pair.value else 0, rel=1e-3, abs=noise
        )
        assert low - noise <= found.smallest <= found.largest <= high + noise


@pytest.mark.parametrize("name", ["close pair", "negative-dominant", "both signs", "rank one", "zero", "identity"])
def test_products_suffice_where_the_end_stands_apart(name) -> None:
    matrix = Matrix(SPECTRA[name])
    found = lanczos(matrix, matrix.start)
    assert found.converged
    assert found.num_products == matrix.products <= 14
    assert found.norm == pytest.approx(np.abs(matrix.eigenvalues).max(), rel=1e-3, abs=1e-300)
    assert abs(found.pairs[0].value) == pytest.approx(found.norm, rel=1e-12)


def test_a_tight_tolerance_resolves_a_cluster() -> None:
    matrix = Matrix(SPECTRA["clustered"])
    found = lanczos(matrix, matrix.start, num_pairs=4, tol=1e-9, target="largest", max_products=80)
    assert found.converged
    assert [p.value for p in found.pairs] == pytest.approx([1, 0.999, 0.998, 0.997], rel=1e-9)
    vectors = torch.stack([torch.cat([x.reshape(-1) for x in p.vector]) for p in found.pairs])
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(4, dtype=torch.float64), atol=1e-9, rtol=0)


def test_both_ends_and_several_pairs() -> None:
    matrix = Matrix([-8, -5, *np.linspace(-1, 1, N - 4), 6, 10])
    found = lanczos(matrix, matrix.start, target="both", num_pairs=2, tol=1e-6)
    assert [p.value for p in found.pairs] == pytest.approx([10, 6, -8, -5], rel=1e-6)
    assert found.converged
    assert (found.largest, found.smallest) == pytest.approx((10, -8), rel=1e-6)
    by_size = lanczos(matrix, matrix.start, num_pairs=4, tol=1e-6)
    assert [p.value for p in by_size.pairs] == pytest.approx([10, -8, 6, -5], rel=1e-6)
    assert all(p.converged and p.residual < 1e-2 for p in (*found.pairs, *by_size.pairs))


def test_multiple_eigenvalues_are_found_as_often_as_they_occur() -> None:
    matrix = Matrix([3, 3, 3, *np.zeros(40)])
    found = lanczos(matrix, matrix.start, num_pairs=4)
    assert found.converged
    assert [p.value for p in found.pairs] == pytest.approx([3, 3, 3, 0], abs=1e-12)


def test_unfinished_is_not_converged() -> None:
    matrix = Matrix(SPECTRA["uniform"])
    found = lanczos(matrix, matrix.start, max_products=10)
    assert not found.converged
    assert not found.pairs[0].converged
    assert found.num_products == 10
    assert found.pairs[0].residual > 1e-3
    assert matrix.distance(found.pairs[0]) == pytest.approx(found.pairs[0].residual * found.pairs[0].value)


def test_the_other_end_has_to_be_out_of_the_race() -> None:
    # The gradient may lie along a positive eigenvalue while a negative one is larger.
    matrix = Matrix([-1, *np.linspace(0, 0.2, N - 2), 0.9])
    found = lanczos(matrix, matrix.axis(N - 1))
    assert found.pairs[0].value == pytest.approx(-1, rel=1e-3)
    assert found.converged


def test_an_eigenvector_of_the_inside_is_left_again() -> None:
    matrix = Matrix(SPECTRA["both signs"])
    found = lanczos(matrix, matrix.axis(150), target="largest", max_products=60)
    assert found.converged
    assert found.pairs[0].value == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("n", [1000, 10_000])
def test_what_the_gradient_does_not_show_is_found_all_the_same(n) -> None:
    eigenvalues = 0.1 * torch.rand(n, dtype=torch.float64)
    eigenvalues[:2] = torch.tensor([15.0, 10.0])
    gradient = torch.zeros(n, dtype=torch.float64)
    gradient[1] = 1
    found = lanczos(lambda v: [eigenvalues * v[0]], [gradient], target="largest")
    assert found.pairs[0].value == pytest.approx(15, rel=1e-3)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("target", ["largest", "norm"])
@pytest.mark.parametrize("jump", [False, True])
def test_searches_in_a_row_follow_eigenvalues_that_change_places(dtype, target, jump) -> None:
    n, wrong, found = 500, 0, None
    sign = -1 if target == "norm" else 1
    source = torch.Generator().manual_seed(0)
    for k in range(100):
        eigenvalues = torch.linspace(0, 1, n, dtype=dtype)
        rising = (20.0 if k > 30 else 5.0) if jump else 5 + 0.18 * k
        eigenvalues[0], eigenvalues[1] = 10, sign * rising
        start = [torch.randn(n, generator=source, dtype=dtype)] if found is None else found.pairs[0].vector
        found = lanczos(
            lambda v: [eigenvalues * v[0]],  # noqa: B023
            start,
            challenger=None if found is None else found.challenger,
            target=target,
            min_products=5 if found is None else 3,
            seed=k,
        )
        if found.converged and abs(found.pairs[0].value) < 0.97 * max(10, rising):
            wrong += 1
    assert wrong == 0


def test_warm_start_takes_three_products_and_the_vector_is_of_length_one() -> None:
    matrix = Matrix(SPECTRA["both signs"])
    cold = lanczos(matrix, matrix.start)
    warm = lanczos(matrix, [7 * x for x in cold.pairs[0].vector], challenger=cold.challenger, min_products=3)
    assert cold.num_products > 4
    assert warm.num_products == 3
    assert sum(float(x.square().sum()) for x in warm.pairs[0].vector) == pytest.approx(1)


@pytest.mark.filterwarnings("error")
def test_challenger_that_a_product_makes_zero_becomes_noise() -> None:
    scale, first, second = torch.tensor([[3.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    found = lanczos(lambda v: [scale * v[0]], [first], challenger=[second], target="norm")
    assert found.pairs[0].value == pytest.approx(3)
    assert float(vectors.norm(found.challenger)) == pytest.approx(1)


def test_asymmetry_is_part_of_the_residual() -> None:
    matrix = Matrix(SPECTRA["both signs"])
    source = torch.Generator().manual_seed(1)
    matrix.whole += 1e-3 * torch.randn(N, N, generator=source, dtype=torch.float64)
    (pair,) = lanczos(matrix, matrix.start, tol=1e-8, max_products=60).pairs
    assert pair.residual == pytest.approx(matrix.distance(pair) / abs(pair.value), rel=1e-6)
    assert pair.residual > 1e-3
    assert not pair.converged


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_products_that_are_not_finite_end_the_search(bad) -> None:
    calls = []

    def matvec(v):
        calls.append(1)
        return [x * (bad if len(calls) == 3 else torch.arange(1.0, 6.0)) for x in v]

    found = lanczos(matvec, [torch.arange(1.0, 6.0)], tol=1e-6)
    assert not found.converged
    assert not found.pairs[0].converged
    assert math.isnan(found.norm)


def test_power_iteration_agrees_and_says_when_it_does_not_converge() -> None:
    matrix = Matrix(SPECTRA["negative-dominant"])
    found = power_iteration(matrix, matrix.start)
    assert found.converged
    assert found.pairs[0].value == pytest.approx(-10, rel=1e-3)
    assert found.norm == pytest.approx(10, rel=1e-3)
    assert matrix.distance(found.pairs[0]) == pytest.approx(found.pairs[0].residual * 10, rel=1e-6)
    split = Matrix([-1, *np.zeros(N - 2), 1])
    assert not power_iteration(split, split.start).converged
    zero = power_iteration(Matrix(SPECTRA["zero"]), matrix.start)
    assert (zero.norm, zero.converged, zero.num_products) == (0, True, 1)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"target": "top"}, "target"),
        ({"num_pairs": 0}, "num_pairs"),
        ({"tol": 0.0}, "tol"),
        ({"max_products": 0}, "max_products"),
        ({"start": [torch.zeros(3)]}, "start"),
        ({"start": [torch.tensor([1.0, math.nan])]}, "start"),
    ],
)
def test_wrong_arguments_are_named(arguments, name) -> None:
    with pytest.raises(ValueError, match=f"Parameter `{name}` should"):
        lanczos(list, **{"start": [torch.ones(3)], **arguments})


def test_basis_stays_orthonormal_in_float32() -> None:
    matrix = Matrix(np.geomspace(1e-6, 1, N), torch.float32)
    space = Subspace(matrix, matrix.start)
    space.grow(matrix.start)
    while space.num_products < 60:
        space.follow(int(space.ritz.outside.argmax()))
    basis = torch.cat(space._frame._rows()).double()[:60]
    torch.testing.assert_close(basis @ basis.T, torch.eye(60, dtype=torch.float64), atol=2e-6, rtol=0)


def test_mixed_start_has_both_halves() -> None:
    direction = [torch.tensor([3.0, 4.0]), torch.zeros(1000)]
    start = vectors.mixed(direction, seed=0)
    along = float(start[0] @ direction[0]) / 5
    rest = torch.cat([start[0] - along * direction[0] / 5, start[1]])
    assert along == pytest.approx(0.7, abs=0.1)
    assert float(rest.norm()) == pytest.approx(0.7, abs=0.05)
    assert all(torch.isfinite(x).all() for x in vectors.mixed([torch.zeros(5)], seed=0))


@pytest.mark.thorough
def test_density_has_the_right_shares_and_integral() -> None:
    matrix = Matrix([*np.linspace(0, 1, 900), *np.linspace(5, 6, 90), *np.full(10, 20.0)])
    density = spectral_density(matrix, matrix.start, num_vectors=8, num_products=40)
    assert density.dimension == 1000
    np.testing.assert_allclose(density.weights.sum(axis=1), 1)
    assert density.share_above(2) == pytest.approx(0.1, abs=0.015)
    assert density.share_above(10) == pytest.approx(0.01, abs=0.005)
    grid = np.linspace(-2, 25, 4000)
    values = density.at(grid, 0.2)
    assert float(values.sum() * (grid[1] - grid[0])) == pytest.approx(1, rel=1e-3)
    mean = float((density.points * density.weights).sum() / 8)
    assert mean == pytest.approx(matrix.eigenvalues.mean(), rel=0.1)


def test_density_of_a_space_that_closes_early() -> None:
    matrix = Matrix([4.0, 4.0, 0.0, 0.0, 0.0])
    density = spectral_density(matrix, matrix.start, num_vectors=200, num_products=5)
    np.testing.assert_allclose(density.weights.sum(axis=1), 1)
    assert density.share_above(2) == pytest.approx(0.4, abs=0.08)


def test_trace_is_unbiased_and_knows_its_error() -> None:
    matrix = Matrix(np.geomspace(1e-4, 1, N) * np.where(np.arange(N) % 3, 1, -1))
    exact = matrix.eigenvalues.sum()
    found = [trace(matrix, matrix.start, num_products=30, seed=1000 * seed) for seed in range(60)]
    assert {t.num_products for t in found} == {30}
    errors = np.array([t.value - exact for t in found])
    assert abs(errors.mean()) < 3 * errors.std() / math.sqrt(len(errors))
    typical = math.sqrt(np.mean([t.standard_error**2 for t in found]))
    assert typical == pytest.approx(errors.std(), rel=0.35)


def test_trace_is_exact_where_the_space_is_spanned() -> None:
    few = Matrix([3, -2, *np.zeros(N - 2)])
    found = trace(few, few.start, num_products=12)
    assert found.value == pytest.approx(1, abs=1e-10)
    small = Matrix([5.0, 1.0])
    found = trace(small, small.start, num_products=12)
    assert (found.value, found.standard_error) == (pytest.approx(6), 0)
    with pytest.raises(ValueError, match="num_products"):
        trace(small, small.start, num_products=2)
