"""measure.loss.calls: the loss in what a model returns, and calls that are repeated."""

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from smoothdiag import returned_loss
from smoothdiag.measure.loss.batches import lasting
from smoothdiag.measure.loss.calls import Call, loss_in

LOSS = torch.tensor(3.0)
GRAPH = torch.tensor(4.0, requires_grad=True) * 2
Named = namedtuple("Named", "logits, loss")


@pytest.mark.parametrize(
    "found",
    [
        LOSS,
        SimpleNamespace(loss=LOSS, other=torch.tensor(1.0)),
        {"other": torch.tensor(1.0), "loss": LOSS},
        Named(torch.tensor(1.0), LOSS),
        (torch.zeros(2, 3), LOSS),
        [LOSS, torch.tensor(5.0)],
        (torch.tensor([[7.0]]), LOSS),  # logits of one example
        (torch.tensor(7), LOSS),  # a count
        (None, "text", LOSS),
    ],
)
def test_the_loss_is_found(found) -> None:
    assert loss_in(found) is LOSS


def test_a_number_without_graph_is_not_taken_for_the_loss() -> None:
    assert loss_in((torch.tensor(0.9), GRAPH)) is GRAPH
    one = torch.zeros(1, requires_grad=True) * 1
    assert loss_in((torch.tensor(0.9), one)) is one


@pytest.mark.parametrize(
    ("found", "shown"),
    [
        (torch.zeros(2, 3), r"a Tensor of shape \(2, 3\) in float32"),
        (torch.tensor(3), r"a Tensor of shape \(\) in int64"),
        ((torch.zeros(2), None), r"tuple\(a Tensor of shape \(2,\) in float32, None\)"),
        (
            {"loss": torch.zeros(2), "n": 1},
            r"dict\(loss: a Tensor of shape \(2,\) in float32, n: an object of type int",
        ),
        (SimpleNamespace(loss=None), "an object of type SimpleNamespace"),
        (SimpleNamespace(loss=torch.zeros(4)), "an object of type SimpleNamespace"),
        (None, "Found None"),
    ],
)
def test_a_missing_loss_is_an_error_that_says_what_was_found(found, shown) -> None:
    model = nn.Identity()
    with pytest.raises(ValueError, match=rf"(?s)Parameter `loss_fn` is needed, because the model returned .*{shown}"):
        returned_loss(model, {"input": found})


def test_batches_become_arguments() -> None:
    class Model(nn.Module):
        def forward(self, a: Tensor, b: float = 1.0) -> Tensor:
            return a - 10 * b

    one, two = torch.tensor(1.0), torch.tensor(2.0)
    assert [returned_loss(Model(), batch) for batch in (one, (one, two), [one, two], {"b": one, "a": two})] == [
        *(-9, -19, -19, -8)
    ]


def test_a_call_is_repeated_under_its_autocast() -> None:
    model = nn.Linear(2, 1)
    x = torch.ones(1, 2)
    calls = [Call.of((x,), {})]
    with torch.autocast("cpu", torch.bfloat16):
        calls.append(Call.of((x,), {}))
        assert returned_loss(model, calls[0]).dtype == torch.float32
        assert returned_loss(model, calls[1]).dtype == torch.bfloat16
    assert [returned_loss(model, call).dtype for call in calls] == [torch.float32, torch.bfloat16]


def test_a_repeated_call_starts_from_the_objects_that_the_loop_passed() -> None:
    class Cache:
        def __init__(self) -> None:
            self.seen: list[Tensor] = []

    class Model(nn.Module):
        def forward(self, x: Tensor, cache: Cache, options: dict, scale) -> Tensor:
            cache.seen.append(x)
            return scale(x) * len(cache.seen) * options.pop("factor")

    model, cache, options = Model(), Cache(), {"factor": 3}
    call = Call.of((torch.tensor(2.0), cache), {"options": options, "scale": lambda x: 5 * x})
    kept = lasting(call)
    assert model(torch.tensor(2.0), cache, options, lambda x: x) == 6
    assert [returned_loss(model, c).item() for c in (call, call, kept, kept)] == [30, 30, 30, 30]
    assert len(cache.seen) == 1
    assert kept.factor is call.factor


def test_modules_among_the_arguments_are_not_copied() -> None:
    teacher = nn.Linear(1, 1)
    holder, lock = SimpleNamespace(net=teacher), torch.Generator()
    call = Call.of((teacher,), {"holder": holder, "lock": lock})
    assert call.args[0] is teacher
    assert call.kwargs["holder"] is holder
