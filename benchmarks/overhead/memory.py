"""Memory of a due step, in copies of the parameters, beyond a step that is not measured."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from models import Task
from overhead.counting import peak
from overhead.loops import (
    DEFAULT,
    HAS_OFFLOAD,
    LARGE_PARAMETERS,
    LOCAL,
    PATH,
    SMALL_GPT,
    Loop,
    Optimizer,
    in_bfloat16,
)
from overhead.table import Row

from smoothdiag import HessianNorm

COPIES = "copies of x at the peak: {}"
OFFLOADED = 'the same on the device, `offload="cpu"`: {}'
USUAL = "default rows, AdamW, 4 micro-batches"
FEWEST = 1e-9
"""A tolerance that no search reaches, so that it makes as many products as it may."""


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4)


def beyond(
    task: Task,
    device: torch.device,
    estimators: list[Any],
    *,
    optimizer: Optimizer | None = None,
    micro_batches: int = 1,
    **options: Any,
) -> float:
    """Returns the copies of x that a due step holds at its peak beyond the peak of a plain one."""
    peaks = []
    for probed in (None, estimators):
        more = options if probed else {}
        loop = Loop(task, device, probed, optimizer=optimizer, micro_batches=micro_batches, **more)
        for _ in range(3):
            loop.step()
        peaks.append(peak(loop.step, device))
    return (peaks[1] - peaks[0]) / loop.size


def copies(device: torch.device, quick: bool) -> Iterator[Row]:
    """Measures rows and default rows; with ``offload="cpu"`` without the host memory that the probe keeps."""
    large, half = (partial(beyond, task, device) for task in (LARGE_PARAMETERS, in_bfloat16(LARGE_PARAMETERS)))
    usual: dict[str, Any] = {"optimizer": adamw, "micro_batches": 4}
    cases: list[tuple[str, float, float, float | None, Any]] = [
        ("path row, SGD", 1, 3.3, 1.3, partial(large, PATH)),
        ("local row, SGD", 1, 3.3, 1.3, partial(large, LOCAL)),
        (USUAL, 2, 4.3, 2.3, partial(large, DEFAULT, **usual)),
        ("path row, SGD, bfloat16", 3, 8, None, partial(half, PATH)),
        ("local row, SGD, bfloat16", 3, 8, None, partial(half, LOCAL)),
        (f"{USUAL}, bfloat16", math.nan, math.nan, math.nan, partial(half, DEFAULT, **usual)),
    ]
    for name, limit, goal, goal_offloaded, measure in cases:
        yield Row(COPIES.format(name), limit, goal, measure())
        if goal_offloaded is not None:
            figure = measure(offload="cpu") if HAS_OFFLOAD else math.nan
            yield Row(OFFLOADED.format(name), math.nan, goal_offloaded, figure)


def hessian(device: torch.device, quick: bool) -> Iterator[Row]:
    """Measures `HessianNorm` at a given number of products."""
    for number in (6, 12, 24):
        estimator = HessianNorm(tol=FEWEST, max_products=number, backend="central")
        # A restart needs fewer vectors than products, and nobody knows how few.
        limit, goal = number + 2 if number + 4 <= 12 else math.nan, min(number + 4, 12)
        figure = beyond(SMALL_GPT, device, [estimator])
        yield Row(COPIES.format(f"`HessianNorm`, {number} products"), limit, goal, figure)
