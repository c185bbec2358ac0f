"""paths: where a page goes, and the names that tell traces apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smoothdiag import arguments


def page_path(name: str, value: Any) -> Path:
    """Returns a parameter as the path of a page.

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(value, str | Path) or Path(value).suffix.lower() not in (".html", ".htm"):
        raise arguments.wrong(
            name, "the path of a page, which ends in .html", str(value) if isinstance(value, Path) else value
        )
    return Path(value)


def named_paths(paths: Sequence[Path]) -> dict[str, Path]:
    """Returns paths by names that tell them apart: the shortest ends of the paths that do, without the suffix."""
    parts = [path.with_suffix("").parts for path in paths]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return dict(zip(names, paths, strict=True))
    return {f"{path} ({number})": path for number, path in enumerate(paths, 1)}
