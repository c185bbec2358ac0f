"""Reading: shows to an Observer which norms a loop reads."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from smoothdiag.doctor.observer import Observer
from smoothdiag.doctor.patches import Patches
from smoothdiag.doctor.sites import StepCode, call_site, caller, is_library, is_own

Function = Callable[..., Any]
_TENSORS: Final = ("input", "self", "x")


class Reading:
    """Watches the functions that return norms.

    Args:
        observer: Follows the loop.
        patches: The stack that puts the original functions back.
        code: The code that runs within steps of optimizers.
        is_off: Whether to ignore the current call.
        run: Calls a function without looking at the calls inside.
    """

    def __init__(
        self,
        observer: Observer,
        patches: Patches,
        code: StepCode,
        is_off: Callable[[], bool],
        run: Callable[[Callable[[], Any]], Any],
    ) -> None:
        self._observer, self._code, self._is_off, self._run = observer, code, is_off, run
        patches.redirect(nn.utils.get_total_norm, self._on_total_norm)
        # Tensor.norm and torch.norm call vector_norm; torch.jit.script would reject replacements of the two callers.
        for owner, name in ((torch.linalg, "vector_norm"), (torch.linalg, "norm"), (torch, "_foreach_norm")):
            patches.replace(owner, name, self._on_norm)

    def _on_norm(self, original: Function) -> Function:
        def norm(*args: Any, **kwargs: Any) -> Any:
            if self._is_off():
                return original(*args, **kwargs)
            given = args[0] if args else kwargs.get(next((each for each in _TENSORS if each in kwargs), ""))
            found = self._observer.find(given if isinstance(given, list | tuple) else [given])
            value = self._run(functools.partial(original, *args, **kwargs))
            frame = sys._getframe(1)
            if found and not is_own(caller(frame)):
                code = self._code.nearest(frame)
                if code not in self._code.methods:
                    may_be_stale = code is None or not is_library(code.co_filename)
                    self._observer.norm(found, call_site(frame), value, may_be_stale=may_be_stale)
            return value

        return norm

    def _on_total_norm(self, original: Function) -> Function:
        watched = self._on_norm(original)

        def get_total_norm(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            if self._is_off():
                return original(tensors, *args, **kwargs)
            return watched(tensors if isinstance(tensors, Tensor) else list(tensors), *args, **kwargs)

        return get_total_norm
