"""measure.probe.sharded: what a fault leaves in the private state of FSDP2 is put back, or the run ends."""

import json

import pytest
import torch
import torch.distributed as dist
from faults_worker import BOMB, SHARDS, Net, fsdp, loss_fn
from torch import Tensor, nn

from smoothdiag.measure.loss import agreement
from smoothdiag.measure.loss.agreement import all_failed
from smoothdiag.measure.loss.faults import NotPutBack
from smoothdiag.measure.probe import sharded
from smoothdiag.measure.probe.sharded import Shards

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without it"),
    pytest.mark.usefixtures("group_of_one"),
]
NUM_TICKS = 12


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, int]:
    torch.manual_seed(1)
    return torch.randn(8, 6), torch.randint(3, (8,)), 2


def gradients(model: nn.Module, batch: object) -> list[Tensor]:
    model.zero_grad()
    loss_fn(model, batch).backward()
    return [p.grad.to_local().clone() for p in model.parameters()]


def fail(model: nn.Module, batch: object, place: int) -> None:
    BOMB.is_armed, BOMB.count, BOMB.target = True, 0, place
    try:
        with Shards(model).mended():
            loss_fn(model, batch).backward()
    finally:
        BOMB.is_armed = False


@pytest.mark.parametrize("place", range(NUM_TICKS))
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "root alone"])
def test_the_next_gradient_is_the_one_without_the_fault(nested, place, batch) -> None:
    model = fsdp(mesh=(1,), nested=nested)(Net())
    held, expected = list(model.parameters()), gradients(model, batch)
    model.zero_grad()
    with pytest.raises(torch.OutOfMemoryError):
        fail(model, batch, place)
    assert all(a is b for a, b in zip(model.parameters(), held, strict=True))
    assert all(map(torch.equal, gradients(model, batch), expected))


def test_a_torch_that_was_never_tested_ends_the_run(batch, monkeypatch) -> None:
    monkeypatch.setattr(sharded, "TESTED", ("1.0",))
    model = fsdp(mesh=(1,))(Net())
    gradients(model, batch)
    with pytest.raises(NotPutBack, match=r"can repair that under torch 1\.0, but this is torch") as caught:
        fail(model, batch, 8)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


@pytest.mark.parametrize("method", ["_drop_gradients", "reset_iter_state"])
def test_what_is_not_as_it_was_ends_the_run(method, batch, monkeypatch) -> None:
    model = fsdp(mesh=(1,), nested=False)(Net())
    gradients(model, batch)
    monkeypatch.setattr(sharded if method.startswith("_") else model, method, lambda *args: None)
    with pytest.raises(NotPutBack, match="could not be restored") as caught:
        fail(model, batch, 9)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_private_state_that_is_gone_ends_the_run(batch, monkeypatch) -> None:
    model = fsdp(mesh=(1,))(Net())
    gradients(model, batch)
    monkeypatch.setattr(model, "reset_iter_state", None)
    with pytest.raises(NotPutBack, match="could not be restored .TypeError"):
        fail(model, batch, 8)


def test_a_stop_by_hand_is_passed_on_and_put_back(batch) -> None:
    model = fsdp(mesh=(1,))(Net())
    expected = gradients(model, batch)

    def stop() -> None:
        with Shards(model).mended():
            loss_fn(model, batch)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert all(map(torch.equal, gradients(model, batch), expected))


def test_every_setup_has_shards() -> None:
    assert SHARDS
    assert not Shards(Net())


@pytest.mark.parametrize(
    ("note", "decision", "expected"),
    [
        ({"world": [3]}, None, True),
        ({"world": [4]}, None, False),
        ({"other": [9]}, None, True),
        (None, None, False),
        ({"world": [3]}, "stop", False),
        (None, "go on", True),
    ],
    ids=["same place", "another place", "other groups", "no failure there", "others gave up", "others have decided"],
)
def test_ranks_go_on_if_all_failed_at_the_same_place(note, decision, expected, monkeypatch) -> None:
    store = dist.HashStore()
    monkeypatch.setattr(agreement, "WAIT", 0.05)
    monkeypatch.setattr(agreement, "positions", lambda: {"world": [3]})
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: dist.PrefixStore("", store))
    monkeypatch.setattr(agreement, "_attempts", iter([7]))
    (prefix,) = {key.rpartition("/")[0] for key in agreement.keys_of([0, 1], 7)}
    if note is not None:
        store.set(f"/{prefix}/1", json.dumps(note))
    if decision is not None:
        store.set(f"/{prefix}/decision", decision)
    assert all_failed([0, 1]) is expected


def test_a_store_that_is_gone_is_no_agreement(monkeypatch) -> None:
    def gone() -> None:
        raise dist.DistNetworkError("closed")

    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", gone)
    assert not all_failed([0, 1])
    assert all_failed([0])
