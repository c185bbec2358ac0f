"""Stretches: cuts parameters into stretches of a size that a processor handles well."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from torch import Tensor

from smoothdiag import vectors
from smoothdiag.adapters.updates import Stretch
from smoothdiag.autoclip.buckets import are_plain

ON_CPU, ON_DEVICE = 2**18, 2**24
"""Numbers in a stretch. On a CPU what is computed from them stays in the cache; on a device they keep it busy."""


def cut(held: Sequence[Tensor], state: Mapping[Tensor, Mapping[str, Any]]) -> list[Stretch]:
    """Returns stretches of parameters: many small ones together, and large ones in parts."""
    alike: dict[Any, list[Tensor]] = {}
    plain = are_plain(held)
    for p in held:
        count = state.get(p, {}).get("step", 0.0)
        key = (p.dtype, p.device, None if is_on_device(count) else float(count)) if plain else id(p)
        alike.setdefault(key, []).append(p)
    return [
        Stretch(owners, [state.get(p, {}) for p in owners], part)
        for members in alike.values()
        for owners, part in _parts_of(members)
    ]


def _parts_of(members: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], slice | None]]:
    most = ON_CPU if members[0].device.type == "cpu" else ON_DEVICE
    together: list[Tensor] = []
    size = 0
    for p in members:
        if len(members) > 1 and 8 * p.numel() <= most:
            together.append(p)
            size += p.numel()
            if size >= most:
                yield together, None
                together, size = [], 0
            continue
        local = vectors.local(p)
        # Of a tensor that does not lie in one piece, every part would be a copy of the whole.
        whole = not local.is_contiguous() or (p.grad is not None and not vectors.local(p.grad).is_contiguous())
        if whole or local.numel() <= most:
            yield [p], None
        else:
            yield from (([p], slice(begin, begin + most)) for begin in range(0, local.numel(), most))
    if size:
        yield together, None


def is_on_device(count: Any) -> TypeGuard[Tensor]:
    """Returns whether a number of steps lies on a device, which would have to be waited for."""
    return isinstance(count, Tensor) and count.device.type != "cpu"
