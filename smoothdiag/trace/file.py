"""File: where a process appends lines, each in one write, under a lock that keeps other processes from writing there.

There is no buffer: the system has every line as soon as it is written. So closing has nothing left to write, and a
forked child cannot write its parent's lines a second time.
"""

import contextlib
import io
import os
import secrets
import weakref
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any, Final

from smoothdiag.trace.lines import Place, sealed_line

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be renamed, which protects it as well as a lock
    fcntl = None  # type: ignore[assignment]


class TraceFile:
    """A file that this process alone appends to.

    Args:
        path: Path of the file.
        stream: The file, opened for appending, unbuffered and locked.
        file: Digits that all lines of the file share; None draws new ones.
        next_number: Number of the next line.
    """

    def __init__(self, path: Path, stream: io.FileIO, *, file: str | None = None, next_number: int = 1) -> None:
        self.path = path
        self._stream = stream
        self._file = secrets.token_hex(4) if file is None else file
        self._next = next_number
        self._process = os.getpid()
        _OPEN.add(self)

    @property
    def is_inherited(self) -> bool:
        """Whether a parent process opened the file before this process was forked from it."""
        return self._process != os.getpid()

    def write(self, value: Mapping[str, Any], before: str = "") -> None:
        """Appends one line.

        Raises:
            OSError: If the disk refuses.
        """
        rest = memoryview((before + sealed_line(value, Place(self._file, self._next))).encode("ascii"))
        while rest:
            rest = rest[self._stream.write(rest) or 0 :]
        self._next += 1

    def close(self) -> None:
        """Closes the file, which releases the lock unless a parent process holds it."""
        self._stream.close()


_OPEN: Final[weakref.WeakSet[TraceFile]] = weakref.WeakSet()


def _let_go() -> None:
    """Closes the parent's files in a forked child; otherwise a child that outlives its parent would keep the lock."""
    for file in list(_OPEN):
        with contextlib.suppress(OSError):
            file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def begin(path: Path) -> TraceFile | None:
    """Opens a new file; the file of an earlier run at this path is kept under the next free number.

    Returns:
        The file, or None if another process, or another trace in this process, is writing it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        stream = _locked(path)
        if stream is None or path.stat().st_size == 0:
            return None if stream is None else TraceFile(path, stream)
        if fcntl is None:
            stream.close()
        kept, reserved = _numbered(path)
        reserved.close()
        try:
            path.replace(kept)
        except PermissionError:
            if fcntl is not None:
                raise
            kept.unlink()
            return None
        finally:
            stream.close()


def beside(path: Path) -> TraceFile:
    """Opens a new file under the next free number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    numbered, stream = _numbered(path)
    _lock(stream)
    return TraceFile(numbered, stream)


def again(path: Path) -> io.FileIO | None:
    """Opens a file to continue; None if another process, or another trace in this process, is writing it."""
    return _locked(path)


def _locked(path: Path) -> io.FileIO | None:
    while True:
        stream = path.open("ab", buffering=0)
        if not _lock(stream):
            stream.close()
            return None
        try:
            # The process that held the lock before may have renamed the file.
            if os.path.samestat(os.fstat(stream.fileno()), path.stat()):
                return stream
        except FileNotFoundError:
            pass
        stream.close()


def _lock(stream: io.FileIO) -> bool:
    """Takes the lock of a file; False if another process holds it, as far as the file system can tell."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks, as on some network drives
        return True
    return True


def _numbered(path: Path) -> tuple[Path, io.FileIO]:
    """Creates a file with the next free number, which no other process can have created."""
    for number in count(1):
        numbered = path.with_name(f"{path.stem}.{number}{path.suffix}")
        try:
            descriptor = os.open(numbered, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | _BINARY, 0o666)
        except FileExistsError:
            continue
        return numbered, io.FileIO(descriptor, "ab")
    raise AssertionError("there is always a next number")


_BINARY: Final = getattr(os, "O_BINARY", 0)
