"""What an object keeps in its attributes is what it was before, after a loss was evaluated again."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch

from smoothdiag.integrations.bookkeeping import unrecorded


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


def test_it_is_put_back_after_an_error() -> None:
    owner = keeper()
    try:
        with unrecorded(owner):
            owner.count += 1
            raise KeyError
    except KeyError:
        assert owner.count == 3


def test_models_and_parameters_are_left_alone() -> None:
    owner = keeper()
    owner.weight = owner.model.weight
    with unrecorded(owner):
        owner.model.register_buffer("mean", torch.ones(1))
        with torch.no_grad():
            owner.weight.zero_()
    assert owner.model.mean == 1
    assert not owner.weight.any()


def test_a_dictionary_that_holds_itself_ends() -> None:
    owner = keeper()
    owner.metrics["self"] = owner.metrics
    with unrecorded(owner):
        owner.metrics["late"] = 1
    assert "late" not in owner.metrics
