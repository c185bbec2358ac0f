"""The subcommand ``smoothdiag launch-check``."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any, Final

from smoothdiag import machines
from smoothdiag.doctor.command import Teller, add_script, told

if TYPE_CHECKING:
    from smoothdiag.doctor.report import Report

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
    add_script(check)
    check.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from smoothdiag.doctor.script import run_script
    from smoothdiag.launch.attaching import attached
    from smoothdiag.launch.result import result_of
    from smoothdiag.launch.words import as_text

    form, root = machines.chosen_format(arguments), os.getcwd()  # before the script goes elsewhere
    with machines.stdout_kept_free(is_needed=form == "json") as stdout:
        with attached() as found:

            def said(report: Report, code: int) -> tuple[str, int]:
                found.close()
                check = result_of(found, report.steps, arguments.steps)
                words = as_text(check)
                text, entry = f"{report}\n\n{words}", check.to_dict()
                return told("launch-check", arguments, report, code, form, root, text=text, beside=words, check=entry)

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
