"""Text for people: counts with their nouns, one line for an error, and nothing after the reader has left."""

import argparse
import os
import select
import sys
from contextlib import suppress
from typing import Any, Final, TextIO

BROKEN_PIPE: Final = 141
"""Exit code after the reader of the output has left, as with `| head`: 128 + SIGPIPE, as shells report it."""

INTERRUPTED: Final = 130
"""Exit code after Ctrl-C, as shells report it: 128 + SIGINT."""


def counted(number: int, one: str, several: str = "") -> str:
    """Returns a count with its noun, such as "1 row" and "2 rows"; ``several`` is ``one`` with an s unless given."""
    return f"{number} {one if number == 1 else several or f'{one}s'}"


def one_line(text: object) -> str:
    """Returns a text in one line; characters that move the cursor or cannot be printed become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(str(text).split()))


def add_momentum(parser: argparse.ArgumentParser) -> None:
    """Adds the options of commands that make a threshold: what the trace does not say about the optimizer."""
    for flag in ("--momentum", "--dampening"):
        parser.add_argument(flag, type=float, help=f"{flag[2:]} of the optimizer (default: as in the trace, or 0)")


def once(arguments: argparse.Namespace, name: str) -> Any:
    """Returns the value of a repeatable option that a command takes only once; None if it was not given.

    Raises:
        ValueError: If it was given several times.
    """
    values = getattr(arguments, name)
    if values and len(values) > 1:
        raise ValueError(f"Parameter `--{name}` should be given only once here. Found {', '.join(map(str, values))}.")
    return values[0] if values else None


def flush() -> None:
    """Writes buffered output now: an error at the exit of Python could no longer be handled."""
    for stream in _streams():
        stream.flush()


def nobody_reads() -> bool:
    """Returns whether the reader of the standard output has left."""
    if sys.stdout is None or not hasattr(select, "poll"):
        return False
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)  # 0: poll reports errors without being asked
    except (OSError, ValueError, AttributeError):  # a stream without a descriptor
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def let_go() -> None:
    """Sends further output to nowhere, so that Python does not complain about it when it ends."""
    for stream in _streams():
        with suppress(OSError):
            stream.flush()
            if stream is sys.stderr:
                continue
        with suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(text: str) -> None:
    """Prints to the error output, if there is one that can be written to."""
    if sys.stderr is not None:
        with suppress(OSError):
            print(text, file=sys.stderr, flush=True)


def _streams() -> list[TextIO]:
    # A process that was started with a closed descriptor has None instead of a stream.
    return [stream for stream in (sys.stdout, sys.stderr) if stream is not None and not stream.closed]
