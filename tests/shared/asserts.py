"""Properties that many tests assert: states are equal bit for bit."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

COST_COLUMNS = frozenset({"seconds", "num_grads"})
"""Columns of a row that differ between equal runs."""


def whole(tensor: Tensor | None) -> Tensor | None:
    """Returns a copy of a tensor, put together from all ranks where it is sharded."""
    if tensor is None:
        return None
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Returns copies of everything that a measurement must leave alone."""
    state: dict[str, Any] = {f"parameter {n}": whole(p) for n, p in model.named_parameters()}
    state |= {f"buffer {n}": whole(b) for n, b in model.named_buffers()}
    state |= {f"grad {n}": whole(p.grad) for n, p in model.named_parameters()}
    state |= {f"mode {n}": m.training for n, m in model.named_modules()}
    state |= {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": np.random.get_state()[1].copy()}
    if optimizer is not None:
        for index, values in optimizer.state_dict()["state"].items():
            state |= {
                f"optimizer {index} {name}": whole(value) if isinstance(value, Tensor) else value
                for name, value in values.items()
            }
    return state


def assert_identical(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Fails on the first entry that differs by a single bit."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        found = actual[name]
        if isinstance(value, Tensor):
            assert isinstance(found, Tensor), name
            assert torch.equal(found, value), f"{name} differs by up to {(found - value).abs().max()}"
        elif isinstance(value, np.ndarray):
            assert np.array_equal(found, value), name
        else:
            assert found == value, name


def without_cost(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what equal runs have equal in a row."""
    return {name: value for name, value in row.items() if name not in COST_COLUMNS}


class NoSync(TorchDispatchMode):
    """Fails where a value leaves its tensor: item(), float(), bool(), nonzero(), equal()."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "is_nonzero", "nonzero", "equal")
        return func(*args, **(kwargs or {}))
