"""measure.probe, packing: a due step holds hardly more copies of the parameters than its rows need."""

import dataclasses
import gc
import sys
from typing import Any

import pytest
import torch
from losses import cross_entropy
from networks import mlp
from places import REPOSITORY

from smoothdiag import LocalSmoothness, PathSmoothness, Probe, every
from smoothdiag.packing import SMALL

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
from overhead.loops import LARGE_PARAMETERS, Loop, images, in_bfloat16, perceptron
from overhead.memory import adamw, beyond

PATH, LOCAL = [PathSmoothness()], [LocalSmoothness()]
# No tensor has more than a twentieth of the parameters, so that tensors at work hardly count.
DEEP = dataclasses.replace(LARGE_PARAMETERS, build=lambda: perceptron(128, 24), batch=images(128, 2))

CASES: dict[str, tuple[list[Any], dict[str, Any], float, float]] = {
    "path": (PATH, {}, 3.3, 1.3),
    "local": (LOCAL, {}, 3.3, 1.3),
    "default, AdamW, four micro-batches": ([*PATH, *LOCAL], {"optimizer": adamw, "micro_batches": 4}, 4.3, 2.3),
    "path, bfloat16": (PATH, {}, 8.0, 6.0),
    "local, bfloat16": (LOCAL, {}, 8.0, 6.0),
}


QUICK = {("path", None), ("local", "cpu"), ("path, bfloat16", None)}


@pytest.mark.parametrize(
    ("name", "offload"),
    [
        pytest.param(name, offload, marks=() if (name, offload) in QUICK else pytest.mark.slow)
        for name in CASES
        for offload in (None, "cpu")
    ],
)
def test_a_due_step_holds_few_copies(name: str, offload: str | None) -> None:
    estimators, options, goal, goal_offloaded = CASES[name]
    task = in_bfloat16(DEEP) if "bfloat16" in name else DEEP
    # The order in which autograd frees tensors moves the peak by a tenth of a copy or two.
    copies = min(beyond(task, torch.device("cpu"), estimators, offload=offload, **options) for _ in range(2))
    assert copies <= (goal if offload is None else goal_offloaded)
    assert copies > 0.4  # so that the peak is seen at all; a plain step has its own, which is taken off


def test_tensors_are_small_beside_the_whole() -> None:
    sizes = [p.numel() for p in Loop(DEEP, torch.device("cpu")).model.parameters()]
    assert max(sizes) < sum(sizes) / 20
    assert sizes[0] >= SMALL  # it is a piece of its own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_copy_of_small_tensors_stays_between_due_steps(dtype: torch.dtype) -> None:
    model, batch = mlp(8, *[64] * 12, 5).to(dtype), (torch.randn(4, 8, dtype=dtype), torch.zeros(4, dtype=torch.long))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    size = sum(p.nbytes for p in model.parameters())
    before = _memory_of_tensors()
    with Probe(model, optimizer, cross_entropy, schedule=every(2)) as probe:
        for _ in range(2):
            probe.observe(batch)
            cross_entropy(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert len(probe.trace) == 2
        assert _memory_of_tensors() - before < 0.1 * size


def _memory_of_tensors() -> int:
    gc.collect()
    held = [x.untyped_storage() for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())
