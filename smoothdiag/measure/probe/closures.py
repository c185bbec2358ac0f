"""Calls of a step: which of nested ones counts, and what to do when a closure has been evaluated."""

import functools
import itertools
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def after_closure(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    act: Callable[[], None],
    again: Callable[[], None] = lambda: None,
) -> Arguments | None:
    """Returns the arguments of an optimizer step with a closure that is followed by ``act``; None if it has none.

    Before such a step there is no gradient, or only that of the step before. A step pre-hook that returns what this
    function returns can act when there is one.

    Args:
        args: Positional arguments of the step, the optimizer first.
        kwargs: Its keyword arguments.
        act: Called when the closure has been evaluated for the first time.
        again: Called when it has been evaluated once more in the same step.
    """

    def followed(closure: Callable[..., Any]) -> Callable[..., Any]:
        calls = itertools.chain([act], itertools.repeat(again))

        @functools.wraps(closure)
        def evaluate(*given: Any, **named: Any) -> Any:
            result = closure(*given, **named)
            next(calls)()
            return result

        return evaluate

    if kwargs.get("closure") is not None:
        return args, {**kwargs, "closure": followed(kwargs["closure"])}
    for place, value in enumerate(args):
        if place > 0 and callable(value):
            return (*args[:place], followed(value), *args[place + 1 :]), dict(kwargs)
    return None


class Outermost:
    """Tells the outermost of nested calls from those within.

    A subclass whose step calls super().step() fires the hooks twice; the outer pair counts. A step that raised an
    error has left its frame behind, but not on the stack.
    """

    def __init__(self) -> None:
        self._outer: FrameType | None = None

    def enter(self, frame: FrameType) -> bool:
        """Returns whether the call of ``frame`` is the outermost, before it does its work."""
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
        """Returns whether the call of ``frame`` is the outermost, after it."""
        if self._outer is not frame:
            return False
        self._outer = None
        return True
