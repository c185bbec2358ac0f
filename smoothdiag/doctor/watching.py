"""watch: shows the calls of a training loop to an Observer, without changing what the loop computes."""

from __future__ import annotations

import functools
import inspect
import math
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import GeneratorType
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from smoothdiag.adapters.wrappers import innermost, pending_scale
from smoothdiag.doctor.by_hand import leaves
from smoothdiag.doctor.frameworks import helper
from smoothdiag.doctor.given import Call
from smoothdiag.doctor.gradients import Owner, is_scaled
from smoothdiag.doctor.observer import Observer
from smoothdiag.doctor.patches import Patches
from smoothdiag.doctor.reading import Reading
from smoothdiag.doctor.report import Report
from smoothdiag.doctor.scaling import Scaling
from smoothdiag.doctor.sites import (
    Site,
    StepCode,
    call_site,
    caller,
    hook_on_gradients,
    is_own,
    is_result_used,
)

Function = Callable[..., Any]
_LIMITS: Final = ("max_norm", "clip_value")
_LARGEST: Final = math.sqrt(torch.finfo(torch.float32).max)
"""The largest norm in single precision: the square of a larger one is infinite."""


@contextmanager
def watch(model: nn.Module, *optimizers: Optimizer) -> Iterator[Report]:
    """Watches a training loop for mistakes around gradient clipping.

    Weights, buffers and random states stay bit for bit the same. At the end, all patches are removed.

    Args:
        model: The model being trained.
        *optimizers: Its optimizers. Others that step parameters of the model are found without being named.

    Yields:
        The report, which can be read at any time.

    Raises:
        ValueError: If ``model`` is no module, or an optimizer holds no parameter of the model.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            "Parameter `model` should be a torch.nn.Module, and come first: watch(model, optimizer). "
            f"Found {type(model).__name__}."
        )
    mine = {id(p) for p in model.parameters()}

    def is_watched(optimizer: Optimizer) -> bool:
        return any(id(p) in mine for group in optimizer.param_groups for p in group["params"])

    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer) or not is_watched(optimizer):
            raise ValueError(
                "Parameter `optimizers` should be torch.optim.Optimizers that hold parameters of `model`. "
                f"Found {type(optimizer).__name__}."
            )
    with watch_all(is_watched, holds=lambda p: id(p) in mine) as watcher:
        for optimizer in optimizers:
            watcher.own(optimizer)
        yield Report(watcher.observer)


@contextmanager
def watch_all(
    is_watched: Callable[[Optimizer], bool] | None = None,
    *,
    holds: Callable[[Tensor], bool] | None = None,
    steps: int | None = None,
) -> Iterator[Watcher]:
    """Watches every optimizer, or those that ``is_watched`` accepts, from their making or their first step on.

    Only the thread that makes the first optimizer is watched. Reading a gradient while another thread writes it would
    crash.

    Args:
        is_watched: Whether to watch an optimizer.
        holds: Whether to watch a parameter in a loop without an optimizer; ``None`` watches all.
        steps: After how many steps to raise ``StepsDone``.
    """
    with Patches() as patches:
        watcher = Watcher(patches, is_watched, holds, steps)
        try:
            yield watcher
        finally:
            watcher.observer.shards.settle()
            if not watcher.observer.register.has_optimizers:
                watcher.observer.update_by_hand(())


class StepsDone(BaseException):
    """Ends a run after the requested number of steps; ``except Exception`` in a loop does not catch it."""


class Watcher:
    """Puts the patches in place.

    Args:
        patches: The stack that puts the original functions back.
        is_watched: Whether to watch an optimizer; ``None`` watches all.
        holds: Whether to watch a parameter in a loop without an optimizer; ``None`` watches all.
        steps: After how many steps to raise ``StepsDone``.
    """

    def __init__(
        self,
        patches: Patches,
        is_watched: Callable[[Optimizer], bool] | None = None,
        holds: Callable[[Tensor], bool] | None = None,
        steps: int | None = None,
    ) -> None:
        self.observer = Observer()
        self._patches, self._sees_all, self._limit = patches, is_watched is None, steps
        self._is_watched = is_watched or (lambda optimizer: True)
        self._holds = holds or (lambda parameter: True)
        self._depth = 0
        self._is_busy = False
        self._iterators: dict[Site, Any] = {}  # the latest iterator that each line gave to a clip
        self._thread: int | None = None
        self._code = StepCode()
        utils = nn.utils
        patches.redirect(utils.clip_grad_norm_, self._on_clip)
        patches.redirect(utils.clip_grad_value_, self._on_clip)
        patches.redirect(utils.clip_grads_with_norm_, self._on_clip)
        Reading(self.observer, patches, self._code, self._is_off, self._run)
        patches.replace(torch.autograd, "backward", self._on_backward)
        Scaling(self.observer, patches, self._is_off, lambda each: self.own(each) if self._is_watched(each) else None)
        patches.replace(Optimizer, "__init__", self._on_new_optimizer)
        patches.callback(register_optimizer_step_pre_hook(self._before_step).remove)
        patches.callback(register_optimizer_step_post_hook(self._after_step).remove)

    def own(self, optimizer: Optimizer) -> Owner:
        """Starts to follow an optimizer, or the inner optimizer if it wraps another."""
        if self._thread is None:
            self._thread = threading.get_ident()
        self._code.add(optimizer)
        owner = self.observer.register.own(innermost(optimizer))
        if self.observer.register.has_shards and not self.observer.shards.is_watching:
            self.observer.shards.watch(self._patches)
        return owner

    def look_at_updates(self, parameters: Iterable[Tensor]) -> None:
        """Looks for updates written by hand, in a loop that no optimizer is part of.

        Raises:
            StepsDone: If there have been as many as were asked for.
        """
        if not self.observer.register.has_optimizers:
            self._run(lambda: self.observer.update_by_hand(p for p in parameters if self._holds(p)))
            self._end_if_done()

    def _end_if_done(self) -> None:
        if self._limit is not None and self.observer.steps >= self._limit:
            raise StepsDone

    def _is_off(self) -> bool:
        """Returns whether to ignore a call: it is traced, part of another watched call, or from another thread."""
        if torch.compiler.is_compiling() or self._is_busy:
            return True
        here = threading.get_ident()
        if self._thread is None or here == self._thread:
            return False
        # On GPUs, threads of the autograd engine run the hooks of parameters. Python did not start these threads.
        others = {each.ident for each in threading.enumerate() if not isinstance(each, threading._DummyThread)}
        return self._depth == 0 or here in others

    def _on_clip(self, original: Function) -> Function:
        signature = inspect.signature(original)

        def clip(*args: Any, **kwargs: Any) -> Any:
            if self._is_off() or is_own(frame := caller(sys._getframe(1))):
                return original(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            given = bound.arguments["parameters"]
            site = call_site(frame)
            is_generator = isinstance(given, GeneratorType)
            is_used_up = is_generator and given.gi_frame is None
            parameters = [given] if isinstance(given, Tensor) else list(given)
            if isinstance(given, Iterator):  # filter, map, chain: used up if it comes again and is empty
                is_used_up = is_used_up or (not parameters and self._iterators.get(site) is given)
                self._iterators[site] = given
            # A generator stays one, because PyTorch warns of an empty generator.
            bound.arguments["parameters"] = (p for p in parameters) if is_generator else parameters
            call = Call(
                site,
                returns_norm="norm_type" in signature.parameters and is_result_used(frame),
                is_after_step=self._code.is_after_step(frame),
                is_used_up=is_used_up,
                limit=_limit(bound.arguments),
                by_value="clip_value" in signature.parameters,
                norm_type=bound.arguments.get("norm_type", 2.0),
                total_norm=bound.arguments.get("total_norm"),
            )
            run = functools.partial(original, *bound.args, **bound.kwargs)
            return self._watched_clip(parameters, bound.arguments, call, run)

        return clip

    def _watched_clip(
        self, parameters: list[Tensor], arguments: dict[str, Any], call: Call, run: Callable[[], Any]
    ) -> Any:
        observer, is_by_norm = self.observer, not call.by_value and call.limit is not None
        if not observer.register.has_optimizers:
            self.look_at_updates(p for p in parameters if getattr(p, "grad", None) is not None)
        held = observer.register.held(parameters)
        is_as_norm = is_by_norm and call.limit is not None and call.limit > _LARGEST
        if held or self._sees_all:
            observer.threshold(call)
        if not held:
            if not is_as_norm and (self._sees_all or not parameters):
                observer.clip_of_others(parameters, call)
            return self._run(run)
        is_of_use = not is_as_norm and observer.before_clip(parameters, held, call)
        if is_as_norm:
            observer.clip_as_norm(held, call.site, is_harmful=call.limit == math.inf and call.returns_norm)
        lasting = ("stepped", "clipped", "read") if is_as_norm else ("stepped",)
        marks = [(each, mark) for each in held for mark in each.marks(*lasting)]
        known = [each.is_known for each in held]
        result = self._run(run)
        for each, mark in marks:
            mark.renew(each.gradient)
        if not is_as_norm:
            observer.after_clip(held, known, call)
        if is_by_norm and call.returns_norm:
            observer.old_norms.read(held, call.site, result, observer.passes)
        if is_by_norm and is_of_use:
            observer.bind(call.site, arguments.get("total_norm", result), call.limit)
        observer.after_update_of_gradients()
        return result

    def _run(self, run: Callable[[], Any]) -> Any:
        self._is_busy = True
        try:
            return run()
        finally:
            self._is_busy = False

    def _on_backward(self, original: Function) -> Function:
        def backward(*args: Any, **kwargs: Any) -> Any:
            if self._is_off() or is_own(caller(sys._getframe(1))):  # a probe that measures trains nothing
                return original(*args, **kwargs)
            if self._depth == 0:
                losses = args[0] if args else kwargs.get("tensors", ())
                if not self.observer.register.has_optimizers:
                    self.look_at_updates(leaves(losses))
                self.observer.before_backward(self.observer.uses_scaler and is_scaled(losses))
            self._depth += 1
            try:
                return original(*args, **kwargs)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.observer.after_backward()

        return backward

    def _on_new_optimizer(self, original: Function) -> Function:
        def __init__(optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
            original(optimizer, *args, **kwargs)
            if not self._is_off() and self._is_watched(optimizer):
                self.own(optimizer)

        return __init__

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._is_off() or not self._is_watched(optimizer):
            return
        owner, frame = self.own(optimizer), sys._getframe(1)
        if not owner.enter(frame):
            return
        # The first argument is the optimizer.
        owner.closure = self._code.closure(each for each in (*args[1:], *kwargs.values()) if callable(each))
        owner.in_backward = self._depth > 0
        owner.framework = owner.framework or helper(caller(frame))
        divides = pending_scale(optimizer) is not None
        hook = hook_on_gradients(optimizer) if divides else ""
        owner.step_site = call_site(frame) if owner.in_backward else None
        self._run(lambda: self.observer.before_step(owner, lambda: call_site(frame), hook, divides=divides))

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._is_off():
            owner = self.observer.register.owner(innermost(optimizer))
            if owner is not None and owner.frame == id(sys._getframe(1)):
                frame = sys._getframe(1)
                self._run(lambda: self.observer.after_step(owner, lambda: call_site(frame)))
                self._end_if_done()


def _limit(arguments: dict[str, Any]) -> float | None:
    """Returns the threshold of a clip; ``None`` if it is no number, of which PyTorch will complain."""
    try:
        return next((float(arguments[each]) for each in _LIMITS if each in arguments), None)
    except (TypeError, ValueError):
        return None
