"""measure.loss.batches: every kind of batch that a loop can train on can be measured."""

import warnings
from collections import ChainMap, OrderedDict, namedtuple
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smoothdiag import Probe, every


class ReadOnly(Mapping[str, Tensor]):
    """A mapping that nobody can write to, nor make anew."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self._held = {"x": x, "y": y}

    def __getitem__(self, name: str) -> Tensor:
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


class Frozen(dict[str, Tensor]):
    """A dictionary that refuses to be written to."""

    def __setitem__(self, name: str, value: Tensor) -> None:
        raise TypeError("frozen")


class PairList(list[Tensor]):
    """A list with a constructor of its own."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__([x, y])


class PairTuple(tuple[Tensor, Tensor]):
    """A tuple with a constructor of its own."""

    def __new__(cls, x: Tensor, y: Tensor) -> "PairTuple":
        return super().__new__(cls, (x, y))


class Named(namedtuple("Named", "x y")):
    """A named tuple with a constructor of its own."""

    def __new__(cls, *, x: Tensor, y: Tensor) -> "Named":
        return super().__new__(cls, x, y)


def _inferred(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    with torch.inference_mode():
        return {"x": x, "y": y, "feature": x.mean() * 1.0}


KINDS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "dictionary": lambda x, y: {"x": x, "y": y},
    "ordered dictionary": lambda x, y: OrderedDict(x=x, y=y),
    "view of a dictionary": lambda x, y: MappingProxyType({"x": x, "y": y}),
    "frozen dictionary": lambda x, y: Frozen(x=x, y=y),
    "read-only mapping": ReadOnly,
    "chain of dictionaries": lambda x, y: ChainMap({"x": x}, {"y": y}),
    "list of a class": PairList,
    "tuple of a class": PairTuple,
    "named tuple of a class": lambda x, y: Named(x=x, y=y),
    "shape beside it": lambda x, y: (x, y, x.shape),
    "what torch returns": lambda x, y: (x, y, y.max(0)),
    "nested tensor beside it": lambda x, y: (x, y, torch.nested.nested_tensor([x[:2], x[2:]])),
    "made in inference mode": _inferred,
}


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    x, y = (batch["x"], batch["y"]) if isinstance(batch, Mapping) else batch[:2]
    return F.mse_loss(model(x), y)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data", ["fixed", "step"])
@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_a_batch_is_the_same_when_it_is_measured(kind, data) -> None:
    seen = set[type]()

    def watched(model: nn.Module, batch: Any) -> Tensor:
        seen.add(type(batch))
        return loss_fn(model, batch)

    torch.manual_seed(0)
    model = nn.Linear(6, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = Probe(model, optimizer, watched, schedule=every(1), data=data)
    for _ in range(2):
        batch = KINDS[kind](torch.randn(8, 6), torch.randn(8, 1))
        probe.observe(batch)
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()
        assert seen == {dict if kind == "read-only mapping" else type(batch)}
    assert {row["status"] for row in probe.trace} <= {"ok", "saturated"}
