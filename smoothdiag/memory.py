"""Memory: recognises that memory ran out, frees what can be freed, and tries again."""

from __future__ import annotations

import errno
import gc
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

_SAID = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error says that memory ran out, on a device or on the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # The allocator of the CPU, cuBLAS, MPS and others raise a plain RuntimeError.
    return isinstance(error, RuntimeError) and any(said in str(error).lower() for said in _SAID)


def retried(call: Callable[[], T]) -> T:
    """Returns ``call()``; if memory runs out, frees unused memory and calls once more.

    It must be safe to make the call twice, so it should be pure or a single operation in place. It should contain no
    collective, because the other ranks would not repeat it.
    """
    try:
        return call()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    # Memory can only be freed here, after the error is gone: its traceback holds on to all that the call allocated.
    free()
    return call()


def free() -> None:
    """Frees the memory of garbage, and the memory that the allocators of accelerators keep for later."""
    gc.collect()
    for backend in (torch.cuda, torch.xpu):
        if backend.is_available() and backend.is_initialized():
            backend.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
