"""The subcommand ``smoothdiag doctor``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from smoothdiag import console
from smoothdiag.doctor.explanations import NAMES, explain

if TYPE_CHECKING:
    from smoothdiag.doctor.report import Report


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
    doctor.add_argument("--json", action="store_true", help="print the report as one line of JSON")
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

    process, is_first = os.getpid(), os.environ.get("RANK", "0") == "0"

    def tell(report: Report) -> None:
        if not is_first or os.getpid() != process:  # a process that the script forked stays silent
            return
        text = f"\n{json.dumps(report.to_dict()) if arguments.json else report}\n"
        try:
            console.flush()
            print(text, end="", flush=True)
        except BrokenPipeError:  # the reader has left, as after `| head`
            console.let_go()
        except RuntimeError:  # the signal came while the script itself was writing
            os.write(1, text.encode())

    report, code = run_script(
        arguments.script,
        arguments.args,
        is_module=arguments.is_module,
        steps=arguments.steps,
        before_termination=tell if is_first else None,
    )
    tell(report)
    if code:
        sys.exit(code)
