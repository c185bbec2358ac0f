"""Recorder: hands every forward pass of a loop to a probe, as a tape."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from smoothdiag.doctor.patches import Patches
from smoothdiag.launch.tape import Tape, size_of
from smoothdiag.measure.loss.objective import Objective

Function = Callable[..., Any]


class Recorder:
    """Notes what the loop computes between the first call of a module and backward, for steps that are measured.

    A tape begins with the first call of a module that holds a parameter of a watched optimizer, and ends when backward
    is called on something that it has computed. While a module runs, nothing is noted: the call as a whole is.

    Args:
        patches: The stack that puts the original functions back.
        begins: Called before the first call of a module in a forward pass, with the module and an empty tape; returns
            whether to note the pass.
    """

    def __init__(self, patches: Patches, begins: Callable[[nn.Module, Tape, int], bool]) -> None:
        self._begins = begins
        self._mode = _Mode(self)
        self._tape: Tape | None = None
        self._is_inside = False
        self._thread, self._process = threading.get_ident(), os.getpid()
        self._call = nn.Module.__call__
        self._around = functools.wraps(self._call)(lambda module, *args, **kwargs: self._on_call(module, args, kwargs))
        patches.callback(self._leave)
        self._watch(is_on=True)
        patches.callback(lambda: self._watch(is_on=False))
        patches.replace(torch.autograd, "backward", self._on_backward)
        patches.replace(torch.amp.GradScaler, "scale", self._on_scale)

    @property
    def tape(self) -> Tape | None:
        """The tape that is running; ``None`` if none is."""
        return None if self._is_inside else self._tape

    def drop(self) -> None:
        """Ends the tape that is running, as at the step of an optimizer."""
        self._tape = None
        self._leave()

    def _watch(self, *, is_on: bool) -> None:
        nn.Module.__call__ = self._around if is_on else self._call  # type: ignore[method-assign]

    def _on_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._is_off():
            return self._call(module, *args, **kwargs)
        if self._tape is None or self._tape.roots:
            size = size_of(args, kwargs)
            fresh = Tape()
            self._tape = None
            if not self._begins(module, fresh, size):
                return self._within(lambda: self._call(module, *args, **kwargs))
            self._tape = fresh
        tape = self._tape
        self._leave()
        result = self._within(lambda: tape.call(module, args, kwargs))
        self._enter()
        return result

    def _is_off(self) -> bool:
        """Returns whether a call is none of the loop: nested, recomputed, measured, traced, or from elsewhere."""
        return (
            self._is_inside
            or torch.compiler.is_compiling()
            or not torch.is_grad_enabled()
            or bool(Objective.num_isolated)
            or torch._C._current_graph_task_id() != -1
            or threading.get_ident() != self._thread
            or os.getpid() != self._process
        )

    def _within(self, run: Callable[[], Any]) -> Any:
        # The patch is taken off, so that torch.compile meets the class as it is, and modules within take no detour.
        self._is_inside = True
        self._watch(is_on=False)
        try:
            return run()
        finally:
            self._watch(is_on=True)
            self._is_inside = False

    def _enter(self) -> None:
        if _top() is not self._mode and (_top() is None or _is_default_device(_top())):
            self._mode.__enter__()  # type: ignore[no-untyped-call]

    def _leave(self) -> None:
        """Takes the mode off the stack; if another one was put on top of it, it stays there until that one is off."""
        if _top() is self._mode:
            self._mode.__exit__(None, None, None)

    def _on_backward(self, original: Function) -> Function:
        def backward(tensors: Any = None, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> Any:
            tape = self.tape
            # Reentrant checkpoints call backward within a backward pass.
            is_loops = not Objective.num_isolated and torch._C._current_graph_task_id() == -1
            if tape is not None and is_loops and threading.get_ident() == self._thread:
                roots: Sequence[Tensor] = [tensors] if isinstance(tensors, Tensor) else list(tensors or ())
                if all(isinstance(root, Tensor) and tape.end(root) for root in roots) and roots:
                    if grad_tensors is not None or any(root.numel() != 1 for root in roots):
                        tape.refusal = "backward was called with gradients of its own, and not on one loss"
                elif tape.roots or roots:
                    tape.refusal = tape.refusal or (
                        "backward was called on a tensor that follows from no call of a module or function that shows"
                    )
                self._leave()
            return original(tensors, grad_tensors, *args, **kwargs)

        return backward

    def _on_scale(self, original: Function) -> Function:
        def scale(scaler: Any, outputs: Any) -> Any:
            tape, self._tape = self.tape, None
            scaled = original(scaler, outputs)
            self._tape = tape
            if tape is not None:
                tape.same(scaled, outputs)  # the scaler divides its factor out again before the step
            return scaled

        return scale


class _Mode(TorchFunctionMode):
    """Shows the functions of torch that a loop calls to the tape that is running.

    Args:
        recorder: Knows the tape.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Function, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        tape = self._recorder.tape
        if tape is None or tape.roots or func is Tensor.backward:
            return func(*args, **kwargs)
        return tape.call(func, args, kwargs)


def _top() -> Any:
    """Returns the innermost mode for functions of torch that is on now; ``None`` without any."""
    number = torch._C._len_torch_function_stack()
    return torch._C._get_function_stack_at(number - 1) if number else None


def _is_default_device(mode: Any) -> bool:
    """Returns whether a mode is that of `torch.set_default_device`, which nobody takes off within a step."""
    context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    return mode is context
