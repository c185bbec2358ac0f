"""measure.probe.unsupported: ways to train in parallel that a measurement cannot put back are refused by name."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from networks import mlp
from torch import nn

from smoothdiag.measure.loss.replicas import Replicas
from smoothdiag.measure.probe.sharded import Shards
from smoothdiag.measure.probe.unsupported import refuse_unsupported

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without it"),
    pytest.mark.usefixtures("group_of_one"),
]


def net() -> nn.Sequential:
    return mlp(4, 4, 2)


def ddp(model: nn.Module, **options: object) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, **options)


def sharded(*, mesh: tuple[int, ...] = (1,), names: tuple[str, ...] = ("shard",)) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    found = init_device_mesh("cpu", mesh, mesh_dim_names=names)
    model = net()
    fully_shard(model[0], mesh=found)
    return fully_shard(model, mesh=found)


def tensor_parallel(*, shards: bool) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("shard", "tensor"))
    model = parallelize_module(net(), mesh["tensor"], {"0": ColwiseParallel()})
    return fully_shard(model, mesh=mesh["shard"]) if shards else model


def replicated() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_module

    return distribute_module(net(), init_device_mesh("cpu", (1,)))


def mixed_precision() -> nn.Module:
    model = ddp(net())
    model.mixed_precision = object()  # as `mixed_precision=` leaves it, which needs a GPU
    return model


def delayed() -> nn.Module:
    model = net()
    named = [("0.weight", model[0].weight)]
    return ddp(model, delay_all_reduce_named_params=named, param_to_hook_all_reduce=model[2].bias)


def in_backward() -> nn.Module:
    from torch.distributed.optim import _apply_optimizer_in_backward

    model = net()
    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
    return ddp(model)


def local_steps() -> nn.Module:
    from torch.distributed.algorithms.ddp_comm_hooks import post_localSGD_hook as hooks

    model = ddp(net())
    model.register_comm_hook(hooks.PostLocalSGDState(None, None, 2), hooks.post_localSGD_hook)
    return model


def within_shards() -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    return nn.Sequential(ddp(nn.Linear(4, 4)), fully_shard(nn.Linear(4, 2)))


def engine() -> nn.Module:
    kind = type("DeepSpeedEngine", (nn.Sequential,), {"__module__": "deepspeed.runtime.engine"})
    return kind(nn.Linear(4, 2))


def flat_parameters() -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(net(), device_id=torch.device("cpu"))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "tensor parallel": (lambda: tensor_parallel(shards=False), r"DTensor placed as \(S\(0\)\)"),
    "tensor parallel and sharded": (lambda: tensor_parallel(shards=True), "tensor parallelism"),
    "replicated DTensors": (replicated, r"DTensor placed as \(R\)"),
    "replicas of shards": (within_shards, "DistributedDataParallel and fully_shard in one model"),
    "delayed reduction": (delayed, "delay_all_reduce_named_params"),
    "mixed precision of DDP": (mixed_precision, "mixed_precision"),
    "optimizer in backward": (in_backward, "steps within backward"),
    "local SGD": (local_steps, "post_localSGD_hook"),
    "scripted": (lambda: torch.jit.script(net()), "scripted"),
    "traced part": (lambda: nn.Sequential(torch.jit.trace(net(), torch.ones(1, 4)), nn.Linear(2, 1)), "traced"),
    "DeepSpeed": (engine, "DeepSpeed"),
    "FSDP1": (flat_parameters, "FSDP1.*use fully_shard"),
}
TAKEN: dict[str, Callable[[], nn.Module]] = {
    "plain": net,
    "DDP": lambda: ddp(net()),
    "static graph": lambda: ddp(net(), static_graph=True),
    "fully_shard": sharded,
    "fully_shard over replicas": lambda: sharded(mesh=(1, 1), names=("replicate", "shard")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_put_back_is_refused_by_name(name) -> None:
    make, message = REFUSED[name]
    model = make()
    with pytest.raises(ValueError, match=message) as caught:
        refuse_unsupported(model, list(model.parameters()))
    assert str(caught.value).startswith("Parameter `model` should ")


@pytest.mark.parametrize("name", TAKEN)
def test_what_can_be_put_back_is_taken(name) -> None:
    model = TAKEN[name]()
    refuse_unsupported(model, list(model.parameters()))


def test_parameters_on_a_device_without_float64_are_refused() -> None:
    parameters = [SimpleNamespace(device=torch.device("mps"))]
    with pytest.raises(ValueError, match="`mps`, which has no float64"):
        refuse_unsupported(net(), parameters)


def test_modules_with_different_groups_are_refused(monkeypatch) -> None:
    model = nn.Sequential(ddp(nn.Linear(4, 4)), ddp(nn.Linear(4, 2), process_group=dist.new_group([0])))
    refuse_unsupported(model, list(model.parameters()))
    numbers = {model[0].process_group: [0], model[1].process_group: [1]}
    monkeypatch.setattr(dist, "get_process_group_ranks", numbers.__getitem__)
    with pytest.raises(ValueError, match="different process groups"):
        refuse_unsupported(model, list(model.parameters()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.set_requires_gradient_sync(False), "stay unreduced"),
        (lambda model: model.set_requires_all_reduce(False), "stay unreduced"),
        (lambda model: model.set_is_last_backward(False), "do not end"),
    ],
    ids=["gradient sync", "all-reduce", "last backward"],
)
def test_what_the_loop_leaves_between_passes_is_seen(call, message) -> None:
    model = sharded()
    model(torch.ones(2, 4)).sum().backward()
    assert Shards(model).pending() == ""
    call(model)
    assert message in Shards(model).pending()


def test_gradients_that_wait_for_their_reduction_are_seen() -> None:
    model = sharded()
    model.set_requires_gradient_sync(False)
    model(torch.ones(2, 4)).sum().backward()
    model.set_requires_gradient_sync(True)
    assert Shards(model).pending() == "gradients that are not reduced yet"


def test_uneven_inputs_are_seen() -> None:
    model = ddp(net())
    replicas = Replicas(model, list(model.parameters()))
    assert replicas.pending() == ""
    with model.join():
        assert "Join" in replicas.pending()


def test_versions_of_torch_under_which_shards_were_not_checked_are_refused(monkeypatch) -> None:
    model = sharded()
    refuse_unsupported(model, list(model.parameters()))
    monkeypatch.setattr(torch, "__version__", "2.7.0")
    with pytest.raises(ValueError, match="Found fully_shard .FSDP2. under torch 2.7.0"):
        refuse_unsupported(model, list(model.parameters()))
