"""measure.loss.bookkeeping: attributes of an object are what they were before a loss was evaluated again."""

from collections import OrderedDict, defaultdict, deque
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from smoothdiag import Trace
from smoothdiag.integrations.latest import Latest
from smoothdiag.measure.loss.bookkeeping import MOST, Books
from smoothdiag.rows import CLIP_SUFFIX


def unrecorded(owner: Any) -> AbstractContextManager[None]:
    return Books(owner).reopened()


def keeper() -> SimpleNamespace:
    metrics: dict[str, Any] = {"train": defaultdict(list), "loss": torch.tensor(1.0)}
    metrics["train"]["entropy"].append(1.0)
    return SimpleNamespace(count=3, seen=[1, 2], metrics=metrics, total=torch.zeros(2), model=torch.nn.Linear(2, 2))


def test_numbers_entries_appended_values_and_sums_are_put_back() -> None:
    owner = keeper()
    objects = dict(vars(owner)), owner.metrics["train"], owner.metrics["train"]["entropy"], owner.metrics["loss"]
    with unrecorded(owner):
        owner.count += 1
        owner.late = "new"
        owner.seen.append(3)
        owner.metrics["train"]["entropy"].append(2.0)
        owner.metrics["train"]["accuracy"].append(0.5)
        owner.metrics["train"]["entropy"] = [5.0]
        owner.metrics["loss"] += 1
        owner.metrics["eval"] = {}
        owner.total += 1
        owner.total = owner.total + 1
    expected = keeper()
    assert owner.count == 3
    assert owner.seen == [1, 2]
    assert not hasattr(owner, "late")
    assert owner.metrics == expected.metrics
    assert owner.total.tolist() == [0, 0]
    # The same objects, as others may hold them too.
    assert vars(owner) == objects[0]
    assert owner.metrics["train"] is objects[1]
    assert owner.metrics["train"]["entropy"] is objects[2]
    assert owner.metrics["loss"] is objects[3]


def test_within_it_all_is_as_it_was() -> None:
    owner = keeper()
    owner.recent, owner.model = deque([1], maxlen=1), Counted()
    books = Books(owner)
    old = owner.metrics["train"]
    owner.count += 1
    owner.seen[0] = 5
    owner.total += 1
    owner.recent.append(2)
    old["entropy"].append(2.0)
    owner.metrics["train"] = defaultdict(list, entropy=[3.0])
    owner.model(torch.ones(2))
    for _ in range(2):
        with books.reopened():
            assert owner.count == 3
            assert owner.seen == [1, 2]
            assert owner.total.tolist() == [0, 0]
            assert list(owner.recent) == [1]
            assert owner.metrics["train"] is old
            assert old["entropy"] == [1.0]
            assert owner.model.num_calls == 0
            assert owner.model.temperature.tolist() == [1, 1]
            owner.total += 2
            old["entropy"].append(4.0)
            owner.model(torch.ones(2))
        assert owner.count == 4
        assert owner.seen == [5, 2]
        assert owner.total.tolist() == [1, 1]
        assert list(owner.recent) == [2]
        assert owner.metrics["train"] == {"entropy": [3.0]}
        assert old["entropy"] == [1.0, 2.0]
        assert owner.model.num_calls == 1
        assert owner.model.temperature.tolist() == [0.5, 0.5]


def test_it_is_put_back_after_an_error() -> None:
    owner = keeper()
    try:
        with unrecorded(owner):
            owner.count += 1
            raise KeyError
    except KeyError:
        assert owner.count == 3


def test_modules_of_torch_and_parameters_are_left_alone() -> None:
    owner = keeper()
    owner.weight = owner.model.weight
    others = {"frozen": nn.Parameter(torch.ones(2), requires_grad=False), "free": torch.ones(2, requires_grad=True)}
    owner.others = dict(others)
    with unrecorded(owner):
        assert all(owner.others[name] is tensor for name, tensor in others.items())
        owner.model.register_buffer("mean", torch.ones(1))
        with torch.no_grad():
            owner.weight.zero_()
    assert owner.model.mean == 1
    assert not owner.weight.any()


class Counted(nn.Module):
    """Keeps books and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(2))
        self.num_calls, self.temperature = 0, torch.ones(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        self.temperature *= 0.5
        self.center += 1
        return x / self.temperature


def test_modules_within_are_put_back_but_for_buffers() -> None:
    owner = keeper()
    owner.model, owner.others = nn.Sequential(nn.Linear(2, 2), Counted()), {"teacher": Counted()}
    inner, teacher = owner.model[1], owner.others["teacher"]
    buffer = inner.center
    with unrecorded(owner):
        owner.model(torch.ones(2))
        teacher(torch.ones(2))
    for part in (inner, teacher):
        assert part.num_calls == 0
        assert part.temperature.tolist() == [1, 1]
        assert part.center.tolist() == [1, 1]
    assert inner.center is buffer


def test_a_graph_may_hold_what_is_put_back() -> None:
    owner = Counted()
    owner.weight = torch.tensor([2.0, 4.0])
    x = torch.ones(2, requires_grad=True)
    with unrecorded(owner):
        loss = (owner.weight * owner(x)).sum()
    loss.backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2 / 0.5, 4 / 0.5]
    assert owner.temperature.tolist() == [1, 1]


class Output(OrderedDict):
    """As outputs of transformers: nothing may be taken out."""

    def update(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    __delitem__ = update


def test_dictionaries_of_one_s_own_are_not_written_to_without_need() -> None:
    owner = SimpleNamespace(last=Output(loss=torch.tensor(1.0), logits=[]))
    first, kept = owner.last, owner.last["loss"]
    with unrecorded(owner):
        owner.last["loss"] += 1
        owner.last = Output(loss=torch.tensor(3.0))
    assert owner.last is first
    assert owner.last["loss"] is kept
    assert kept == 1


class Frozen(dict):
    """As configurations that are not to be changed."""

    def __setitem__(self, key: Any, value: Any) -> None:
        raise NotImplementedError


def test_dictionaries_that_do_not_change_are_not_written_to() -> None:
    owner = SimpleNamespace(config=Frozen(rate=0.1))
    with unrecorded(owner):
        pass
    assert owner.config == {"rate": 0.1}


def test_sets_and_queues_are_put_back() -> None:
    owner = SimpleNamespace(recent=deque([1, 2], maxlen=2), seen={1, 2})
    objects = owner.recent, owner.seen
    with unrecorded(owner):
        owner.recent.append(3)
        owner.seen.add(3)
        owner.seen.remove(1)
    assert owner.recent == deque([1, 2])
    assert owner.seen == {1, 2}
    assert owner.recent is objects[0]
    assert owner.seen is objects[1]


def test_what_was_empty_or_is_emptied_is_put_back() -> None:
    owner = SimpleNamespace(hooks={}, notes=[], table={"a": 1}, seen=[1])
    with unrecorded(owner):
        owner.hooks["new"] = 1
        owner.notes.append(1)
        owner.table.clear()
        owner.seen.clear()
    assert (owner.hooks, owner.notes, owner.table, owner.seen) == ({}, [], {"a": 1}, [1])


def test_sums_in_a_list_are_copies_within() -> None:
    owner = SimpleNamespace(sums=[torch.zeros(2), None])
    (kept, _) = owner.sums
    with unrecorded(owner):
        owner.sums[0] += 1
    assert owner.sums[0] is kept
    assert kept.tolist() == [0, 0]


def test_a_tensor_that_is_kept_twice_is_one_within() -> None:
    owner = keeper()
    owner.metrics["total"] = owner.total
    with unrecorded(owner):
        owner.total += 1
        assert owner.metrics["total"].tolist() == [1, 1]
        assert owner.metrics["total"] is owner.total
    assert owner.metrics["total"] is owner.total
    assert owner.total.tolist() == [0, 0]


def test_large_tables_are_not_searched() -> None:
    table = {number: [] for number in range(MOST + 1)}
    owner = SimpleNamespace(table=table)
    with unrecorded(owner):
        table[0].append(1)
        table[-1] = []
    assert table[0] == [1]
    assert len(table) == MOST + 1


def test_a_dictionary_that_holds_itself_ends() -> None:
    owner = keeper()
    owner.metrics["self"] = owner.metrics
    with unrecorded(owner):
        owner.metrics["late"] = 1
    assert "late" not in owner.metrics


def test_latest_values_are_those_of_usable_rows_of_the_probe() -> None:
    trace = Trace()
    latest = Latest(trace, None)
    for estimator, status in (("local", "ok"), ("path", "non_finite"), ("local" + CLIP_SUFFIX, "ok")):
        trace.append({"step": 0, "estimator": estimator, "status": status, "grad_norm": 2.0, "smoothness": 3.0})
    assert latest.metrics() == {"smoothdiag/local_smoothness": 3.0, "smoothdiag/grad_norm": 2.0}
    assert latest.metrics() == {}
