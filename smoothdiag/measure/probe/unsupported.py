"""Unsupported: wrappers whose state a measurement cannot restore, refused by name when a probe is made."""

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
    """Makes sure that measurements can restore the state of everything that ``model`` is wrapped in.

    Raises:
        ValueError: If they cannot; the message names the wrapper and says what to do instead.
    """
    reason = _engine(model) or _device(parameters) or _sharding(model, parameters) or _replicas(model)
    if reason:
        raise ValueError(f"Parameter `model` should be trained in a way that a measurement leaves unchanged. {reason}")


def _engine(model: nn.Module) -> str:
    if any(type(module).__module__.partition(".")[0] == "deepspeed" for module in model.modules()):
        return "Found a DeepSpeed engine, which keeps gradients of its own; measure under DistributedDataParallel."
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        return (
            "Found a scripted or traced module. torch counts its calls and compiles it anew, so the extra calls of a "
            "measurement would change the last bits of the run. Measure the original module, or use torch.compile."
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
            f"torch {', '.join(TESTED)} only, and under torch 2.7 curvature came out wrong. Use a checked version, or "
            "DistributedDataParallel."
        )
    known = shards.shards()
    # Parameters that were DTensors before fully_shard are also spread over a mesh of their own (tensor parallel).
    owned = None if known is None else {id(shard.sharded_param) for shard in known if not shard.is_dtensor}
    for parameter in parameters:
        if not vectors.is_sharded(parameter):
            continue
        kinds = tuple(type(placement).__name__ for placement in parameter.placements)
        if kinds not in (("Shard",), ("Replicate", "Shard")) or (owned is not None and id(parameter) not in owned):
            mesh = ", ".join(map(str, parameter.placements))
            return (
                f"Found a DTensor placed as ({mesh}), which fully_shard alone does not do but tensor parallelism does. "
                "Measure a run under fully_shard alone, with a mesh of one dimension or of two: (replicate, shard)."
            )
    if shards and any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        return (
            "Found DistributedDataParallel and fully_shard in one model; use fully_shard alone, with a mesh of two "
            "dimensions."
        )
    return ""


def _replicas(model: nn.Module) -> str:
    modules = Replicas(model, list(model.parameters())).modules
    if len({tuple(dist.get_process_group_ranks(module.process_group)) for module in modules}) > 1:
        return "Found DistributedDataParallel modules with different process groups; give all of them the same."
    for module in modules:
        if getattr(module, "_delay_all_reduce_params", None):
            return (
                "Found `delay_all_reduce_named_params` of DistributedDataParallel, which acts in every backward pass, "
                "also of measurements; omit it."
            )
        if getattr(module, "mixed_precision", None) is not None:
            return (
                "Found `mixed_precision` of DistributedDataParallel, which acts in every backward pass, also of "
                "measurements; use torch.autocast."
            )
        if any(hasattr(parameter, "_in_backward_optimizers") for parameter in module.parameters()):
            return (
                "Found an optimizer that steps within backward, so measurements would move the parameters; use an "
                "ordinary optimizer.step() in runs that you measure."
            )
        for _, state in getattr(module, "_comm_hooks", []):
            if type(state).__name__ == "PostLocalSGDState":
                return (
                    "Found the communication hook post_localSGD_hook, under which ranks hold different parameters; "
                    "measure a run without it."
                )
    return ""
