"""Calls of a step: which of nested calls counts, and what to do after the optimizer has evaluated the closure."""

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
    """Returns the arguments of an optimizer step whose closure is followed by ``act``; None if there is no closure.

    Before such a step there is no gradient, or only the gradient of the previous step. A step pre-hook that returns the
    result of this function can act as soon as the new gradient is there.

    Args:
        args: Positional arguments of the step, the optimizer first.
        kwargs: Its keyword arguments.
        act: Called after the first evaluation of the closure.
        again: Called after each further evaluation in the same step.
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
