"""Closures: optimizers that are handed the loss to evaluate it themselves, and what to do once they have."""

import functools
import itertools
from collections.abc import Callable, Mapping
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
