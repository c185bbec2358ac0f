"""What a call holds, waits for and sends: bytes at the peak, waits for the device, collectives of the library."""

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import smoothdiag
from smoothdiag import vectors

PACKAGE = str(Path(smoothdiag.__file__).parent)
READS = frozenset({"aten::_local_scalar_dense", "aten::equal", "aten::nonzero"})
"""Operators whose result the host waits for. ``float``, ``bool``, ``item`` and comparisons all end in one of them."""

HOST_ONLY = frozenset({("adapters/updates.py", "number")})
"""Functions of the library that read a number only if it lies in host memory, where nobody has to wait."""

COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "barrier", "broadcast",
    "broadcast_object_list", "reduce", "reduce_scatter_tensor", "scatter",
)  # fmt: skip


def peak(call: Callable[[], object], device: torch.device) -> float:
    """Returns the largest number of bytes that tensors made in ``call`` held at once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - held
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(str(path := Path(folder) / "trace.json"))
        events = json.loads(path.read_text())["traceEvents"]
    held = most = 0
    for _, size in sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"):
        held += size
        most = max(most, held)
    return float(most)


class Waits(TorchDispatchMode):
    """Counts, on a CPU, where the host would wait for a device, by the line of the library that waits.

    Only waits of the library count, and not those of `HOST_ONLY`. Reads by torch's own optimizers do not count: their
    step counts lie in host memory. A read of a tensor that was copied to the host before is no second wait. What a CPU
    cannot show are waits of kernels (``torch.linalg`` checks its results) and of copies from the host to the device.

    Attributes:
        reads: Number of reads by line, as "file:line".
        synchronized: Number of calls of ``vectors.synchronize``, each of which waits where a device is at work.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads, self.synchronized = Counter[str](), 0
        self._stack, self._on_host, self._inside = ExitStack(), list[Tensor](), False

    @property
    def number(self) -> int:
        return self.reads.total()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.name in READS:
            self._note(args[0])
        return function(*args, **(kwargs or {}))

    def __enter__(self) -> "Waits":
        copied, listed, synchronize = Tensor.cpu, Tensor.tolist, vectors.synchronize

        def cpu(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self._note(x)
            # A tensor of its own, as a device would give it.
            self._on_host.append(copied(x, *args, **kwargs).detach().clone())
            return self._on_host[-1]

        def tolist(x: Tensor) -> Any:
            self._note(x)
            self._inside = True
            try:
                return listed(x)
            finally:
                self._inside = False

        def synchronizing(a: vectors.Vector) -> None:
            self.synchronized += 1
            synchronize(a)

        self._stack.enter_context(mock.patch.object(Tensor, "cpu", cpu))
        self._stack.enter_context(mock.patch.object(Tensor, "tolist", tolist))
        self._stack.enter_context(mock.patch.object(vectors, "synchronize", synchronizing))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def _note(self, x: Tensor) -> None:
        if self._inside or any(x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr() for y in self._on_host):
            return
        if (line := line_of_library()) is not None:
            self.reads[line] += 1


def line_of_library() -> str | None:
    """Returns the line of the library that is running; ``None`` if none is, or if it never waits for a device."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE):
            path = Path(name).relative_to(PACKAGE).as_posix()
            return None if (path, frame.f_code.co_name) in HOST_ONLY else f"{path}:{frame.f_lineno}"
        frame = frame.f_back
    return None


@contextmanager
def collectives() -> Iterator[Counter[str]]:
    """Yields a count of the collectives that the library calls itself, by name."""
    counts = Counter[str]()

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += sys._getframe(1).f_globals.get("__name__", "").startswith("smoothdiag")
            return real(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for name in COLLECTIVES:
            stack.enter_context(mock.patch.object(dist, name, counted(name)))
        yield counts
