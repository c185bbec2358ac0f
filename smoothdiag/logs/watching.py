"""Watching: what is new in a log that a run is still writing."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from smoothdiag import machines
from smoothdiag.console import one_line, say
from smoothdiag.growing import Mark, changes, is_restarted
from smoothdiag.logs.alarms import news_of
from smoothdiag.logs.reading import read_log
from smoothdiag.logs.review import review_log
from smoothdiag.machines import Finding
from smoothdiag.rows import SmoothdiagWarning


def news(arguments: argparse.Namespace) -> Iterator[Finding]:
    """Yields every finding once, for as long as the options say."""
    known: set[tuple[Any, ...]] = set()
    before: Mark = ()
    complaint = ""
    lasts = 0.0 if arguments.once else arguments.lasts
    for now in changes([arguments.log], arguments.every, lasts=lasts):
        if is_restarted(before, now):
            known = set()
            yield _restarted(arguments.log)
        before = now
        try:
            found = list(_found(arguments))
        except (ValueError, OSError) as error:  # there may be nothing in it yet, or half a line
            if arguments.once:
                raise
            if str(error) != complaint:
                complaint = str(error)
                say(f"smoothdiag watch: cannot be read yet: {one_line(error)}")
            continue
        for each in found:
            key = (each.name, each.more.get("step"), each.more.get("threshold"))
            if key not in known:
                known.add(key)
                yield each
    if arguments.once and not before:
        raise FileNotFoundError(f"Parameter `LOG` should be a log that exists. Found `{arguments.log}` with `--once`.")


def _found(arguments: argparse.Namespace) -> Iterator[Finding]:
    thresholds: Sequence[float] = arguments.threshold
    with warnings.catch_warnings(action="ignore", category=SmoothdiagWarning):  # a line that is being written
        trace = read_log(
            arguments.log, grad_norm=arguments.grad_norm, loss=arguments.loss, step=arguments.step, run=arguments.of_run
        )
    yield from news_of(trace, review_log(trace, thresholds=thresholds), str(arguments.log), thresholds)


def _restarted(log: Path) -> Finding:
    text = "The log was cut off or replaced, so it is read from its begin."
    return Finding("log-restarted", "note", text, "Nothing, if a new run has begun.", str(log))


def said(finding: Finding, *, as_json: bool) -> str:
    """Returns a finding in one line."""
    if as_json:
        return json.dumps(machines.plain({"version": machines.VERSION, "command": "watch", **finding.to_dict()}))
    return f"{finding.severity.upper()} {finding.name}: {finding.text} {finding.remedy}"
