"""Properties that many tests assert: states are equal bit for bit."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Returns copies of everything that a measurement must leave alone."""
    state: dict[str, Any] = {f"parameter {n}": p.detach().clone() for n, p in model.named_parameters()}
    state |= {f"buffer {n}": b.clone() for n, b in model.named_buffers()}
    state |= {f"grad {n}": None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    state |= {f"mode {n}": m.training for n, m in model.named_modules()}
    state |= {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": np.random.get_state()[1].copy()}
    if optimizer is not None:
        for index, values in optimizer.state_dict()["state"].items():
            state |= {
                f"optimizer {index} {name}": value.clone() if isinstance(value, Tensor) else value
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


class NoSync(TorchDispatchMode):
    """Fails where a value leaves its tensor: item(), float(), bool(), nonzero(), equal()."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "is_nonzero", "nonzero", "equal")
        return func(*args, **(kwargs or {}))
