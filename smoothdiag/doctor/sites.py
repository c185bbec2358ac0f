"""Sites: the line of the user's code that a call came from."""

from __future__ import annotations

import dis
import functools
import inspect
import linecache
import os
import site
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Final

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from smoothdiag.doctor.frameworks import around, is_framework, is_installed

_OWN = f"{Path(__file__).parents[1]}{os.sep}"
_BETWEEN = (f"{Path(torch.__file__).parent}{os.sep}", f"{Path(__file__).parent}{os.sep}", "<frozen")
_INSTALLED = (
    *(sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib")),
    *site.getsitepackages(),
    site.getusersitepackages(),
)
_OF_GRADIENTS: Final = ("grad", "norm", "clip")
_LIBRARIES = (_OWN, *_BETWEEN, *(f"{folder}{os.sep}" for folder in _INSTALLED))


@dataclass(frozen=True)
class Site:
    """A line of code.

    Attributes:
        file: Its file.
        line: Its number, from 1.
        function: The function it stands in.
        inside: The line of a library that made the call for this line, as ``"file:line"``; empty if no library did.
        through: The function that this line called in that library, or in another library that uses it, as
            ``"package.function"``.
        framework: The framework whose loop or helper the line is part of; empty if it is part of none.
    """

    file: str
    line: int
    function: str
    inside: str = ""
    through: str = ""
    framework: str = ""

    @property
    def code(self) -> str:
        """Text of the line; empty if the source cannot be read."""
        return linecache.getline(self.file, self.line).strip()

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


NOWHERE = Site("<unknown>", 0, "")


def caller(frame: FrameType | None) -> FrameType | None:
    """Returns the first frame, from ``frame`` outwards, that belongs neither to PyTorch nor to the doctor."""
    while frame is not None and _is_within(frame.f_code.co_filename, _BETWEEN):
        frame = frame.f_back
    return frame


def is_own(frame: FrameType | None) -> bool:
    """Returns whether a frame belongs to smoothdiag itself."""
    return frame is not None and _is_within(frame.f_code.co_filename, (_OWN,))


def is_library(file: str) -> bool:
    """Returns whether a file belongs to Python, to an installed package or to smoothdiag."""
    return _is_within(file, _LIBRARIES) or is_installed(file)


def _is_of_library(frame: FrameType) -> bool:
    """Returns whether a frame runs code of a library, or of a known framework wherever that lies."""
    return is_library(frame.f_code.co_filename) or is_framework(str(frame.f_globals.get("__name__", "")))


def call_site(frame: FrameType | None) -> Site:
    """Returns the innermost line of the user's code at or above ``frame``, or else the line that comes closest."""
    direct = caller(frame)
    mine, called = direct, direct
    while mine is not None and _is_of_library(mine):
        mine, called = mine.f_back, mine
    if direct is None or called is None:
        return NOWHERE
    if mine is None or mine is direct:
        return _site(direct, framework=around(direct))
    package = str(called.f_globals.get("__name__", "")).partition(".")[0]
    inside = f"{direct.f_code.co_filename}:{direct.f_lineno}"
    return _site(mine, inside, f"{package}.{called.f_code.co_name}", around(direct))


def is_result_used(frame: FrameType | None) -> bool:
    """Returns whether ``frame``, or a frame that it returns to, uses the result of the current call."""
    while frame is not None:
        following = _following(frame.f_code, frame.f_lasti)
        if following == "POP_TOP":
            return False
        if following != "RETURN_VALUE":
            return True
        frame = caller(frame.f_back)
    return False


def code_of(function: Any) -> CodeType | None:
    """Returns the code that runs when ``function`` is called, or ``None`` if it is not written in Python."""
    inner = function.func if isinstance(function, functools.partial) else inspect.unwrap(function)
    if inner is not function:
        return code_of(inner)
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return code if isinstance(code, CodeType) else None


class StepCode:
    """The code that runs within steps of optimizers.

    Attributes:
        methods: Code of the optimizers themselves.
        called_back: Code of the closures and hooks that they call.
        after: Code of the hooks that they call after a step.
    """

    def __init__(self) -> None:
        self.methods: set[CodeType] = set()
        self.called_back: set[CodeType] = set()
        self.after: set[CodeType] = set()
        self._kinds: set[type] = set()

    def add(self, optimizer: Optimizer) -> None:
        """Adds the methods and hooks of an optimizer."""
        if type(optimizer) not in self._kinds:
            self._kinds.add(type(optimizer))
            functions = (each for kind in type(optimizer).__mro__ for each in vars(kind).values())
            self.methods |= _codes(each for each in functions if inspect.isfunction(each))
        for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            hooks = getattr(optimizer, name, {})  # a wrapper of another optimizer may have none
            self.called_back |= _codes(hooks.values())
        self.after |= _codes(getattr(optimizer, "_optimizer_step_post_hooks", {}).values())

    def closure(self, candidates: Iterable[Any]) -> CodeType | None:
        """Adds the closure among the arguments of a step, if there is one, and returns its code."""
        codes = _codes(candidates)
        self.called_back |= codes
        return next(iter(codes), None)

    def is_after_step(self, frame: FrameType | None) -> bool:
        """Returns whether ``frame`` runs in a hook that an optimizer calls after its step."""
        return self.nearest(frame) in {*self.after, *_codes(_global_optimizer_post_hooks.values())}

    def nearest(self, frame: FrameType | None) -> CodeType | None:
        """Returns the innermost code of a step at or above ``frame``; ``None`` outside of steps."""
        of_all = _codes((*_global_optimizer_pre_hooks.values(), *_global_optimizer_post_hooks.values()))
        while frame is not None:
            code = frame.f_code
            if code in self.called_back or code in of_all or code in self.methods:
                return code
            frame = frame.f_back
        return None


def hook_on_gradients(optimizer: Optimizer) -> str:
    """Returns the place of a step pre-hook of the user whose code names gradients; empty if there is none."""
    hooks = (*_global_optimizer_pre_hooks.values(), *optimizer._optimizer_step_pre_hooks.values())
    mine = (code for code in map(code_of, hooks) if code is not None and not is_library(code.co_filename))
    return next((f"{code.co_filename}:{code.co_firstlineno}" for code in mine if _names_gradients(code)), "")


def _names_gradients(code: CodeType) -> bool:
    inner = (each for each in code.co_consts if isinstance(each, CodeType))
    names = code.co_names + code.co_freevars
    return any(word in name for name in names for word in _OF_GRADIENTS) or any(map(_names_gradients, inner))


def _codes(functions: Iterable[Any]) -> set[CodeType]:
    return {code for each in functions if (code := code_of(each)) is not None}


def _site(frame: FrameType, inside: str = "", through: str = "", framework: str = "") -> Site:
    return Site(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name, inside, through, framework)


@functools.cache
def _is_within(file: str, folders: tuple[str, ...]) -> bool:
    return file.startswith(folders)


@functools.lru_cache(maxsize=1024)
def _following(code: CodeType, offset: int) -> str:
    """Returns the instruction after the one at ``offset``."""
    return next((step.opname for step in dis.get_instructions(code) if step.offset > offset), "RETURN_VALUE")
