"""Sites: which line of the user's code a call came from."""

from __future__ import annotations

import dis
import functools
import linecache
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType

import torch

_OWN = str(Path(__file__).parents[1])
_BETWEEN = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<frozen")
_LIBRARIES = (_OWN, *_BETWEEN, *(sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib")))


@dataclass(frozen=True)
class Site:
    """A line of code.

    Attributes:
        file: Its file.
        line: Its number, from 1.
        function: The function it stands in.
        inside: The line of a library that made the call on its behalf, as ``"file:line"``; empty where none did.
    """

    file: str
    line: int
    function: str
    inside: str = ""

    @property
    def code(self) -> str:
        """Text of the line; empty where the source is not at hand."""
        return linecache.getline(self.file, self.line).strip()

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


NOWHERE = Site("<unknown>", 0, "")


def caller(frame: FrameType | None) -> FrameType | None:
    """Returns the first frame from ``frame`` outwards that is neither PyTorch's nor the doctor's."""
    while frame is not None and _is_within(frame.f_code.co_filename, _BETWEEN):
        frame = frame.f_back
    return frame


def is_own(frame: FrameType | None) -> bool:
    """Returns whether a frame is one of smoothdiag itself."""
    return frame is not None and _is_within(frame.f_code.co_filename, (_OWN,))


def is_library(file: str) -> bool:
    """Returns whether a file belongs to Python, to an installed package or to smoothdiag."""
    return _is_within(file, _LIBRARIES)


def call_site(frame: FrameType | None) -> Site:
    """Returns the innermost line of the user's own code at or above ``frame``, or else what comes closest."""
    direct = caller(frame)
    mine = direct
    while mine is not None and is_library(mine.f_code.co_filename):
        mine = mine.f_back
    if direct is None:
        return NOWHERE
    if mine is None:
        return _site(direct, "")
    return _site(mine, "" if mine is direct else f"{direct.f_code.co_filename}:{direct.f_lineno}")


def is_result_used(frame: FrameType | None) -> bool:
    """Returns whether anybody looks at what the call returns that ``frame`` is about to get back."""
    while frame is not None:
        following = _following(frame.f_code, frame.f_lasti)
        if following == "POP_TOP":
            return False
        if following != "RETURN_VALUE":
            return True
        frame = frame.f_back
    return False


def _site(frame: FrameType, inside: str) -> Site:
    return Site(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name, inside)


@functools.cache
def _is_within(file: str, folders: tuple[str, ...]) -> bool:
    return file.startswith(folders)


@functools.lru_cache(maxsize=1024)
def _following(code: CodeType, offset: int) -> str:
    """Returns the instruction after the one at ``offset``."""
    return next((step.opname for step in dis.get_instructions(code) if step.offset > offset), "RETURN_VALUE")
