"""packing: pieces give back every tensor bit for bit, and square each one as float64 does."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from smoothdiag.packing import JOINED, SMALL, Kept, Packing, dtypes_of

LARGE = SMALL + 11


def mixed(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Returns small and large tensors, strided in every way, empty ones and numbers."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return [
        draw(3, 5),
        draw(2, LARGE),
        draw(),
        draw(7, 4).t(),
        draw(2, 3, 4, 5).to(memory_format=torch.channels_last),
        draw(0),
        draw(8, 16, 16, 16).to(memory_format=torch.channels_last),
        draw(LARGE, 2).t(),
        draw(6)[::2],
        draw(5, 0, 2),
        draw(SMALL),
        draw(SMALL - 1),
    ]


CASES = {
    "mixed": mixed,
    "two dtypes": lambda: [*mixed(), *mixed(torch.bfloat16), *mixed(torch.float64)],
    "one number": lambda: [torch.tensor(-2.5)],
    "one small tensor": lambda: [torch.arange(6.0).view(2, 3).t()],
    "one small tensor of a dtype": lambda: [torch.arange(6.0), torch.arange(4.0).bfloat16()],
    "one large tensor": lambda: [torch.arange(float(LARGE))],
    "nothing in it": lambda: [torch.empty(0), torch.empty(3, 0)],
    "more than one join holds": lambda: [torch.full((SMALL - 1,), float(i)) for i in range(2 + JOINED // SMALL)],
}


def bits(x: Tensor) -> bytes:
    return x.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def marked(tensors: list[Tensor]) -> list[Tensor]:
    """Puts NaN, inf and -0.0 into every tensor that has room."""
    for x in tensors:
        if x.dim() == 1 and len(x) > 4:
            x[0], x[2], x[3] = math.nan, -math.inf, -0.0
    return tensors


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_lies_in_one_piece_of_its_dtype(name: str) -> None:
    tensors = CASES[name]()
    packing = Packing(tensors)
    assert sorted(i for piece in packing.pieces for i in piece.indices) == list(range(len(tensors)))
    for k, piece in enumerate(packing.pieces):
        assert len({tensors[i].dtype for i in piece.indices}) == 1
        assert piece.is_joined == all(tensors[i].numel() < SMALL for i in piece.indices)
        assert piece.is_joined or len(piece.indices) == 1
        assert sum(piece.sizes) < JOINED + SMALL or not piece.is_joined
        assert [packing.place[i] for i in piece.indices] == [(k, j) for j in range(len(piece.indices))]
    if name == "more than one join holds":
        assert len(packing.pieces) == 2


@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_what_is_kept_comes_back_bit_for_bit(name: str, host: bool) -> None:
    tensors = marked(CASES[name]())
    before, strides = [bits(x) for x in tensors], [x.stride() for x in tensors]
    packing = Packing(tensors)
    kept = packing.keep(tensors, host=packing.host_memory() if host else None)
    for x in tensors:
        x.fill_(7)
    for x, like in zip(kept, marked(CASES[name]()), strict=True):
        torch.testing.assert_close(x.to(like.dtype), like, rtol=0, atol=0, equal_nan=True)
    kept.restore(tensors)
    assert [bits(x) for x in tensors] == before
    assert [x.stride() for x in tensors] == strides
    assert dtypes_of(kept) == dtypes_of(list(kept)) == {x.dtype for x in kept}
    assert torch.bfloat16 not in dtypes_of(kept)


@pytest.mark.parametrize("name", CASES)
def test_scattered_piece_is_the_piece(name: str) -> None:
    tensors = CASES[name]()
    targets = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in tensors]
    packing = Packing(targets)
    wanted = [x.flip(list(range(x.dim()))) for x in tensors]
    for _ in range(2):  # the second time, buffers are there already
        for x in targets:
            x.detach().zero_()
        versions = [x._version for x in targets]
        for k, piece in enumerate(packing.pieces):
            piece.scatter(packing.piece(k, wanted), packing.take(k, targets))
        assert [bits(x) for x in targets] == [bits(x) for x in wanted]
        assert [x._version for x in targets] == versions  # hidden from autograd
        wanted = [2 * x for x in wanted]


def test_a_piece_that_is_its_own_target_stays_as_it_is() -> None:
    tensors = mixed()
    before = [bits(x) for x in tensors]
    packing = Packing(tensors)
    for k, piece in enumerate(packing.pieces):
        piece.scatter(packing.piece(k, tensors), packing.take(k, tensors))
    assert [bits(x) for x in tensors] == before


def test_kept_vector_is_a_sequence() -> None:
    tensors = mixed()
    kept = Packing(tensors).keep(tensors)
    assert isinstance(kept, Kept)
    assert len(kept) == len(tensors) == len(list(kept))
    assert torch.equal(kept[-1], tensors[-1])
    assert torch.equal(kept[-len(tensors)], tensors[0])
    for part in (slice(None), slice(2, 5), slice(None, None, -1), slice(-3, None, 2), slice(4, 4)):
        assert [bits(x) for x in kept[part]] == [bits(x) for x in tensors[part]]
    for index in (len(tensors), -len(tensors) - 1):
        with pytest.raises(IndexError):
            kept[index]
    assert [x.shape for x in reversed(kept)] == [x.shape for x in reversed(tensors)]


def test_only_large_tensors_are_lent() -> None:
    tensors = mixed()
    packing = Packing(tensors)
    lent = packing.keep(tensors, lends=lambda x: x.shape != (SMALL,), host=packing.host_memory())
    for x in tensors:
        x.fill_(7)
    for x, like in zip(lent, mixed(), strict=True):
        is_lent = like.numel() > SMALL
        assert bits(x) == bits(torch.full_like(like, 7) if is_lent else like)


def test_host_memory_is_used_again_and_not_more() -> None:
    tensors = mixed(torch.bfloat16)
    packing = Packing(tensors)
    host = packing.host_memory()
    addresses = [x.data_ptr() for x in host]
    packing.keep(tensors, host=host)
    assert [x.data_ptr() for x in host] == addresses
    assert sum(x.numel() * x.element_size() for x in host) == sum(2 * x.numel() for x in tensors)


def test_packing_fits_the_same_parameters_alone() -> None:
    tensors = mixed()
    packing = Packing(tensors)
    assert packing.fits(tensors)
    assert not packing.fits(tensors[:-1])
    assert not packing.fits([*tensors[:-1], tensors[-1].clone()])
    tensors[0].data = tensors[0].data.double()
    assert not packing.fits(tensors)


@pytest.mark.parametrize("name", CASES)
def test_squares_are_those_of_float64(name: str) -> None:
    tensors = CASES[name]()
    packing = Packing(tensors)
    found = np.full((2, len(tensors)), math.nan)
    for k, piece in enumerate(packing.pieces):
        both = piece.squares(lambda x: [x.float(), 3 * x.float()], packing.piece(k, tensors))
        for row, sums in zip(found, both, strict=True):
            assert sums.dtype == torch.float64
            row[list(piece.indices)] = sums.numpy()
    for i, x in enumerate(tensors):
        exact = [float((factor * x.float()).double().square().sum()) for factor in (1, 3)]
        np.testing.assert_allclose(found[:, i], exact, rtol=1e-13, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_wrong_number_spoils_its_own_tensor_only(value: float) -> None:
    for spoiled in (0, 1, 2, 6, 11):
        tensors = mixed()
        tensors[spoiled][(*(-1 for _ in tensors[spoiled].shape),)] = value
        packing = Packing(tensors)
        found = np.zeros(len(tensors))
        for k, piece in enumerate(packing.pieces):
            (sums,) = piece.squares(lambda x: [x], packing.piece(k, tensors))
            found[list(piece.indices)] = sums.numpy()
        assert [i for i, x in enumerate(found) if not math.isfinite(x)] == [spoiled]
        assert math.isnan(found[spoiled]) == math.isnan(value)
