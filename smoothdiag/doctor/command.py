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
    doctor.add_argument("-m", dest="is_module", action="store_true", help="SCRIPT names a module, as in python -m")
    doctor.add_argument("script", metavar="SCRIPT", help="Python script that trains")
    doctor.add_argument("args", nargs=argparse.REMAINDER, metavar="...", help="arguments for the script")
    doctor.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> None:
    from smoothdiag.doctor.script import run_script

    form, root = machines.chosen_format(arguments), os.getcwd()  # before the script goes elsewhere

    def said(report: Report, code: int) -> tuple[str, int]:
        found = report.for_machines()
        whole = machines.exit_code(found, arguments.fail_on, code)
        if form == "json":
            is_ended = arguments.steps is not None and report.steps >= arguments.steps and not code
            script = {"path": arguments.script, "exit_code": code, "is_ended_early": is_ended}
            return machines.document("doctor", found, whole, steps=report.steps, script=script), whole
        if form == "github":
            return "\n".join(filter(None, [machines.workflow_commands("doctor", found, root), report.headline])), whole
        return str(report), whole

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
