"""The subcommand ``smoothdiag watch``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Final

from smoothdiag import machines

EVERY: Final = 10.0
"""Seconds between two looks, unless the user says otherwise."""


def add_command(commands: Any) -> None:
    """Adds the subcommand ``watch`` to the command line."""
    watch = commands.add_parser(
        "watch",
        help="follow a growing log and say what is new: dead runs, spikes, clip rates",
        description="Follow a growing log, and say each dead run, spike and clip rate once, as soon as the log shows "
        "it. The log may be created later, cut off or replaced. Ctrl-C ends it.",
    )
    watch.add_argument("log", type=Path, metavar="LOG", help="a log that `smoothdiag import` reads")
    for flag, what in (("--grad-norm", "gradient norms"), ("--loss", "losses"), ("--step", "step numbers")):
        watch.add_argument(flag, metavar="COLUMN", help=f"column of {what} (default: the column with a usual name)")
    watch.add_argument("--run", dest="of_run", metavar="NAME", help="the run to follow, if the log holds several")
    watch.add_argument(
        "--threshold", type=float, action="append", default=[], metavar="T", help="say if nearly every step exceeds T"
    )
    watch.add_argument(
        "--every", type=float, default=EVERY, metavar="SECONDS", help=f"time between two looks (default: {EVERY:g})"
    )
    ends = watch.add_mutually_exclusive_group()
    ends.add_argument("--once", action="store_true", help="say what the log shows now, and end")
    ends.add_argument("--for", dest="lasts", type=float, metavar="SECONDS", help="end after this time")
    watch.add_argument("--json", action="store_true", help="print each finding as one line of JSON")
    watch.add_argument(
        "--fail-on",
        choices=machines.SEVERITIES,
        metavar="SEVERITY",
        help=f"end with exit code {machines.FOUND} at a finding of this severity or a worse one: "
        f"{', '.join(machines.SEVERITIES)}",
    )
    watch.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    for flag, value in (("--every", arguments.every), ("--for", arguments.lasts)):
        if value is not None and not value > 0:
            raise ValueError(f"Parameter `{flag}` should be positive. Found {value:g}.")
    from smoothdiag.logs.watching import news, said  # other commands need not load what reads logs

    code = 0
    try:
        for finding in news(arguments):
            print(said(finding, as_json=arguments.json), flush=True)
            if code := machines.exit_code([finding], arguments.fail_on):
                break
    except KeyboardInterrupt:
        return
    if code:
        sys.exit(code)
