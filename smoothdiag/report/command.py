"""The subcommand ``smoothdiag report``."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from smoothdiag import console
from smoothdiag.growing import changes
from smoothdiag.report.paths import named_paths, page_path
from smoothdiag.rows import SmoothdiagWarning
from smoothdiag.trace.reading import check_is_trace

_SUFFIXES: Final = (".jsonl", ".csv", ".parquet")

EVERY: Final = 10
"""Seconds between two looks at a growing trace, unless the user says otherwise."""


def add_command(commands: Any, rows: argparse.ArgumentParser) -> None:
    """Adds the subcommand ``report``; ``rows`` holds the arguments of all commands that read traces."""
    parser = commands.add_parser(
        "report",
        help="write one HTML page that says what traces mean for a run: answer, figures, evidence",
        description="Write one HTML page that says what traces mean for a run: the answer first, then figures, verdict "
        "and evidence. The page loads nothing from elsewhere. Several traces stand side by side.",
        parents=[rows],
    )
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("report.html"), metavar="FILE", help="page (default: report.html)"
    )
    parser.add_argument(
        "--lr", type=float, help="learning rate that the threshold is for (default: the largest in the trace)"
    )
    console.add_momentum(parser)
    parser.add_argument(
        "--live",
        type=int,
        nargs="?",
        const=EVERY,
        metavar="SECONDS",
        help=f"write the page again while the traces grow, every {EVERY} seconds or as given, until Ctrl-C",
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.live is not None and arguments.live < 1:
        raise ValueError(f"Parameter `--live` should be at least 1 second. Found {arguments.live}.")
    page_path("--out", arguments.out)
    if arguments.live is None:
        _write(arguments, None)
        print(console.one_line(arguments.out))
        return
    try:
        _follow(arguments)
    except KeyboardInterrupt:
        if awaited := _awaited(arguments.traces):
            print(f"the page was not written now: {awaited}", flush=True)
            return
        with _quiet():
            _write(arguments, None)  # without the line that makes browsers load it again
        print(console.one_line(arguments.out))


def _follow(arguments: argparse.Namespace) -> None:
    """Writes the page whenever a trace has grown, for ever."""
    said = ""

    def is_begun(paths: Sequence[Path]) -> bool:
        nonlocal said
        awaited = _awaited(paths)
        if awaited and awaited != said:
            print(f"waiting: {awaited}; Ctrl-C ends it", flush=True)
        said = awaited
        return not awaited

    for number, _ in enumerate(changes(arguments.traces, arguments.live, is_begun=is_begun)):
        with _quiet():  # a line that is being written is no damage
            _write(arguments, arguments.live)
        if number == 0:
            print(f"{console.one_line(arguments.out)}, again whenever a trace grows; Ctrl-C ends it", flush=True)


def _awaited(paths: Sequence[Path]) -> str:
    """What the first trace still lacks that has no row yet, in words; empty if all have rows.

    Raises:
        ValueError: If a file can never become a trace.
    """
    for path in paths:
        name = console.one_line(path)
        if path.is_dir():
            raise ValueError(f"Parameter `TRACE` should be a file. Found the folder `{name}`.")
        if path.suffix not in _SUFFIXES:
            raise ValueError(f"Parameter `TRACE` should end in {', '.join(_SUFFIXES)} with --live. Found `{name}`.")
        if not path.exists():
            return f"there is no `{name}` yet"
        with path.open("rb") as file:
            lines = [line for _, line in zip(range(2), file, strict=False)]
        if not lines:
            return f"`{name}` is empty as yet"
        if path.suffix == ".jsonl" and (lines[0].endswith(b"\n") or not lines[0].startswith(b"{")):
            check_is_trace(path)  # a header of which only a part has been written may still become one
        if len(lines) < 2 and path.suffix != ".parquet":  # which has no lines, and is written as a whole
            return f"`{name}` has no rows yet"
    return ""


def _write(arguments: argparse.Namespace, refresh: int | None) -> None:
    if len(arguments.group or ()) > 1 or len(arguments.estimator or ()) > 1:
        raise ValueError("Parameters `--group` and `--estimator` should be given only once here.")
    from smoothdiag.report.page import write_report  # other commands need not load what draws

    options = {name: getattr(arguments, name) for name in ("quantile", "num_boot", "seed")}
    is_new = not arguments.out.parent.exists()
    write_report(
        named_paths(arguments.traces),
        arguments.out,
        lr=arguments.lr,
        momentum=arguments.momentum,
        dampening=arguments.dampening,
        refresh=refresh,
        estimator=(arguments.estimator or [None])[0],
        group=(arguments.group or ["all"])[0],
        **options,
    )
    if is_new:
        print(f"made the folder {console.one_line(arguments.out.parent)}", flush=True)


def _quiet() -> warnings.catch_warnings[None]:
    return warnings.catch_warnings(action="ignore", category=SmoothdiagWarning)
