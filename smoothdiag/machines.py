"""Machines: findings as JSON and as annotations of GitHub, and exit codes that say what was found.

`docs/machines.md` promises what this module writes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass, field
from typing import Any, Final, TextIO

VERSION: Final = 1
"""Version of the JSON documents; it rises if a name disappears or changes its meaning. New names may come any time."""

FOUND: Final = 10
"""Exit code if `--fail-on` names a severity and something at least as bad was found."""

SEVERITIES: Final = ("error", "warning", "note")
"""Severities, worst first."""

FORMATS: Final = ("text", "json", "github")

_COMMANDS: Final = {"error": "error", "warning": "warning", "note": "notice"}


@dataclass(frozen=True)
class Finding:
    """Something that a command has found.

    Attributes:
        name: Its name, as in the documentation.
        severity: ``"error"``, ``"warning"`` or ``"note"``.
        text: What happened, and why it matters.
        remedy: What to change.
        file: File at fault; empty if none is.
        line: Number of the line at fault, from 1; 0 if none is.
        count: How often it was seen.
        of: How often it could have been seen.
        unit: What is counted, such as ``"steps"``.
        more: Further entries of the JSON document.
    """

    name: str
    severity: str
    text: str
    remedy: str
    file: str = ""
    line: int = 0
    count: int = 1
    of: int = 1
    unit: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Returns the finding as JSON holds it; what is not known is None."""
        found = {name: value for name, value in vars(self).items() if name != "more"}
        return found | {"file": self.file or None, "line": self.line or None} | dict(self.more)


def add_options(parser: Any) -> None:
    """Adds the options that all commands with findings share."""
    parser.add_argument("--format", choices=FORMATS, help="how to print (default: text); github annotates lines")
    parser.add_argument("--json", action="store_true", help="the same as --format json: stdout is one JSON document")
    parser.add_argument(
        "--fail-on",
        choices=SEVERITIES,
        metavar="SEVERITY",
        help=f"exit with code {FOUND} after a finding of this severity or a worse one: {', '.join(SEVERITIES)}",
    )


def chosen_format(arguments: argparse.Namespace) -> str:
    """Returns the format that the options ask for.

    Raises:
        ValueError: If they ask for two.
    """
    if arguments.json and arguments.format not in (None, "json"):
        raise ValueError(f"Parameter `--format` should be json beside `--json`. Found `{arguments.format}`.")
    return "json" if arguments.json else arguments.format or "text"


def exit_code(findings: Sequence[Finding], fail_on: str | None, of_script: int = 0) -> int:
    """Returns the exit code of a command: that of its script unless this is 0, else what the findings ask for."""
    if of_script or fail_on is None:
        return of_script
    bad = SEVERITIES[: SEVERITIES.index(fail_on) + 1]
    return FOUND if any(each.severity in bad for each in findings) else 0


def document(command: str, findings: Sequence[Finding], code: int, **more: Any) -> str:
    """Returns a JSON document in one line; NaN and infinity become null."""
    number = Counter(each.severity for each in findings)
    head = {"version": VERSION, "command": command, "exit_code": code}
    counts = {severity: number[severity] for severity in SEVERITIES}
    found = [each.to_dict() for each in findings]
    return json.dumps(plain({**head, "counts": counts, **more, "findings": found}), allow_nan=False)


def plain(value: Any) -> Any:
    """Returns a value in what JSON can hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value


def workflow_commands(command: str, findings: Sequence[Finding], root: str) -> str:
    """Returns one workflow command of GitHub Actions for each finding, a line each.

    Args:
        command: The command that has found them.
        findings: The findings.
        root: Folder of the repository; GitHub shows an annotation only at a path below it.

    Source: GitHub, "Workflow commands for GitHub Actions"; escapes as in actions/toolkit, packages/core.
    """
    lines = []
    for each in findings:
        properties = {"title": f"smoothdiag {command}: {each.name}"}
        if each.file:
            where = {"file": _below(each.file, root)} | ({"line": str(each.line)} if each.line else {})
            properties = {**where, **properties}
        listed = ",".join(f"{name}={_escaped(value, in_property=True)}" for name, value in properties.items())
        seen = f" ({each.count} of {each.of} {each.unit})" if each.unit else ""
        lines.append(
            f"::{_COMMANDS[each.severity]} {listed}::{_escaped(f'{each.text}{seen}')}%0A{_escaped(each.remedy)}"
        )
    return "\n".join(lines)


@contextmanager
def stdout_kept_free(*, is_needed: bool) -> Iterator[TextIO]:
    """Sends what a script and its processes print to the error output, so that stdout holds one document alone.

    Yields:
        The true stdout.
    """
    true = sys.stdout
    if not is_needed:
        yield true
        return
    saved = _moved_to_errors()
    try:
        with redirect_stdout(sys.stderr), nullcontext(true) if saved is None else os.fdopen(os.dup(saved), "w") as free:
            yield free
    finally:
        if saved is not None:
            with suppress(OSError, ValueError):
                true.flush()
            os.dup2(saved, 1)
            os.close(saved)


def _moved_to_errors() -> int | None:
    """Points descriptor 1 to where 2 points; returns a copy of the old one, or None if there is nothing to move."""
    try:
        if sys.stdout.fileno() != 1:
            return None
        sys.stdout.flush()
        saved = os.dup(1)
        os.dup2(2, 1)
    except (OSError, ValueError, AttributeError):
        return None
    return saved


def _below(file: str, root: str) -> str:
    path = os.path.relpath(file, root) if os.path.isabs(file) else file
    return file if path.startswith("..") else path.replace(os.sep, "/")


def _escaped(text: str, *, in_property: bool = False) -> str:
    text = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return text.replace(":", "%3A").replace(",", "%2C") if in_property else text
