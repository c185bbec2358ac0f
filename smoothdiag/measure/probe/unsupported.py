"""Unsupported: ways to train in parallel that a measurement cannot put back, refused by name when attaching."""

import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from smoothdiag import vectors
from smoothdiag.measure.loss.replicas import Replicas
from smoothdiag.measure.probe.sharded import TESTED, Shards


def refuse_unsupported(model: nn.Module, parameters: Sequence[Tensor]) -> None:
    """Makes sure that measurements know how to put back what ``model`` is wrapped in.

    Raises:
        ValueError: If they do not; the message names the wrapper and the way out.
    """
    reason = _engine(model) or _device(parameters) or _sharding(model, parameters) or _replicas(model)
    if reason:
        raise ValueError(f"Parameter `model` should be trained in a way that a measurement can put back. {reason}")


def _engine(model: nn.Module) -> str:
    if any(type(module).__module__.partition(".")[0] == "deepspeed" for module in model.modules()):
        return "Found a DeepSpeed engine, which keeps gradients of its own; measure under DistributedDataParallel."
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        return (
            "Found a scripted or traced module, which torch compiles anew as it counts its calls: further calls change "
            "bits of the run. Measure the module that it was made of, or use torch.compile."
        )
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    if any(isinstance(module, kind) for module in model.modules()):
        return "Found FullyShardedDataParallel (FSDP1), whose flat parameters are not seen as sharded; use fully_shard."
    return ""


def _device(parameters: Sequence[Tensor]) -> str:
    found = next((p.device.type for p in parameters if p.device.type == "mps"), "")
    return f"Found parameters on `{found}`, which has no float64 for sums; measure on a CPU." if found else ""


def _sharding(model: nn.Module, parameters: Sequence[Tensor]) -> str:
    shards = Shards(model)
    if shards and not shards.is_known():
        return (
            f"Found fully_shard (FSDP2) under torch {torch.__version__}. Rows of sharded models were checked under "
            f"torch {', '.join(TESTED)}, and curvature came out wrong under torch 2.7: use a checked version, or "
            "DistributedDataParallel."
        )
    known = shards.shards()
    # DTensors that fully_shard was given are spread over a mesh of their own beside (tensor parallel).
    owned = None if known is None else {id(shard.sharded_param) for shard in known if not shard.is_dtensor}
    for parameter in parameters:
        if not vectors.is_sharded(parameter):
            continue
        kinds = tuple(type(placement).__name__ for placement in parameter.placements)
        if kinds not in (("Shard",), ("Replicate", "Shard")) or (owned is not None and id(parameter) not in owned):
            mesh = ", ".join(map(str, parameter.placements))
            return (
                f"Found a DTensor placed as ({mesh}) other than by fully_shard alone, as tensor parallelism places "
                "it; measure runs with a mesh of one dimension, or of two, (replicate, shard)."
            )
    if shards and any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        return (
            "Found DistributedDataParallel and fully_shard in one model; use fully_shard with a two-dimensional mesh."
        )
    return ""


def _replicas(model: nn.Module) -> str:
    modules = Replicas(model, list(model.parameters())).modules
    if len({tuple(dist.get_process_group_ranks(module.process_group)) for module in modules}) > 1:
        return "Found DistributedDataParallel modules with different process groups; give all of them the same."
    for module in modules:
        if getattr(module, "_delay_all_reduce_params", None):
            return "Found `delay_all_reduce_named_params` of DistributedDataParallel, which acts in backward; omit it."
        if getattr(module, "mixed_precision", None) is not None:
            return "Found `mixed_precision` of DistributedDataParallel, which acts in backward; use torch.autocast."
        if any(hasattr(parameter, "_in_backward_optimizers") for parameter in module.parameters()):
            return "Found an optimizer that steps within backward; use an ordinary optimizer.step() in measured runs."
        for _, state in getattr(module, "_comm_hooks", []):
            if type(state).__name__ == "PostLocalSGDState":
                return "Found the communication hook post_localSGD_hook, under which ranks hold different parameters."
    return ""
