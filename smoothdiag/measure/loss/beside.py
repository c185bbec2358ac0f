"""Beside: what a loss reaches outside the model, such as the other network of a GAN."""

import warnings
import weakref
from collections.abc import Iterable, Iterator
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from smoothdiag.console import counted
from smoothdiag.rows import SmoothdiagWarning

MOST = 1000
"""Largest number of objects to look at."""

DEPTH = 4
"""Most steps from the loss to an object that is still found."""

_FOREIGN = ("torch", "numpy", "pandas", "smoothdiag", "builtins")
"""Packages whose objects, unless they are modules themselves, hold no module that a loss calls."""


def modules_beside(model: nn.Module, loss_fn: Any) -> list[nn.Module]:
    """Returns the modules outside a model that a loss can reach.

    The search follows a function's closure, its defaults, the globals that it names and the functions that it calls,
    the object that a method belongs to, and what all of these keep in attributes, lists and dictionaries.
    """
    known = {id(module) for module in model.modules()}
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    layer: list[Any] = [loss_fn]
    for _ in range(DEPTH):
        following: list[Any] = []
        for value in layer:
            if len(seen) > MOST:
                break
            try:
                if id(value) in seen or isinstance(value, Tensor | str | bytes | int | float | type):
                    continue
                seen.add(id(value))
                if isinstance(value, nn.Module):
                    found.update({id(module): module for module in value.modules() if id(module) not in known})
                following += _within(value)
            except Exception:
                continue  # stand-ins for missing objects, as web frameworks use them, raise errors when looked at
        layer = following
    return list(found.values())


class Strays:
    """The parameters outside the model that losses have reached; warns once if the run moves them.

    Args:
        model: The model.
        loss_fn: The loss.
    """

    def __init__(self, model: nn.Module, loss_fn: Any) -> None:
        self._model, self._loss_fn = model, loss_fn
        self._met: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._has_warned = False

    def meet(self, leaves: Iterable[Tensor]) -> None:
        """Notes the parameters outside the model that one loss reaches, and looks which have moved since last time."""
        if self._has_warned:
            return
        moved: list[Tensor] = []
        for leaf in (leaf for leaf in leaves if isinstance(leaf, nn.Parameter)):  # other tensors belong to no module
            known, version = self._met.get(id(leaf), (None, 0))
            if known is not None and known() is leaf and version != leaf._version:
                moved.append(leaf)
            self._met[id(leaf)] = weakref.ref(leaf), leaf._version
        self._met = {key: (leaf, version) for key, (leaf, version) in self._met.items() if leaf() is not None}
        if moved:
            self._has_warned = True
            warnings.warn(self._warning(moved), SmoothdiagWarning)

    def _warning(self, moved: list[Tensor]) -> str:
        ids = set(map(id, moved))
        beside = modules_beside(self._model, self._loss_fn)
        name = next((type(m).__name__ for m in beside if ids & set(map(id, m.parameters()))), "")
        return (
            f"loss_fn depends on {counted(len(moved), 'trainable parameter')} outside `model`"
            f"{f' (module {name})' if name else ''}, which the run moves. The probe does not know the values that a "
            "backward pass saw, so rows of a step in which they move belong to another loss than the one you train. "
            "Pass all modules that loss_fn uses, as in Probe(model=[G, D], ...); loss_fn then gets that list."
        )


def _within(value: Any) -> Iterator[Any]:
    """Yields the objects one step away."""
    if isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # a name that has no value yet
                continue
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
        yield from vars(value).values()  # what decorators wrap
        yield from (value.__globals__[name] for name in _names(value.__code__) if name in value.__globals__)
    elif isinstance(value, MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, dict):
        yield from list(value.values())[:MOST]
    elif isinstance(value, list | tuple):
        yield from value[:MOST]
    elif isinstance(value, nn.Module):
        yield from (v for k, v in vars(value).items() if not k.startswith("_"))
    elif type(value).__module__.partition(".")[0] not in _FOREIGN:
        yield from list(getattr(value, "__dict__", {}).values())[:MOST]
        if callable(value):
            yield type(value).__call__


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
