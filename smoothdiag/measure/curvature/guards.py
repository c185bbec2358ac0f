"""Guards: switch off for a while what keeps a loss from being differentiated twice and exactly."""

import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Replaces operations without a second derivative: fused attention, compiled graphs, fused recurrence."""
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if "torch._dynamo" in sys.modules:  # if not, nothing is compiled, and importing it takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            # On a CPU fused recurrence has a second derivative, but takes a third longer. The public switch also sets
            # how TF32 is used, and warns about it.
            stack.callback(torch._C._set_mkldnn_enabled, torch._C._get_mkldnn_enabled())
            torch._C._set_mkldnn_enabled(False)
        yield


_enter = torch.autocast.__enter__
_lock = threading.Lock()
_quiet: Counter[int] = Counter()
"""Threads that want no autocast, with the number of open requests."""


@contextmanager
def autocast_off(devices: Iterable[str]) -> Iterator[None]:
    """Makes autocast regions of this thread do nothing on these types of devices, also regions opened inside.

    There is no public way to switch off a region that ``loss_fn`` opens itself, so the method that opens regions is
    replaced meanwhile. Backward passes in other threads recompute with the settings of the forward pass.
    """
    me = threading.get_ident()
    with ExitStack() as stack:
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        with _lock:
            _quiet[me] += 1
            torch.autocast.__enter__ = _enter_unless_quiet  # type: ignore[method-assign]
        try:
            yield
        finally:
            with _lock:
                _quiet[me] -= 1
                if not +_quiet:
                    _quiet.clear()
                    torch.autocast.__enter__ = _enter  # type: ignore[method-assign]


def _enter_unless_quiet(self: Any) -> Any:
    wanted = self._enabled
    self._enabled = wanted and not _quiet[threading.get_ident()]
    try:
        return _enter(self)  # type: ignore[no-untyped-call]
    finally:
        self._enabled = wanted
