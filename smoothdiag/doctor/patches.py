"""Patches: functions and methods that are replaced for a while and then put back."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Final

import torch

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Takes the original function and returns the function that runs in its place."""

_LOCK: Final = threading.RLock()
_PLACES: Final[dict[tuple[int, str], _Place]] = {}


class _Place:
    """An attribute that one or more watches replace; watches may begin and end in any order.

    Args:
        owner: The module, class or cell that has the attribute.
        name: Name of the attribute.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self._owner, self._name = owner, name
        self._original = self._current = getattr(owner, name)
        self._is_inherited = isinstance(owner, type) and name not in vars(owner)
        self._wraps: list[Wrap] = []

    def add(self, wrap: Wrap) -> None:
        """Puts ``wrap`` around the function that is there now."""
        self._wraps.append(wrap)
        self._put()

    def remove(self, wrap: Wrap) -> None:
        """Removes ``wrap`` and leaves the other wraps in place."""
        with _LOCK:
            self._wraps.remove(wrap)
            self._put()
            if not self._wraps:
                del _PLACES[id(self._owner), self._name]

    def _put(self) -> None:
        builtins = torch.jit._builtins._get_builtin_table()  # type: ignore[no-untyped-call]
        if self._current is not self._original:
            builtins.pop(id(self._current), None)
        current = self._original
        for wrap in self._wraps:
            current = functools.wraps(self._original)(wrap(current))
        if self._wraps and id(self._original) in builtins:  # torch.jit.script looks functions up by identity
            builtins[id(current)] = builtins[id(self._original)]
        self._current = current
        if self._is_inherited and not self._wraps:
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, current)


class Patches(ExitStack):
    """A stack of replacements, undone when it is closed."""

    def replace(self, owner: Any, name: str, wrap: Wrap) -> None:
        """Replaces the attribute ``name`` of a module or class for all code that looks it up there."""
        with _LOCK:
            place = _PLACES.get((id(owner), name))
            if place is None:
                place = _PLACES[id(owner), name] = _Place(owner, name)
            place.add(wrap)
        self.callback(place.remove, wrap)

    def redirect(self, function: Any, wrap: Wrap) -> None:
        """Replaces the function inside a decorated function, so that every import of it is replaced.

        PyTorch decorates these functions with a wrapper that finds the inner function in a closure cell. Only the
        content of the cell changes. The function object stays the same, under whatever name it was imported.

        Raises:
            RuntimeError: If the function is not decorated in this way.
        """
        inner = inspect.unwrap(function)
        cells = [cell for cell in function.__closure__ or () if inspect.unwrap(cell.cell_contents) is inner]
        if len(cells) != 1:
            raise RuntimeError(
                f"The doctor cannot watch {function.__module__}.{function.__name__}, because this version of PyTorch "
                "does not wrap it in torch.no_grad as other versions do. Run the script without the doctor."
            )
        self.replace(cells[0], "cell_contents", wrap)
