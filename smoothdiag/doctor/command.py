"""The subcommand ``smoothdiag doctor``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any


def add_command(commands: Any) -> None:
    """Adds the subcommand to those of the command line."""
    doctor = commands.add_parser(
        "doctor", help="run a training script unchanged and name mistakes around gradient clipping, with their lines"
    )
    doctor.add_argument("--json", action="store_true", help="print the report as one line of JSON")
    doctor.add_argument("-m", dest="is_module", action="store_true", help="SCRIPT is a module, as in python -m")
    doctor.add_argument("script", metavar="SCRIPT", help="Python script that trains")
    doctor.add_argument("args", nargs=argparse.REMAINDER, metavar="...", help="arguments of the script")
    doctor.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> None:
    from smoothdiag.doctor.script import run_script

    process = os.getpid()
    report, code = run_script(arguments.script, arguments.args, is_module=arguments.is_module)
    sys.stdout.flush()
    is_first = os.environ.get("RANK", "0") == "0" and os.getpid() == process  # not what the script forked
    if is_first:
        print(f"\n{json.dumps(report.to_dict()) if arguments.json else report}")
    if code:
        sys.exit(code)
