"""Bookkeeping: the counters and lists of an object, put back after a loss was evaluated again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

MOST = 1024
"""Elements of a tensor up to which it is taken for a running sum, and copied."""


@contextmanager
def unrecorded(owner: object) -> Iterator[None]:
    """Within it, what code keeps in the attributes of ``owner`` is put back at the end.

    That is the attributes themselves, the entries of dictionaries in them, what is appended to lists, and small tensors
    that are added to in place. Other objects are left alone, and so is what is written over within a list.
    """
    restore = list(_restoring(vars(owner), set()))
    try:
        yield
    finally:
        for put_back in restore:
            put_back()


def _restoring(value: Any, seen: set[int]) -> Iterator[Callable[[], object]]:
    """Yields what gives a container or tensor, and those within, the content that they have now."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, dict):
        entries = dict(value)
        yield partial(_refill, value, entries)
        for entry in entries.values():
            yield from _restoring(entry, seen)
    elif isinstance(value, list):
        yield partial(value.__delitem__, slice(len(value), None))
    elif isinstance(value, Tensor) and value.numel() <= MOST and not (value.requires_grad or value.is_inference()):
        yield partial(value.copy_, value.clone())


def _refill(value: dict[Any, Any], entries: dict[Any, Any]) -> None:
    for key in [key for key in value if key not in entries]:
        del value[key]
    value.update(entries)
