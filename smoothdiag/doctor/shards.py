"""Shards: norms of the part on one rank, and whether the ranks combine them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from smoothdiag.doctor.gradients import is_part, is_sharded
from smoothdiag.doctor.patches import Patches
from smoothdiag.doctor.sites import Site, call_site, is_own

_READS = ("item", "tolist", "__float__", "to_local")
_COLLECTIVES = ("all_reduce", "reduce", "all_gather", "all_gather_into_tensor")
_TOLERANCE = 2**-7
"""Relative error: sending a number in bfloat16 rounds it by 2^-9, and its square by twice as much."""
_LARGEST = 4096
"""Largest number of entries of a tensor that may hold norms; larger tensors are gradients or weights."""


class Shards:
    """Norms of local shards that no collective has combined yet.

    Args:
        report: Called with a line that read the norm of one shard and did not combine it with the other ranks.
    """

    def __init__(self, report: Callable[[Site], None]) -> None:
        self._report = report
        self._pending: list[tuple[Site, float]] = []
        self.is_watching = False

    def watch(self, patches: Patches) -> None:
        """Watches reads of DTensors, and collectives."""
        import torch.distributed._functional_collectives as functional
        from torch import distributed
        from torch.distributed.tensor import DTensor

        self.is_watching = True
        for name in _READS:
            patches.replace(DTensor, name, self._on_read)
        for name in _COLLECTIVES:
            patches.redirect(getattr(distributed, name), self._on_collective)
        patches.redirect(distributed.all_gather_object, self._on_objects)
        patches.replace(functional, "all_reduce", self._on_collective)

    def add(self, site: Site, norm: Any) -> None:
        """Adds the norm of a local shard."""
        if isinstance(norm, Tensor) and norm.numel() == 1:
            self._pending.append((site, float(norm)))

    def settle(self) -> None:
        """Reports the norms that no collective has combined."""
        for site in dict.fromkeys(site for site, _ in self._pending):
            self._report(site)
        self._pending.clear()

    def _on_read(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def read(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            value = original(tensor, *args, **kwargs)
            if torch.compiler.is_compiling():
                return value
            frame = sys._getframe(1)
            # PyTorch itself reads local parts in order to combine them.
            if (
                tensor.ndim == 0
                and is_part(tensor)
                and not is_own(frame)
                and not _is_torch(frame.f_globals.get("__name__", ""))
            ):
                self._pending.append((call_site(frame), float(value)))
            return value

        return read

    def _on_collective(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def collective(*args: Any, **kwargs: Any) -> Any:
            # A DTensor communicates for its own operations; that combines no local norm of the user.
            sender = sys._getframe(1).f_globals.get("__name__", "")
            if self._pending and not sender.startswith("torch.distributed.tensor."):
                tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and not is_sharded(x)]
                numbers = [v for x in tensors if x.numel() <= _LARGEST for v in x.detach().flatten().tolist()]
                self._put_together(numbers)
            return original(*args, **kwargs)

        return collective

    def _on_objects(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def collective(*args: Any, **kwargs: Any) -> Any:
            self._pending.clear()  # objects may hold anything
            return original(*args, **kwargs)

        return collective

    def _put_together(self, numbers: list[Any]) -> None:
        """Forgets the norms of every line whose norms, squares or sums are among the numbers that are sent."""
        for site in {site for site, _ in self._pending}:
            norms = [norm for other, norm in self._pending if other == site]
            squares = [norm * norm for norm in norms]
            sums = [sum(norms), sum(squares), math.sqrt(sum(squares))]
            if any(math.isclose(x, y, rel_tol=_TOLERANCE) for x in numbers for y in (*norms, *squares, *sums)):
                self._pending = [each for each in self._pending if each[0] != site]


def _is_torch(module: str) -> bool:
    return module == "torch" or module.startswith("torch.")
