"""Patches: functions and methods replaced for a while, and put back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Takes the original and returns what runs in its place."""


class Patches(ExitStack):
    """A stack of replacements, undone in reverse order when it is closed."""

    def replace(self, owner: Any, name: str, wrap: Wrap) -> None:
        """Replaces the attribute ``name`` of a module or class, for whoever looks it up there."""
        original = getattr(owner, name)
        inherited = name not in vars(owner)
        setattr(owner, name, functools.wraps(original)(wrap(original)))
        self.callback(delattr if inherited else setattr, owner, name, *(() if inherited else (original,)))

    def redirect(self, function: Any, wrap: Wrap) -> None:
        """Replaces what a decorated function calls, so that it is replaced wherever it was imported to.

        PyTorch decorates these functions with a wrapper that finds the inner function in a closure cell. The function
        object stays what it is, whatever names it goes by; only the content of the cell changes.

        Raises:
            RuntimeError: If the function is not decorated like that.
        """
        inner: Callable[..., Any] | None = getattr(function, "__wrapped__", None)
        cells = [cell for cell in function.__closure__ or () if cell.cell_contents is inner]
        if inner is None or len(cells) != 1:
            raise RuntimeError(
                f"The doctor cannot watch {function.__module__}.{function.__name__}, because this version of PyTorch "
                "does not wrap it in torch.no_grad as others do."
            )
        cells[0].cell_contents = functools.wraps(inner)(wrap(inner))
        self.callback(setattr, cells[0], "cell_contents", inner)
