"""geometry.parts: each part has its own geometry, and as a whole the parts have that of the first."""

import pytest
import torch

from smoothdiag.geometry import RMS, Euclidean, Part, Parts, Product, Sign


def test_a_part_sees_its_tensors_and_the_whole_is_the_first_part() -> None:
    x = [torch.tensor([3.0, -4.0]), torch.tensor([7.0]), torch.tensor([1.0, 2.0])]
    first, second = Part("a", (0, 2), Product((Sign(), RMS()), (2.0, 1.0))), Part("b", (1,), Euclidean())
    parts = Parts((first, second))
    assert parts.parts[1].norm(x) == 7
    assert parts.parts[1].dual_norm(x) == 7
    mean_square = (5 / 2) ** 0.5
    assert float(parts.norm(x)) == first.norm(x) == pytest.approx(max(4 / 2, mean_square))
    assert float(parts.dual_norm(x)) == first.dual_norm(x) == pytest.approx(2 * 7 + 2 * mean_square)
    minimiser = parts.lmo(x)
    assert torch.equal(minimiser[0], torch.tensor([-2.0, 2.0]))
    assert torch.equal(minimiser[1], torch.zeros(1)), "nothing outside the first part moves"
    assert float(sum((a * b).sum() for a, b in zip(x, minimiser, strict=True))) == pytest.approx(-first.dual_norm(x))
