"""Counts of a due step: gradients, waits for the device, collectives."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from overhead.counting import Waits, collectives
from overhead.loops import DEFAULT, NETWORKS, SIX_TENSORS, Loop
from overhead.table import Row
from torch import nn
from torch.distributed.fsdp import fully_shard

from smoothdiag import AutoClip


def gradients(device: torch.device, quick: bool) -> Iterator[Row]:
    """Counts gradients of rows on each step's own batch, by the rows and by the backward passes."""
    for name in ("LSTM .1M of the demo", "GPT .8M, 1,024 tokens"):
        for rows, goal, limit in (("AutoClip's row", 1.4, 1), ("default rows", 4.4, 4)):
            is_clip = limit == 1
            loop = Loop(NETWORKS[name], device, () if is_clip else DEFAULT, data="step")
            if is_clip:
                AutoClip(loop.optimizer, loop.probe)
            loop.step()  # the self-test of the first step comes once in a run
            before, passed = len(loop.probe.trace), loop.backward_passes
            for _ in range(29 if is_clip or not quick else 11):
                loop.step()
            found = list(loop.probe.trace)[before:]
            due = len({row["step"] for row in found})
            yield Row(f"gradients of {rows}: {name}", limit, goal, sum(row["num_grads"] for row in found) / due)
            yield Row(f"backward passes of {rows}: {name}", limit, goal, (loop.backward_passes - passed) / due)


def waits_of(group_by: Callable[[str], str] | None) -> Waits:
    """Returns the waits of the third due step."""
    loop = Loop(SIX_TENSORS, torch.device("cpu"), DEFAULT, group_by=group_by)
    for _ in range(2):
        loop.step()
    with Waits() as waits:
        loop.step()
    return waits


def waits(device: torch.device, quick: bool) -> Iterator[Row]:
    """Counts waits of the default rows, on a CPU."""
    for name, group_by in {"6 tensors": None, "6 groups": lambda name: name}.items():
        found = waits_of(group_by)
        yield Row(f"waits for the device, default rows: {name}", 1, 6, found.number)
        yield Row(f"calls of `synchronize` beside them: {name}", 0, 2, found.synchronized)


def sharded(task: Any) -> nn.Module:
    model = task.build()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    return model


def sums_over_ranks(device: torch.device, quick: bool) -> Iterator[Row]:
    """Counts collectives of the default rows under FSDP2, in a group of one process."""
    if device.type != "cpu":
        return
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{Path(folder) / 'meet'}", rank=0, world_size=1)
        try:
            for name, group_by in {"default rows": None, "3 groups": lambda name: name.split(".")[0]}.items():
                yield Row(f"collectives, FSDP2: {name}", 1, 6, collectives_of(group_by).total())
        finally:
            dist.destroy_process_group()


def collectives_of(group_by: Callable[[str], str] | None) -> Any:
    """Returns the collectives of the third due step of a sharded model, by name."""
    task = SIX_TENSORS
    model = sharded(task)
    loop = Loop(type(task)(lambda: model, task.loss_fn, task.batch, task.lr), torch.device("cpu"), DEFAULT,
                group_by=group_by)  # fmt: skip
    for _ in range(2):
        loop.step()
    with collectives() as counts:
        loop.step()
    loop.probe.close()
    return counts
