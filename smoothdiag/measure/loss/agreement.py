"""Agreement: how ranks find out, without a collective, that all of them failed at the same place."""

import itertools
import json
import time
import zlib
from collections.abc import Sequence

import torch.distributed as dist

WAIT = 30.0
"""Seconds that a failed rank waits for the others to fail too."""

PAUSE = 0.02
"""Seconds between two looks at the notes of other ranks in the store."""

_attempts = itertools.count()


def all_failed(ranks: Sequence[int]) -> bool:
    """Returns whether all ranks call this within ``WAIT`` seconds, after the same number of collectives.

    Call it after a fault. A failed rank must not ask by a collective, because the other ranks may be waiting for it in
    a different collective. The ranks leave notes in the key-value store through which they met at the start instead.
    """
    if len(ranks) == 1:
        return True
    try:
        return _agreed(dist.distributed_c10d._get_default_store(), ranks, positions())
    except (RuntimeError, ValueError, AttributeError):  # the store is gone, or a backend does not count
        return False


def positions() -> dict[str, list[int]]:
    """Returns how many collectives this rank has called in each of its groups, by device."""
    found = {}
    for group, name in dist.distributed_c10d._world.pg_names.items():
        if group.size() > 1:
            backends = [group._get_backend(device) for device in sorted(group._device_types, key=str)]
            found[str(name)] = [b._get_sequence_number_for_group() for b in backends]  # type: ignore[attr-defined]
    return found


def _agreed(store: "dist.distributed_c10d.Store", ranks: Sequence[int], note: dict[str, list[int]]) -> bool:
    keys = keys_of(ranks, next(_attempts))
    attempt = keys[0].rpartition("/")[0]
    store.set(f"{attempt}/{dist.get_rank()}", json.dumps(note))
    deadline = time.monotonic() + WAIT
    while not (is_complete := store.check(keys)) and time.monotonic() < deadline:
        time.sleep(PAUSE)
    goes_on = is_complete and _is_consistent([json.loads(store.get(key)) for key in keys])
    # A rank that arrives just after another one has given up must not go on alone: the first decision holds for all.
    return bool(store.compare_set(f"{attempt}/decision", "", "go on" if goes_on else "stop") == b"go on")


def keys_of(ranks: Sequence[int], attempt: int) -> list[str]:
    """Returns the keys under which the ranks leave their notes."""
    among = zlib.crc32(json.dumps(sorted(ranks)).encode())
    return [f"smoothdiag/fault/{among}/{attempt}/{rank}" for rank in ranks]


def _is_consistent(notes: Sequence[dict[str, list[int]]]) -> bool:
    """Returns whether, in every group, all ranks have called the same number of collectives."""
    names = {name for note in notes for name in note}
    return all(len({tuple(note[name]) for note in notes if name in note}) == 1 for name in names)
