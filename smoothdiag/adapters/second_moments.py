"""Second moments: the running averages of squared gradients that optimizers of the kind of Adam keep."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from smoothdiag import vectors
from smoothdiag.adapters.joint import members
from smoothdiag.adapters.protocol import Adapter

USUAL = "exp_avg_sq"
"""The entry that optimizers outside the known families are asked for."""


class SecondMoments:
    """Reads gradients beside their second moments, which are neither copied nor corrected for their start at 0.

    Args:
        optimizer: The optimizer, or a `Joint` of several.
        adapters: What is known of each of its members, in their order.

    Raises:
        ValueError: If one of them keeps no second moment, or is of an unknown kind whose state shows none yet.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, adapters: list[Adapter]) -> None:
        self._entries: list[tuple[torch.optim.Optimizer, str]] = []
        for member, adapter in zip(members(optimizer), adapters, strict=True):
            entry = getattr(adapter, "second", "") or (USUAL if _shows(member) else "")
            if not entry:
                raise ValueError(
                    "Parameter `optimizer` should keep a second moment of each parameter, a running average of squared "
                    "gradients, for the rule SPAM: Adam, AdamW, NAdam, RAdam or RMSprop of torch, or one that has "
                    f"`{USUAL}` in its state by now. Found {type(member).__name__}, {_state(member)}."
                )
            self._entries.append((member, entry))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields gradient, second moment and parameter, the first two as this rank's parts that share their memory.

        Parameters without a gradient, and those that the optimizer has not moved yet, are left out.

        Raises:
            RuntimeError: If the state of a parameter has no second moment of its shape.
        """
        for optimizer, entry in self._entries:
            for p in vectors.unique(*(group["params"] for group in optimizer.param_groups)):
                state = optimizer.state.get(p)
                if p.grad is None or not state:
                    continue
                second = state.get(entry)
                if not isinstance(second, Tensor) or second.shape != p.shape:
                    raise RuntimeError(
                        f"SPAM needs `{entry}` in the state of each parameter, in its shape {tuple(p.shape)}. Found "
                        f"{_said(second)} in {type(optimizer).__name__}."
                    )
                yield _real(vectors.local(p.grad)), _real(vectors.local(second)), p


def _shows(optimizer: torch.optim.Optimizer) -> bool:
    if isinstance(optimizer, torch.optim.RAdam):
        return True
    return any(USUAL in state for p, state in optimizer.state.items() if isinstance(p, Tensor))


def _state(optimizer: torch.optim.Optimizer) -> str:
    names = {name for p, state in optimizer.state.items() if isinstance(p, Tensor) for name in state}
    return f"whose state holds {', '.join(sorted(map(str, names)))}" if names else "which has no state yet"


def _said(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else "nothing" if value is None else repr(value)


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x
