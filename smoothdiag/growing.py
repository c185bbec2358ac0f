"""Growing: files that a run is still writing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

Mark = tuple[tuple[int, int, int], ...]
"""Of each file its number on the disk, its size and when it was written."""


def changes(
    paths: Sequence[Path],
    every: float,
    *,
    lasts: float | None = None,
    is_begun: Callable[[Sequence[Path]], bool] | None = None,
) -> Iterator[Mark]:
    """Yields whenever files have changed, and at first as soon as they are there.

    Args:
        paths: Files, or folders of files.
        every: Seconds between two looks.
        lasts: Seconds after which to end; ``None`` goes on for ever, 0 looks once.
        is_begun: Whether the files hold enough to be read; default: they exist.
    """
    before, begun = None, time.monotonic()
    while True:
        if all(path.exists() for path in paths) if is_begun is None else is_begun(paths):
            now = mark_of(paths)
            if now != before:
                before = now
                yield now
        left = every if lasts is None else min(every, begun + lasts - time.monotonic())
        if left <= 0:
            return
        time.sleep(left)


def mark_of(paths: Sequence[Path]) -> Mark:
    """Returns what changes if one of the files does."""
    files = [each for path in paths for each in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    stats = [each.stat() for each in files if each.is_file()]
    return tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)


def is_restarted(before: Mark, now: Mark) -> bool:
    """Returns whether a file was replaced or cut off in between, as by a log that rotates."""
    sizes = {inode: size for inode, size, _ in now}
    return any(sizes.get(inode, -1) < size for inode, size, _ in before)
