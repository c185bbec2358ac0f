"""geometry: every geometry has its defining properties, and agrees with the tables of the papers entry by entry."""

import math
import pickle

import numpy as np
import pytest
import torch
from reference import slow_geometry
from torch.testing import assert_close

from smoothdiag.geometry import (
    RMS,
    ByShape,
    Column,
    Convolution,
    Euclidean,
    Frobenius,
    Product,
    Row,
    Sign,
    Spectral,
    describe,
    newton_schulz,
)

F64 = torch.float64
MATRICES = [(3, 5), (6, 2), (1, 4), (4, 1), (1, 1), (4, 4)]
KERNELS = [(3, 2, 3, 3), (2, 5, 2, 3), (4, 1, 3), (2, 2, 2, 2, 2)]
ANY = [(), (1,), (7,), *MATRICES, *KERNELS]
GEOMETRIES = {
    "frobenius": (Frobenius(), ANY),
    "rms": (RMS(), ANY),
    "sign": (Sign(), ANY),
    "sign_per_input": (Sign(per_input=True), MATRICES + KERNELS),
    "row": (Row(), MATRICES + KERNELS),
    "table": (Row(table=True), MATRICES),
    "column": (Column(), MATRICES),
    "spectral": (Spectral(exact=True), MATRICES),
    "convolution": (Convolution(exact=True), KERNELS),
    "transposed": (Convolution(exact=True, transposed=True), KERNELS),
}
CASES = [(name, shape) for name, (_, shapes) in GEOMETRIES.items() for shape in shapes]
ALL = [(name, g, shapes[-1]) for name, (g, shapes) in GEOMETRIES.items()]


def drawn(shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_equals_the_twin(name, shape):
    geometry, g = GEOMETRIES[name][0], drawn(shape)
    norm, dual, lmo = slow_geometry(name, g.numpy())
    assert float(geometry.norm(g)) == pytest.approx(norm, rel=1e-12)
    assert float(geometry.dual_norm(g)) == pytest.approx(dual, rel=1e-12)
    assert_close(geometry.lmo(g), torch.from_numpy(np.asarray(lmo)).view(shape), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_the_minimiser_attains_the_dual_norm_on_the_unit_sphere(name, shape):
    geometry = GEOMETRIES[name][0]
    for seed in range(3):
        g = drawn(shape, seed)
        (minimiser,), (product,) = geometry.minimize([g])
        assert minimiser.shape == g.shape
        assert float(geometry.norm(minimiser)) == pytest.approx(1, rel=1e-12)
        assert float((g * minimiser).sum()) == pytest.approx(-float(geometry.dual_norm(g)), rel=1e-12)
        assert float(product) == pytest.approx(float(geometry.dual_norm(g)), rel=1e-12)


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "shape"), CASES)
def test_no_point_of_the_unit_ball_does_better(name, shape):
    geometry, g = GEOMETRIES[name][0], drawn(shape)
    dual = float(geometry.dual_norm(g))
    best = 0.0
    for seed in range(40):
        # Random ones, and ones around the minimiser, where a dual that is too small would show.
        x, lmo = drawn(shape, 1 + seed), geometry.lmo(g)
        x = x if seed % 2 else 0.05 * lmo.abs().mean() * x - lmo
        best = max(best, float((g * x).sum() / geometry.norm(x)))
    assert 0.8 * dual < best <= dual * (1 + 1e-12)


@pytest.mark.parametrize(("name", "geometry", "shape"), ALL)
def test_norms_are_norms(name, geometry, shape):
    for function in (geometry.norm, geometry.dual_norm):
        x, y = drawn(shape, 1), drawn(shape, 2)
        assert float(function(x + y)) <= float(function(x) + function(y)) * (1 + 1e-12)
        assert float(function(-3 * x)) == pytest.approx(3 * float(function(x)), rel=1e-12)


@pytest.mark.parametrize("zero", [torch.zeros, torch.empty])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "geometry", "shape"), [*ALL, ("newton_schulz", Spectral(), (3, 5))])
def test_zero_gradients_and_empty_ones(name, geometry, shape, dtype, zero):
    shape = shape if zero is torch.zeros else (0, *shape[1:])
    (minimiser,), (product,) = geometry.minimize([zero(shape, dtype=dtype)])
    assert_close(minimiser, torch.zeros(shape, dtype=dtype), rtol=0, atol=0)
    assert product == 0 == geometry.norm(minimiser) == geometry.dual_norm(minimiser)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "geometry", "shape"), ALL)
def test_dtypes_are_kept_and_scalars_are_wide(name, geometry, shape, dtype):
    g = drawn(shape, dtype=dtype)
    (minimiser,), (product,) = geometry.minimize([g])
    exact = geometry.minimize([g.double()])
    assert minimiser.dtype == dtype
    assert product.dtype == geometry.norm(g).dtype == geometry.dual_norm(g).dtype == torch.float32
    assert_close(minimiser, exact[0][0].to(dtype), rtol=0.02, atol=0.01)
    assert_close(product.double(), exact[1][0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e-10, 1e30])
@pytest.mark.parametrize(("name", "geometry", "shape"), [*ALL, ("newton_schulz", Spectral(), (3, 5))])
def test_the_minimiser_does_not_depend_on_the_scale(name, geometry, shape, scale):
    g = drawn(shape, dtype=torch.float32)
    (minimiser,), (product,) = geometry.minimize([g * scale])
    assert_close(minimiser, geometry.lmo(g), rtol=1e-4, atol=1e-5)
    assert float(product) == pytest.approx(scale * float(geometry.minimize([g])[1][0]), rel=1e-4)
    assert float(geometry.norm(g * scale)) == pytest.approx(scale * float(geometry.norm(g)), rel=1e-4)


@pytest.mark.parametrize(("name", "geometry", "shape"), ALL)
def test_gradients_that_are_not_finite_raise_nothing_and_stay_visible(name, geometry, shape):
    g = drawn(shape)
    g.view(-1)[0] = math.nan
    assert geometry.minimize([g])[1][0].isnan()
    assert geometry.lmo(g).isnan().any() or name.startswith("sign"), "torch.sign(nan) is 0"


def test_sums_over_many_entries_keep_their_digits():
    g = torch.full((2**23,), 0.1)
    g[0] = 1.0  # what the others are scaled by
    single = float(torch.tensor(0.1))
    length = (1 + single**2 * (2**23 - 1)) ** 0.5
    assert float(RMS().dual_norm(g)) == pytest.approx(2**11.5 * length, rel=1e-5)
    assert float(Sign().dual_norm(g)) == pytest.approx(1 + single * (2**23 - 1), rel=1e-5)


WRONG = [
    (Spectral(), (3,)), (Spectral(), (2, 3, 4)), (Convolution(), (3, 4)), (Row(), (3,)), (Column(), (2, 3, 4)),
    (Column(), (3,)), (Sign(per_input=True), (3,)), (ByShape(matrix=Convolution()), (3, 4)),
]  # fmt: skip


@pytest.mark.parametrize(("geometry", "shape"), WRONG)
def test_shapes_without_a_norm_are_refused(geometry, shape):
    for method in (geometry.norm, geometry.dual_norm, geometry.lmo):
        with pytest.raises(ValueError, match=r"Parameter `shape` should .* Found `torch.Size"):
            method(torch.ones(shape))


def rotated(values, seed=1):
    n = len(values)
    return torch.linalg.qr(drawn((n, n), seed))[0] * values @ torch.linalg.qr(drawn((n, n), seed + 1))[0]


# Each with the share of the nuclear norm that five steps reach.
SPECTRA = {
    "gaussian, square": (drawn((64, 64)), 0.77, 0.95),
    "gaussian, 4 to 1": (drawn((128, 32)), 0.77, 0.95),
    "gaussian, 1 to 8": (drawn((16, 128)), 0.77, 0.95),
    "values like 1/k": (rotated(torch.arange(1, 257, dtype=F64) ** -1.0), 0.77, 0.95),
    "low rank and noise": (drawn((64, 4), 3) @ drawn((4, 96), 4) + 0.1 * drawn((64, 96), 5), 0.77, 0.95),
    "rank one": (torch.outer(drawn((9,), 1), drawn((9,), 2)), 0.69, 0.71),
    "rank eight": (drawn((256, 8)) @ drawn((8, 256), 1), 1.05, 1.12),
    "orthogonal": (rotated(torch.ones(256, dtype=F64)), 1.05, 1.12),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_newton_schulz_reaches_the_stated_share_of_the_nuclear_norm(name):
    g, low, high = SPECTRA[name]
    assert low < float(Spectral().minimize([g])[1][0] / Spectral().dual_norm(g)) < high
    assert float(Spectral(exact=True).minimize([g])[1][0] / Spectral().dual_norm(g)) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SPECTRA)
def test_newton_schulz_keeps_the_singular_vectors_and_bounds_the_values(name, dtype):
    g = SPECTRA[name][0]
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    found = u.T @ newton_schulz(g.to(dtype)).double() @ vt.T
    off = found - found.diag().diag()
    reached = found.diag()[s / s.norm() > 0.002]
    rounding = 0.6 if name == "rank one" else 0.08
    assert off.abs().max() < (rounding if dtype == torch.bfloat16 else 1e-3)
    assert 0.66 < reached.min() <= found.diag().max() < 1.22


@pytest.mark.parametrize("geometry", [Spectral(), Convolution(), Convolution(transposed=True)])
def test_newton_schulz_is_the_polynomial_of_the_singular_values(geometry):
    g = drawn((12, 20) if isinstance(geometry, Spectral) else (12, 3, 2, 2))
    exact = type(geometry)(exact=True, **({"transposed": geometry.transposed} if g.dim() > 2 else {}))
    matrix = g if g.dim() == 2 else (g.transpose(0, 1) if geometry.transposed else g).flatten(1)
    s = torch.linalg.svdvals(matrix)
    scale = float(exact.dual_norm(g)) / float(s.sum())
    t = s / s.norm()
    for _ in range(5):
        t = 3.4445 * t - 4.7750 * t**3 + 2.0315 * t**5
    assert float(geometry.minimize([g])[1][0]) == pytest.approx(scale * float((s * t).sum()), rel=1e-10)


def test_matrices_of_equal_shapes_are_taken_together_and_come_back_in_order(monkeypatch):
    from smoothdiag.geometry import spectral

    gs = [drawn(s, i) for i, s in enumerate([(4, 6), (6, 4), (3, 3), (4, 6), (6, 4), (3, 3)])]
    batches = []
    real = spectral.newton_schulz
    monkeypatch.setattr(spectral, "newton_schulz", lambda m, *args: batches.append(m.shape) or real(m, *args))
    found, products = Spectral().minimize(gs)
    assert batches == [(4, 4, 6), (2, 3, 3)]
    monkeypatch.setattr(spectral, "_MAX_BATCH", 48)  # two of the larger ones
    halves, _ = Spectral().minimize(gs)
    assert batches[2:] == [(2, 4, 6), (2, 4, 6), (2, 3, 3)]
    monkeypatch.setattr(spectral, "_MAX_BATCH_ON_CPU", 24)
    Spectral().minimize(gs)
    assert batches[5:] == [(1, 4, 6)] * 4 + [(2, 3, 3)]
    for g, minimiser, other, product in zip(gs, found, halves, products, strict=True):
        assert_close(minimiser, Spectral().lmo(g), rtol=1e-10, atol=1e-12)
        assert_close(other, minimiser, rtol=1e-10, atol=1e-12)
        assert_close(product, -(minimiser * g).sum(), rtol=1e-10, atol=0)
        assert minimiser.is_contiguous()


def test_rank_deficient_matrices_keep_to_their_own_space():
    g = torch.outer(drawn((5,), 1), drawn((3,), 2))
    expected = -torch.outer(drawn((5,), 1), drawn((3,), 2)) / g.norm() * (5 / 3) ** 0.5
    assert_close(Spectral(exact=True).lmo(g), expected, rtol=1e-10, atol=1e-12)


def test_by_shape_takes_the_geometry_of_the_dimensions():
    gs = [drawn(s, i) for i, s in enumerate([(3,), (4, 6), (2, 3, 3, 3), (), (4, 6)])]
    inner = [RMS(), Spectral(), Convolution(), RMS(), Spectral()]
    found, products = ByShape().minimize(gs)
    for g, geometry, minimiser, product in zip(gs, inner, found, products, strict=True):
        assert_close(minimiser, geometry.lmo(g))
        assert_close(product, geometry.minimize([g])[1][0])
        assert_close(ByShape().norm(g), geometry.norm(g))
        assert_close(ByShape().dual_norm(g), geometry.dual_norm(g))


def test_product_is_the_largest_norm_and_the_sum_of_duals():
    layers, radii = (Spectral(exact=True), Sign(), RMS()), (2.0, 0.5, 3.0)
    product, g = Product(layers, radii), [drawn((3, 5)), drawn((4, 2)), drawn((7,))]
    minimiser = product.lmo(g)
    by_hand = sum(r * float(layer.dual_norm(t)) for layer, r, t in zip(layers, radii, g, strict=True))
    assert product.dual_norm(g).dtype == product.norm(g).dtype == F64
    assert float(product.dual_norm(g)) == pytest.approx(by_hand, rel=1e-14)
    assert float(product.norm(minimiser)) == pytest.approx(1, rel=1e-14)
    assert -float(sum((a * b).sum() for a, b in zip(g, minimiser, strict=True))) == pytest.approx(by_hand, rel=1e-12)
    assert float(product.norm(g)) == pytest.approx(
        max(float(layer.norm(t)) / r for layer, r, t in zip(layers, radii, g, strict=True)), rel=1e-14
    )
    assert Product(layers).radii == (1.0, 1.0, 1.0)
    assert hash(product) == hash(Product(layers, radii))


def test_product_of_wrong_sizes_is_refused():
    with pytest.raises(ValueError, match=r"Parameter `radii` should be 1 positive .* Found `radii = \(1.0, 2.0\)`"):
        Product((RMS(),), (1.0, 2.0))
    with pytest.raises(ValueError, match="Parameter `radii`"):
        Product((RMS(),), (0.0,))
    for method in (Product((RMS(),)).norm, Product((RMS(),)).dual_norm, Product((RMS(),)).lmo):
        with pytest.raises(ValueError, match=r"one for each layer. Found `len\(a\) = 2`"):
            method([torch.ones(1), torch.ones(1)])


def test_descriptions_name_what_is_not_default():
    assert describe(Spectral()) == "Spectral()"
    assert describe(Convolution(exact=True, steps=9)) == "Convolution(exact=True, steps=9)"
    assert describe(Euclidean()) == "Euclidean()"
    assert describe(ByShape(vector=Sign())) == "ByShape(vector=Sign(per_input=False))"
    assert pickle.loads(pickle.dumps(Spectral(exact=True))) == Spectral(exact=True)
