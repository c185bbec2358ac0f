"""measure.probe.host: host memory for the ends of a step changes neither rows nor training."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from asserts import assert_identical, state_of
from losses import classification
from networks import Convolutional, Sparse, images, mlp, texts
from torch import Tensor, nn

from smoothdiag import AutoClip, CriticalStep, HessianNorm, LocalSmoothness, PathSmoothness, Probe, every
from smoothdiag.measure.probe.host import HostMemory
from smoothdiag.packing import SMALL, Packing

WIDTH = 136
"""Width of a square layer that is a piece of its own."""


def wide() -> nn.Module:
    return mlp(8, WIDTH, WIDTH, 5)


def vectors(num: int, size: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(size, 8), torch.randint(5, (size,))) for _ in range(num)]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def sparse_adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SparseAdam(list(model.embed.parameters()) + list(model.again.parameters()), lr=1e-2)


def halves(num: int, size: int) -> list[tuple[Tensor, Tensor]]:
    return [(x.bfloat16(), y) for x, y in vectors(num, size)]


def train(
    offload: str | None,
    build: Callable[[], nn.Module] = wide,
    draw: Callable[[int, int], list[Any]] = vectors,
    make: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
    accumulate: int = 1,
    half: bool = False,
    clips: bool = False,
    probed: bool = True,
    **options: Any,
) -> tuple[list[str], dict[str, Any]]:
    """Returns the rows without their cost, and everything that training left."""
    torch.manual_seed(0)
    model = build().bfloat16() if half else build()
    optimizer = make(model)
    probe = Probe(model, optimizer, classification, schedule=every(1), offload=offload, **options) if probed else None
    if probe is not None and clips:
        AutoClip(optimizer, probe)
    for _ in range(2):
        optimizer.zero_grad()
        for batch in draw(accumulate, 6):
            if probe is not None:
                probe.observe(batch)
            (classification(model, batch) / accumulate).backward()
        optimizer.step()
    for p in model.parameters():
        p.grad = None if p.grad is None else p.grad.to_dense()  # sparse ones cannot be compared
    rows = [] if probe is None else [{k: v for k, v in row.items() if k != "seconds"} for row in probe.trace]
    return list(map(repr, rows)), state_of(model, optimizer)


CASES: dict[str, Callable[..., Any]] = {
    "sgd": train,
    "adamw": partial(train, make=adamw),
    "bfloat16": partial(train, draw=halves, half=True),
    "accumulation": partial(train, make=adamw, accumulate=3),
    "groups": partial(train, make=adamw, group_by=lambda name: name.split(".")[0]),
    "batch norm, dropout": partial(train, build=Convolutional, draw=images),
    "sparse": partial(train, build=Sparse, draw=texts, make=sparse_adam),
    "the step's own batch": partial(train, data="step"),
    "products, other ends": partial(
        train, estimators=[HessianNorm(max_products=3), CriticalStep(), LocalSmoothness(direction="random")]
    ),
}


@pytest.mark.filterwarnings("ignore::smoothdiag.SmoothdiagWarning")
@pytest.mark.parametrize("name", CASES)
def test_rows_and_training_are_the_same(name: str) -> None:
    rows, state = CASES[name]("cpu")
    others, expected = CASES[name](None)
    assert rows
    assert rows == others
    assert_identical(state, expected)
    assert_identical(state, CASES[name](None, probed=False)[1])


@pytest.mark.parametrize("make", [sgd, adamw])
def test_rows_and_clipping_beside_an_autoclip_are_the_same(make: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
    rows, state = train("cpu", make=make, clips=True, estimators=[PathSmoothness()])
    others, expected = train(None, make=make, clips=True, estimators=[PathSmoothness()])
    assert rows == others
    assert any("local_clip" in row for row in rows)
    assert_identical(state, expected)


def test_both_ends_lie_in_memory_of_their_own_that_is_made_once() -> None:
    parameters = [torch.randn(SMALL), torch.randn(3), torch.randn(2, 2)]
    packing, host = Packing(parameters), HostMemory("cpu")
    start, end = host.start(packing), host.end(packing)
    places = [x.data_ptr() for x in (*start, *end)]
    assert len(set(places)) == 4
    assert [x.data_ptr() for x in (*host.start(packing), *host.end(packing))] == places
    other = Packing(parameters[:1])
    assert [x.shape for x in host.end(other)] == [(SMALL,)]
    assert HostMemory(None).start(packing) is HostMemory(None).end(packing) is None


@pytest.mark.parametrize("value", ["cuda", "disk", True, 1])
def test_wrong_places_are_refused(value: Any) -> None:
    model = wide()
    with pytest.raises(ValueError, match=r"Parameter `offload` should be .*cpu.*Found `offload = "):
        Probe(model, sgd(model), classification, offload=value)
