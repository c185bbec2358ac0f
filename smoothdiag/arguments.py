"""What is said of arguments of the wrong kind: their name, what they should be, and what was found."""

import math
from collections.abc import Callable
from numbers import Integral, Real
from reprlib import Repr
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def wrong(name: str, requirement: str, value: object) -> ValueError:
    """Returns the error to raise for a parameter that should be something else.

    Args:
        name: The parameter.
        requirement: Completes "should be".
        value: What was found.
    """
    return ValueError(f"Parameter `{name}` should be {requirement}. Found {found(name, value)}.")


def found(name: str, value: object) -> str:
    """Returns what a message says of a value: itself where it is plain, else what it is."""
    if isinstance(value, type):
        return f"the class `{value.__name__}`, which should be called first: `{value.__name__}(...)`"
    if isinstance(value, FunctionType | MethodType | BuiltinFunctionType):
        return f"the function `{value.__name__}` itself; should it be called, as in `{value.__name__}(...)`?"
    if value is None or isinstance(value, str | bytes | Real | complex | list | tuple | dict | set):
        return f"`{name} = {_SHORT.repr(value)}`"
    return f"`{name} = {type(value).__name__}`, an object of another kind"


def number(name: str, value: Any, requirement: str, valid: Callable[[Any], bool]) -> None:
    """Makes sure that a parameter is a real number for which something holds; NaN, for which nothing does, is none.

    Raises:
        ValueError: If it is not.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or math.isnan(value) or not valid(value):
        raise wrong(name, requirement, value)


def positive(name: str, value: Any) -> float:
    """Returns a parameter that is a positive, finite number.

    Raises:
        ValueError: If it is none.
    """
    number(name, value, "positive and finite", lambda v: 0 < v < math.inf)
    return float(value)


def whole(name: str, value: Any, least: int) -> None:
    """Makes sure that a parameter is a whole number of at least ``least``.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise wrong(name, f"a whole number of at least {least}", value)


def flag(name: str, value: Any) -> None:
    """Makes sure that a parameter is True or False.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(value, bool):
        raise wrong(name, "True or False", value)


def choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Makes sure that a parameter is one of some words.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(value, str) or value not in allowed:
        raise wrong(name, f"one of {allowed}", value)


def made(name: str, value: Any, methods: tuple[str, ...], requirement: str) -> None:
    """Makes sure that a parameter is an object with some methods, not the class of one.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(value, type) or not all(callable(getattr(value, method, None)) for method in methods):
        raise wrong(name, requirement, value)


def called(name: str, value: Any, requirement: str) -> None:
    """Makes sure that a parameter is callable, and no class.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(value, type) or not callable(value):
        raise wrong(name, requirement, value)
