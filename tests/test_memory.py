"""memory: where memory runs out a call is made once more, and only there."""

import gc
import weakref

import pytest
import torch

from smoothdiag.memory import is_out_of_memory, retried

ERRORS = {
    "device": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
    "host": (MemoryError(), True),
    "cpu": (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 b"), True),
    "windows": (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
    "cublas": (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
    "mps": (RuntimeError("MPS backend out of memory (MPS allocated: 9.01 GB)"), True),
    "system": (OSError(12, "Cannot allocate memory"), True),
    "shape": (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
    "disk": (OSError(28, "No space left on device"), False),
    "value": (ValueError("out of memory"), False),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", ERRORS)
def test_only_a_lack_of_memory_is_tried_again(name) -> None:
    error, is_memory = ERRORS[name]
    calls = []

    def call():
        calls.append(len(calls))
        if len(calls) == 1:
            raise error
        return "done"

    assert is_out_of_memory(error) == is_memory
    if is_memory:
        assert retried(call) == "done"
    else:
        with pytest.raises(type(error)):
            retried(call)
    assert len(calls) == 1 + is_memory


def test_a_second_lack_is_passed_on() -> None:
    calls = []

    def call():
        calls.append(0)
        raise MemoryError(len(calls))

    with pytest.raises(MemoryError, match="2"):
        retried(call)
    assert len(calls) == 2


def test_what_the_first_call_had_allocated_is_given_back_before_the_second() -> None:
    held = []

    def call():
        if held:
            return held[0]() is None
        tensor = torch.zeros(8)
        held.append(weakref.ref(tensor))
        raise MemoryError

    gc.disable()
    try:
        assert retried(call)
    finally:
        gc.enable()
