"""Turns: one step of training, from before the first optimizer that takes it begins until after the last has ended."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import torch

from smoothdiag.adapters.joint import Joint, finish, members

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of an optimizer's ``step``, the optimizer first."""


STATE_MAKERS = frozenset({"_init_optim_state", "init_optim_state"})
"""Functions of torch.distributed.checkpoint and torchtitan that let an optimizer create its state before it is saved or
loaded, by a step with zero gradients at rate 0. Under SGD, which keeps none, they do so for every checkpoint."""

DEPTH = 4
"""Most functions between such a function and the hooks of a step: a schedule, for one, wraps ``step``."""


class Outermost:
    """Tells the outermost of nested calls from the inner ones.

    If the step of a subclass calls super().step(), the hooks run twice, and only the outer pair counts. A step that
    raised an error leaves its frame here, but that frame is no longer on the stack.
    """

    def __init__(self) -> None:
        self._outer: FrameType | None = None

    def enter(self, frame: FrameType) -> bool:
        """Returns whether the call of ``frame`` is the outermost; to be asked before the call does its work."""
        if self.is_open(frame):
            return False
        self._outer = frame
        return True

    def is_open(self, frame: FrameType) -> bool:
        """Returns whether ``frame`` runs within the outermost call."""
        below: FrameType | None = frame
        while self._outer is not None and below is not None:
            if below is self._outer:
                return True
            below = below.f_back
        return False

    def leave(self, frame: FrameType) -> bool:
        """Returns whether the call of ``frame`` is the outermost; to be asked after the call has done its work."""
        if self._outer is not frame:
            return False
        self._outer = None
        return True


class Turn:
    """Follows the steps of an optimizer, or of several that step one after the other.

    A step of several begins before the first of them steps, and ends once each of them has stepped. If one is left out,
    it ends when `Joint.finish` is called, or right before one of them steps for the second time.

    Args:
        optimizer: The optimizer; a `Joint` for several.
        before: Called with the arguments of the optimizer that begins; may return others.
        after: Called when the step has ended.
        between: Called after the step of each optimizer but the last, with those that have not stepped.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        before: Callable[[tuple[Any, ...], dict[str, Any]], Arguments | None],
        after: Callable[[], None] = lambda: None,
        between: Callable[[list[torch.optim.Optimizer]], None] = lambda waiting: None,
    ) -> None:
        self._optimizer, self._before, self._after, self._between = optimizer, before, after, between
        self._outermost = {id(member): Outermost() for member in members(optimizer)}
        self._stepped: set[int] = set()
        self._handles = [m.register_step_pre_hook(partial(self._begin, id(m))) for m in members(optimizer)]
        self._last: list[Any] = []
        self.move_last()

    def move_last(self) -> None:
        """Lets ``after`` run after all hooks that the steps have now."""
        for handle in self._last:
            handle.remove()
        self._last = [m.register_step_post_hook(partial(self._end, id(m))) for m in members(self._optimizer)]
        if isinstance(self._optimizer, Joint):
            self._optimizer.follow(self)

    def is_open(self) -> bool:
        """Returns whether the caller runs within the ``step`` of an optimizer."""
        return any(outermost.is_open(sys._getframe(1)) for outermost in self._outermost.values())

    def finish(self) -> None:
        """Ends a step that has begun, although not every optimizer has stepped; does nothing within a ``step``."""
        if self._stepped and not self.is_open():
            self._stepped = set()
            self._after()

    def stop(self) -> None:
        """Follows no longer."""
        for handle in (*self._handles, *self._last):
            handle.remove()
        self._handles, self._last, self._stepped = [], [], set()
        if isinstance(self._optimizer, Joint):
            self._optimizer.forget(self)

    def _begin(self, member: int, optimizer: Any, args: Any, kwargs: Any) -> Arguments | None:
        outermost, frame = self._outermost[member], sys._getframe(1)
        if outermost.is_open(frame) or _only_makes_state(frame):
            return None
        if member in self._stepped:
            finish(self._optimizer)  # for everybody who follows, in their order
        outermost.enter(frame)
        return None if self._stepped else self._before(args, kwargs)

    def _end(self, member: int, optimizer: Any, args: Any, kwargs: Any) -> None:
        if not self._outermost[member].leave(sys._getframe(1)):
            return
        self._stepped.add(member)
        waiting = [m for m in members(self._optimizer) if id(m) not in self._stepped]
        if waiting:
            self._between(waiting)
        else:
            self._stepped = set()
            self._after()


def _only_makes_state(frame: FrameType | None) -> bool:
    """Returns whether the call of ``frame`` is no step of training, because it only creates the optimizer's state."""
    for _ in range(DEPTH):
        frame = frame and frame.f_back
        if frame is not None and frame.f_code.co_name in STATE_MAKERS:
            return True
    return False


def followers(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Returns the owners of the functions that are called after steps of an optimizer."""
    hooks = [getattr(hook, "func", None) for hook in members(optimizer)[0]._optimizer_step_post_hooks.values()]
    turns = [turn for hook in hooks if isinstance(turn := getattr(hook, "__self__", None), Turn)]
    return [getattr(turn._after, "__self__", None) for turn in turns]
