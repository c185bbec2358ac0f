"""The subcommand ``smoothdiag launch-check``."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any, Final

from smoothdiag import machines

if TYPE_CHECKING:
    from smoothdiag.doctor.report import Report
    from smoothdiag.launch.result import LaunchCheck

STEPS: Final = 30
"""Steps of AutoClip's calibration."""


def add_command(commands: Any) -> None:
    """Adds the subcommand ``launch-check`` to the command line."""
    check = commands.add_parser(
        "launch-check",
        help="run the first steps of a training script: faults, clip rates, which threshold and rate they suggest",
        description="Run the first steps of a training script unchanged, under the doctor and with an AutoClip that "
        "only watches, and stop it. Options of launch-check come before SCRIPT.",
    )
    machines.add_options(check)
    check.add_argument(
        "--steps", type=int, default=STEPS, metavar="N", help=f"stop the run after N optimizer steps (default: {STEPS})"
    )
    check.add_argument("-m", dest="is_module", action="store_true", help="SCRIPT names a module, as in python -m")
    check.add_argument("script", metavar="SCRIPT", help="Python script that trains")
    check.add_argument("args", nargs=argparse.REMAINDER, metavar="...", help="arguments for the script")
    check.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from smoothdiag.doctor.command import Teller
    from smoothdiag.doctor.script import run_script
    from smoothdiag.launch.attaching import attached
    from smoothdiag.launch.result import result_of

    form, root = machines.chosen_format(arguments), os.getcwd()  # before the script goes elsewhere
    with machines.stdout_kept_free(is_needed=form == "json") as stdout:
        with attached() as found:

            def said(report: Report, code: int) -> tuple[str, int]:
                found.close()
                return _said(arguments, report, result_of(found, report.steps, arguments.steps), code, form, root)

            teller = Teller("launch-check", said, stdout)
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


def _said(
    arguments: argparse.Namespace, report: Report, check: LaunchCheck, code: int, form: str, root: str
) -> tuple[str, int]:
    """Returns what to print, and the exit code of the command."""
    from smoothdiag.launch.words import as_text

    found = report.for_machines()
    whole = machines.exit_code(found, arguments.fail_on, code)
    is_ended = report.steps >= arguments.steps and not code
    if form == "json":
        script = {"path": arguments.script, "exit_code": code, "is_ended_early": is_ended}
        text = machines.document("launch-check", found, whole, steps=report.steps, script=script, check=check.to_dict())
        return text, whole
    if form == "github":
        lines = [machines.workflow_commands("launch-check", found, root), as_text(check)]
        return "\n".join(filter(None, lines)), whole
    return f"{report}\n\n{as_text(check)}", whole
