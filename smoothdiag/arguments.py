"""Errors for wrong arguments: they say the parameter, what it should be, and what was found."""

import math
from collections.abc import Callable
from numbers import Integral, Real
from reprlib import Repr
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def wrong(name: str, requirement: str, value: object) -> ValueError:
    """Returns the error to raise for a parameter that has a wrong value.

    Args:
        name: Name of the parameter.
        requirement: What the parameter should be; it follows the words "should be".
        value: The value that was found.
    """
    return ValueError(f"Parameter `{name}` should be {requirement}. Found {found(name, value)}.")


def found(name: str, value: object) -> str:
    """Returns how a message shows a value: plain values as they are, other objects by their type."""
    if isinstance(value, type):
        return f"the class `{value.__name__}`, which should be called first: `{value.__name__}(...)`"
    if isinstance(value, FunctionType | MethodType | BuiltinFunctionType):
        return f"the function `{value.__name__}` itself; did you mean to call it, as in `{value.__name__}(...)`?"
    if value is None or isinstance(value, str | bytes | Real | complex | list | tuple | dict | set):
        return f"`{name} = {_SHORT.repr(value)}`"
    return f"`{name} = {type(value).__name__}`, an object of another type"


def number(name: str, value: Any, requirement: str, valid: Callable[[Any], bool]) -> None:
    """Makes sure that a parameter is a real number, is not NaN, and passes a test.

    Args:
        name: Name of the parameter.
        value: Value of the parameter.
        requirement: What the parameter should be; it follows the words "should be".
        valid: The test.

    Raises:
        ValueError: If it is not.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or math.isnan(value) or not valid(value):
        raise wrong(name, requirement, value)


def positive(name: str, value: Any) -> float:
    """Returns a parameter as a float, and makes sure that it is a positive, finite number.

    Raises:
        ValueError: If it is not.
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
    """Makes sure that a parameter is one of the allowed words.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(value, str) or value not in allowed:
        raise wrong(name, f"one of {allowed}", value)


def made(name: str, value: Any, methods: tuple[str, ...], requirement: str) -> None:
    """Makes sure that a parameter is an object with certain methods, and not a class.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(value, type) or not all(callable(getattr(value, method, None)) for method in methods):
        raise wrong(name, requirement, value)


def called(name: str, value: Any, requirement: str) -> None:
    """Makes sure that a parameter is callable, and not a class.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(value, type) or not callable(value):
        raise wrong(name, requirement, value)
