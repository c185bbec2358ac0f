"""Guards: what has to be switched off for a while so that a loss can be differentiated twice, and exactly."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Replaces what has no second derivative: fused attention, compiled graphs, fused recurrence."""
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled, and importing it takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            # Fused on a CPU it can be, but takes a third longer. The public switch also sets how TF32 is used, and
            # warns of that.
            stack.callback(torch._C._set_mkldnn_enabled, torch._C._get_mkldnn_enabled())
            torch._C._set_mkldnn_enabled(False)
        yield


@contextmanager
def autocast_off(devices: Iterable[str]) -> Iterator[None]:
    """Makes autocast regions on these types of devices do nothing, those that are opened inside too.

    There is no public way to switch off a region that ``loss_fn`` opens itself, so the method that opens one is
    replaced meanwhile, for all threads: backward passes and replicas run in threads of their own.
    """
    kind = torch.autocast
    enter: Callable[[Any], Any] = kind.__enter__

    def disabled(self: Any) -> Any:
        wanted, self._enabled = self._enabled, False
        try:
            return enter(self)
        finally:
            self._enabled = wanted

    with ExitStack() as stack:
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        kind.__enter__ = disabled  # type: ignore[method-assign]
        try:
            yield
        finally:
            kind.__enter__ = enter  # type: ignore[method-assign]
