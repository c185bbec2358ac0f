"""measure.probe, memory: memory that runs out anywhere costs one row at most, never the run and never a bit of it."""

import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from asserts import assert_identical, state_of
from losses import regression
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smoothdiag import AutoClip, HessianNorm, LocalSmoothness, PathSmoothness, Probe, SmoothdiagWarning, every

pytestmark = pytest.mark.usefixtures("without_collecting")

FAULT_AT = 6
"""The step whose allocations fail: it is measured, and AutoClip acts in it."""

STEPS = 10
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05),
}


class Allocations(TorchDispatchMode):
    """Counts the allocations that the library asks for, and lets one of them, or all from one on, fail.

    Args:
        fails_at: Which one fails, counted from 1; 0 lets none fail.
        lasts: Whether all that follow fail too.
    """

    def __init__(self, fails_at: int = 0, *, lasts: bool = False) -> None:
        super().__init__()
        self.fails_at, self.lasts, self.number = fails_at, lasts, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _is_ours() and _has_new_storage(result, (args, kwargs)):
            self.number += 1
            if self.fails_at and (self.number == self.fails_at or (self.lasts and self.number > self.fails_at)):
                raise torch.OutOfMemoryError("out of memory (made up)")
        return result


def _is_ours() -> bool:
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("smoothdiag"):
            return True
        frame = frame.f_back
    return False


def _has_new_storage(result: Any, given: Any) -> bool:
    known = {x.untyped_storage()._cdata for x in tree_leaves(given) if isinstance(x, Tensor)}
    return any(x.untyped_storage()._cdata not in known for x in tree_leaves(result) if isinstance(x, Tensor))


def train(
    optimizer_name: str, dtype: torch.dtype, faults: Allocations | None, *, probed: bool = True, curved: bool = False
) -> tuple[dict[str, Any], Probe | None, AutoClip | None]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1)).to(dtype)
    optimizer = OPTIMIZERS[optimizer_name](list(model.parameters()))
    estimators = [PathSmoothness(), LocalSmoothness(), *([HessianNorm()] if curved else [])]
    probe = Probe(model, optimizer, regression, estimators=estimators, schedule=every(2)) if probed else None
    clipper = AutoClip(optimizer, probe) if probe else None
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        batches = [
            (torch.randn(8, 6, generator=generator).to(dtype), torch.randn(8, 1, generator=generator).to(dtype))
            for _ in range(2)
        ]
        with faults if faults and step == FAULT_AT else nullcontext():
            optimizer.zero_grad()
            for batch in batches:
                if probe:
                    probe.observe(batch)
                (regression(model, batch) / 2).backward()
            optimizer.step()
    return state_of(model, optimizer), probe, clipper


@cache
def without_faults(name: str, dtype: torch.dtype, curved: bool) -> tuple[dict[str, Any], float]:
    """Returns what such a run ends with, and its longest step."""
    expected, _, clipper = train(name, dtype, None, curved=curved)
    assert clipper is not None
    return expected, clipper.longest_step


def injected(name: str, dtype: torch.dtype, place: int, *, lasts: bool = False, curved: bool = False) -> Allocations:
    """Trains with a fault, and checks that the run is what it is without."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SmoothdiagWarning)
        expected, longest_step = without_faults(name, dtype, curved)
        faults = Allocations(place, lasts=lasts)
        found, probe, clipper = train(name, dtype, faults, curved=curved)
    assert probe is not None
    assert clipper is not None
    assert probe.steps == STEPS
    if not lasts:
        assert_identical(found, expected)
        assert clipper.longest_step == longest_step
    return faults


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param("sgd", torch.float32, id="sgd-fp32", marks=pytest.mark.slow),
        pytest.param("sgd", torch.bfloat16, id="sgd-bf16"),
        pytest.param("adamw", torch.float32, id="adamw-fp32"),
        pytest.param("adamw", torch.bfloat16, id="adamw-bf16", marks=pytest.mark.slow),
    ],
)
def test_no_allocation_that_fails_ends_or_changes_a_run(name, dtype) -> None:
    number = injected(name, dtype, 0).number
    assert number > 200
    in_backward = range(2, 12, 3)  # the first ones are those of hooks within the loop's own backward
    for place in (*in_backward, *range(1, number + 1, max(1, number // 6))):
        assert injected(name, dtype, place).number >= place


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_no_allocation_at_all_does(name, dtype) -> None:
    for place in range(1, injected(name, dtype, 0).number + 1):
        injected(name, dtype, place)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_memory_that_stays_away_costs_rows_alone(name) -> None:
    number = injected(name, torch.float32, 0).number
    for place in range(1, number + 1, max(1, number // 5)):
        injected(name, torch.float32, place, lasts=True)


@pytest.mark.thorough
def test_curvature_too() -> None:
    number = injected("sgd", torch.float32, 0, curved=True).number
    for place in range(1, number + 1, max(1, number // 5)):
        injected("sgd", torch.float32, place, curved=True)
