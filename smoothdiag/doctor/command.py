"""The subcommand ``smoothdiag doctor``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, TextIO

from smoothdiag import console, machines
from smoothdiag.doctor.explanations import NAMES, explain

if TYPE_CHECKING:
    from smoothdiag.doctor.report import Report

TERMINATED: Final = 143
"""Exit code that shells report for a process that SIGTERM has ended: 128 + 15."""


class _Explain(argparse.Action):
    """Prints what the documentation says about a fault, and exits."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Prints the explanation and exits."""
        print(explain(str(values)))
        parser.exit()


def add_command(commands: Any) -> None:
    """Adds the subcommand ``doctor`` to the command line."""
    doctor = commands.add_parser(
        "doctor",
        help="run a training script unchanged and report mistakes around gradient clipping",
        description="Run a training script unchanged and report mistakes around gradient clipping, with the lines to "
        "change. Options of the doctor come before SCRIPT.",
    )
    machines.add_options(doctor)
    doctor.add_argument("--steps", type=int, metavar="N", help="end the run after N optimizer steps")
    doctor.add_argument(
        "--explain", action=_Explain, choices=NAMES, metavar="NAME", help="explain the finding of this name and exit"
    )
    add_script(doctor)
    doctor.set_defaults(run=_doctor)


def add_script(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of a command that runs a script."""
    parser.add_argument("-m", dest="is_module", action="store_true", help="SCRIPT names a module, as in python -m")
    parser.add_argument("script", metavar="SCRIPT", help="Python script that trains")
    parser.add_argument("args", nargs=argparse.REMAINDER, metavar="...", help="arguments for the script")


def _doctor(arguments: argparse.Namespace) -> None:
    from smoothdiag.doctor.script import run_script

    form, root = machines.chosen_format(arguments), os.getcwd()  # before the script goes elsewhere

    def said(report: Report, code: int) -> tuple[str, int]:
        return told("doctor", arguments, report, code, form, root, text=str(report), beside=report.headline)

    with machines.stdout_kept_free(is_needed=form == "json") as stdout:
        teller = Teller("doctor", said, stdout)
        report, code = run_script(
            arguments.script,
            arguments.args,
            is_module=arguments.is_module,
            steps=arguments.steps,
            before_termination=teller.before_termination,
        )
        code = teller.tell(report, code)
    if code:
        sys.exit(code)


def told(
    command: str,
    arguments: argparse.Namespace,
    report: Report,
    code: int,
    form: str,
    root: str,
    *,
    text: str,
    beside: str,
    **more: Any,
) -> tuple[str, int]:
    """Returns what a command prints after a script, and its exit code.

    Args:
        command: The command.
        arguments: Its arguments.
        report: What the doctor has found.
        code: Exit code of the script.
        form: Format, one of `machines.FORMATS`.
        root: Folder in which the command was started.
        text: What people read.
        beside: What stands below the annotations of GitHub.
        more: Further entries of the JSON document.
    """
    found = report.for_machines()
    whole = machines.exit_code(found, arguments.fail_on, code)
    if form == "json":
        is_ended = arguments.steps is not None and report.steps >= arguments.steps and not code
        script = {"path": arguments.script, "exit_code": code, "is_ended_early": is_ended}
        return machines.document(command, found, whole, steps=report.steps, script=script, **more), whole
    if form == "github":
        return "\n".join(filter(None, [machines.workflow_commands(command, found, root), beside])), whole
    return text, whole


class Teller:
    """Prints a report after a script, in the first rank and in the process that began.

    Args:
        command: The command.
        said: Returns what to print, and the exit code of the command.
        stdout: Where to print.
    """

    def __init__(self, command: str, said: Callable[[Report, int], tuple[str, int]], stdout: TextIO) -> None:
        self._command, self._said, self._stdout = command, said, stdout
        self._process, self._is_first = os.getpid(), os.environ.get("RANK", "0") == "0"

    @property
    def before_termination(self) -> Callable[[Report], None] | None:
        """What prints the report before a signal ends the process; None in later ranks."""
        return self._before_termination if self._is_first else None

    def _before_termination(self, report: Report) -> None:
        self._print(self._said(report, TERMINATED)[0])

    def tell(self, report: Report, code: int) -> int:
        """Prints the report, and returns the exit code of the command."""
        text, whole = self._said(report, code)
        if self._print(text) and code and code != console.BROKEN_PIPE:
            console.say(f"smoothdiag {self._command}: the script ended with exit code {code}")
        return whole

    def _print(self, text: str) -> bool:
        """Prints, and returns whether anybody reads it."""
        if not self._is_first or os.getpid() != self._process:  # a process that the script forked stays silent
            return False
        is_alone = self._stdout is not sys.stdout  # otherwise the script may have left a line unfinished
        text = f"{text}\n" if is_alone else f"\n{text}\n"
        try:
            console.flush()
            print(text, end="", flush=True, file=self._stdout)
        except BrokenPipeError:  # the reader has left, as after `| head`
            console.let_go()
            return False
        except RuntimeError:  # the signal came while the script itself was writing
            os.write(1, text.encode())
        return True
