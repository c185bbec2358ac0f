"""vectors: arithmetic on lists of tensors accumulates in float64 and leaves pending graphs valid."""

import pytest
import torch

from smoothdiag import Euclidean, vectors


def test_norm_and_dot_accumulate_in_float64() -> None:
    # 2^24 + 1 ones: a float32 sum would stop at 2^24.
    a = [torch.ones(2**24 // 1024, 1024), torch.ones(1)]
    assert float(vectors.dot(a, a)) == 2**24 + 1
    assert float(vectors.norm([torch.ones(2**25)])) == pytest.approx(2**12.5, rel=1e-7)
    assert float(vectors.norm([torch.ones(1001)])) == pytest.approx(1001**0.5, rel=1e-14)


def test_norm_of_bfloat16_is_not_rounded_to_eight_bits() -> None:
    a = [torch.ones(1001, dtype=torch.bfloat16)]
    assert float(vectors.norm(a)) == pytest.approx(1001**0.5, rel=1e-14)
    assert float(vectors.dot(a, a)) == 1001


def test_differences_of_bfloat16_are_exact() -> None:
    a, b = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([2.0**-9], dtype=torch.bfloat16)
    (difference,) = vectors.sub([a], [b])
    assert float(difference) == 1 - 2.0**-9


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="shorter"):
        vectors.sub([torch.ones(1)], [])


def test_assignment_keeps_pending_graphs_valid() -> None:
    x = torch.tensor([3.0], requires_grad=True)
    y = x.square()
    vectors.assign_([x], [torch.tensor([5.0])])
    vectors.assign_([x], [torch.tensor([3.0])])
    y.backward()
    assert float(x.grad) == 6.0


def test_euclidean_is_its_own_dual() -> None:
    g = [torch.randn(3, 2, dtype=torch.float64), torch.randn(4, dtype=torch.float64)]
    geometry = Euclidean()
    minimiser = geometry.lmo(g)
    assert float(geometry.norm(minimiser)) == pytest.approx(1, rel=1e-14)
    assert float(vectors.dot(g, minimiser)) == pytest.approx(-float(geometry.dual_norm(g)), rel=1e-14)


def test_minimiser_of_zero_is_zero() -> None:
    (minimiser,) = Euclidean().lmo([torch.zeros(3)])
    assert torch.equal(minimiser, torch.zeros(3))


@pytest.mark.parametrize("size", [vectors.NO_ROWS, vectors.CHUNK + 5, 2 * vectors.CHUNK + 300])
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25, 0.0])
def test_squares_on_a_cpu_are_those_of_float64(size: int, scale: float) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(size)) * scale
    for strided in (x, x.repeat_interleave(2)[::2]):
        (found,) = vectors.squares([strided])
        # Within float32, rows of it are added up; beyond it, float64 takes all.
        assert float(found) == pytest.approx(float(x.double().square().sum()), rel=1e-7 if scale == 1 else 1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_squares_on_a_cpu_pass_on_what_is_not_finite(value: float) -> None:
    x = torch.ones(vectors.NO_ROWS)
    x[77] = value
    assert str(float(vectors.squares([x])[0])) == str(abs(value))


def test_distance_is_that_of_the_quotients() -> None:
    a, b = [torch.randn(300, 2), torch.randn(5)], [torch.randn(300, 2), torch.randn(5)]
    wanted = sum((x.double() / 2 - y.double() / 3).square().sum() for x, y in zip(a, b, strict=True)).sqrt()
    assert float(vectors.distance(a, b, over=(2.0, 3.0))) == pytest.approx(float(wanted), rel=1e-6)
