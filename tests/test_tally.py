"""tally: sums of many tensors are read at once, and only once."""

import math
import sys

import numpy as np
import pytest
import torch
from places import REPOSITORY
from torch import Tensor

from smoothdiag.packing import SMALL, Packing
from smoothdiag.tally import Tally

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
from overhead.counting import Waits


def vector(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 4), (SMALL,), (), (5,), (2, SMALL), (0,), (7,)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def filled(a: list[Tensor], b: list[Tensor]) -> Tally:
    """Returns a tally of the squares of a - b and of b, and of two numbers."""
    tally = Tally(Packing(a))
    for k in reversed(range(len(tally.packing.pieces))):  # as gradients arrive, last layers first
        pieces = tally.packing.piece(k, a), tally.packing.piece(k, b)
        tally.squares(k, ["apart", "there"], lambda x, y: [x - y, y], *pieces)
    tally.number("loss", torch.tensor(0.1, dtype=torch.float64))
    tally.number("other", torch.tensor(-3.0))
    return tally


def test_sums_by_tensor_are_those_of_float64() -> None:
    a, b = vector(0), vector(1)
    read = filled(a, b).read()
    for name, exact in (("apart", [x - y for x, y in zip(a, b, strict=True)]), ("there", b)):
        np.testing.assert_allclose(read[name], [float(x.double().square().sum()) for x in exact], rtol=1e-13)
    assert read["loss"].tolist() == [0.1]
    assert read["other"].tolist() == [-3.0]


def test_totals_of_blocks_add_up() -> None:
    tally = filled(vector(0), vector(1))
    sums = tally.read()["apart"]
    assert tally.total("apart", [1, 4]) == sums[1] + sums[4]
    assert tally.total("apart", iter([2])) == sums[2]
    assert tally.total("apart", []) == 0
    assert tally.total("apart") == pytest.approx(tally.total("apart", range(3)) + tally.total("apart", range(3, 7)))
    assert tally.total("loss") == 0.1


def test_repeated_sums_of_a_piece_add_up() -> None:
    a = vector(0)
    once, twice = Tally(Packing(a)), Tally(Packing(a))
    for tally, times in ((once, 1), (twice, 3)):
        for _ in range(times):
            for k in range(len(tally.packing.pieces)):
                tally.squares(k, ["sum"], lambda x: [x], tally.packing.piece(k, a))
    np.testing.assert_allclose(twice.read()["sum"], 3 * once.read()["sum"], rtol=1e-15)


def test_everything_is_read_at_once_and_never_again() -> None:
    tally = filled(vector(0), vector(1))
    with Waits() as waits:
        first = tally.read()
        assert tally.read() is first
        for name in ("apart", "there", "loss"):
            tally.total(name)
    assert waits.reads == {next(iter(waits.reads)): 1}
    with pytest.raises(AssertionError):
        tally.number("late", torch.tensor(0.0))
    with pytest.raises(AssertionError):
        tally.add("late", 0, torch.zeros(1))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_wrong_numbers_stay_with_their_tensor(value: float) -> None:
    a = vector(0)
    a[3][1] = value
    tally = Tally(Packing(a))
    for k in range(len(tally.packing.pieces)):
        tally.squares(k, ["sum"], lambda x: [x], tally.packing.piece(k, a))
    assert not math.isfinite(tally.total("sum"))
    assert not math.isfinite(tally.total("sum", [3]))
    assert math.isfinite(tally.total("sum", [0, 1, 2, 4, 5, 6]))


def test_pieces_that_got_no_sums_count_as_zero() -> None:
    a = vector(0)
    tally = Tally(Packing(a))
    k = tally.packing.place[4][0]
    tally.squares(k, ["sum"], lambda x: [x], tally.packing.piece(k, a))
    assert np.flatnonzero(tally.read()["sum"]).tolist() == [4]
