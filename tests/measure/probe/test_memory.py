"""measure.probe, packing: a due step holds hardly more copies of the parameters than its rows need."""

import dataclasses
import sys
from typing import Any

import pytest
import torch
from places import REPOSITORY

from smoothdiag import LocalSmoothness, PathSmoothness
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
    copies = beyond(task, torch.device("cpu"), estimators, offload=offload, **options)
    assert copies <= (goal if offload is None else goal_offloaded)
    assert copies > 0.8  # so that the peak is seen at all


def test_tensors_are_small_beside_the_whole() -> None:
    sizes = [p.numel() for p in Loop(DEEP, torch.device("cpu")).model.parameters()]
    assert max(sizes) < sum(sizes) / 20
    assert sizes[0] >= SMALL  # it is a piece of its own
