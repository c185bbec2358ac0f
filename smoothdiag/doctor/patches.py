"""Patches: functions and methods replaced for a while, and put back."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Takes the original and returns what runs in its place."""


class Patches(ExitStack):
    """A stack of replacements, undone in reverse order when it is closed."""

    def replace(self, owner: Any, name: str, wrap: Wrap) -> None:
        """Replaces the attribute ``name`` of a module or class, for whoever looks it up there."""
        original = getattr(owner, name)
        inherited = name not in vars(owner)
        replacement = functools.wraps(original)(wrap(original))
        setattr(owner, name, replacement)
        builtins = torch.jit._builtins._get_builtin_table()  # type: ignore[no-untyped-call]
        if id(original) in builtins:  # torch.jit.script knows its functions by their identity
            builtins[id(replacement)] = builtins[id(original)]
            self.callback(builtins.pop, id(replacement))
        self.callback(delattr if inherited else setattr, owner, name, *(() if inherited else (original,)))

    def redirect(self, function: Any, wrap: Wrap) -> None:
        """Replaces what a decorated function calls, so that it is replaced wherever it was imported to.

        PyTorch decorates these functions with a wrapper that finds the inner function in a closure cell. The function
        object stays what it is, whatever names it goes by; only the content of the cell changes.

        Raises:
            RuntimeError: If the function is not decorated like that.
        """
        inner = inspect.unwrap(function)
        cells = [cell for cell in function.__closure__ or () if inspect.unwrap(cell.cell_contents) is inner]
        if len(cells) != 1:
            raise RuntimeError(
                f"The doctor cannot watch {function.__module__}.{function.__name__}, because this version of PyTorch "
                "does not wrap it in torch.no_grad as others do."
            )
        content = cells[0].cell_contents
        cells[0].cell_contents = functools.wraps(content)(wrap(content))
        self.callback(setattr, cells[0], "cell_contents", content)
