"""Closures: what to do after the optimizer has evaluated the closure of a step."""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

from smoothdiag.adapters.turns import Arguments


def after_closure(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    act: Callable[[], None],
    again: Callable[[], None] = lambda: None,
    found: Callable[[Any], None] = lambda result: None,
) -> Arguments | None:
    """Returns the arguments of an optimizer step whose closure is followed by ``act``; None if there is no closure.

    Before such a step there is no gradient, or only the gradient of the previous step. A step pre-hook that returns the
    result of this function can act as soon as the new gradient is there.

    Args:
        args: Positional arguments of the step, the optimizer first.
        kwargs: Its keyword arguments.
        act: Called after the first evaluation of the closure.
        again: Called after each further evaluation in the same step.
        found: Called with the result of each evaluation, first of all.
    """

    def followed(closure: Callable[..., Any]) -> Callable[..., Any]:
        calls = itertools.chain([act], itertools.repeat(again))

        @functools.wraps(closure)
        def evaluate(*given: Any, **named: Any) -> Any:
            result = closure(*given, **named)
            found(result)
            next(calls)()
            return result

        return evaluate

    if kwargs.get("closure") is not None:
        return args, {**kwargs, "closure": followed(kwargs["closure"])}
    for place, value in enumerate(args):
        if place > 0 and callable(value):
            return (*args[:place], followed(value), *args[place + 1 :]), dict(kwargs)
    return None
