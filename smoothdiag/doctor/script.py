"""Running a user's script under the doctor, as Python itself would run it."""

from __future__ import annotations

import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from smoothdiag.doctor.watching import Report, watch_all


def run_script(path: str | Path, arguments: Sequence[str] = ()) -> tuple[Report, int]:
    """Runs a script unchanged, as ``python path *arguments`` would, and watches every optimizer that it makes.

    Args:
        path: The script.
        arguments: What it finds in ``sys.argv`` after its own name.

    Returns:
        The report, and the exit code that the script ends with. A traceback goes to stderr.

    Raises:
        ValueError: If there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"Parameter `script` should be a Python file. Found `{path}`.")
    argv, search, code = sys.argv, list(sys.path), 0
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.resolve().parent))
    try:
        with watch_all() as watcher:
            report = Report(watcher.observer)
            try:
                runpy.run_path(str(path), run_name="__main__")
            except SystemExit as end:
                code = _exit_code(end.code)
            except BaseException as error:
                code = 130 if isinstance(error, KeyboardInterrupt) else 1  # as shells have it for an interrupt
                traceback.print_exception(error.with_traceback(_within(error.__traceback__, str(path))))
    finally:
        sys.argv, sys.path[:] = argv, search
    return report, code


def _exit_code(code: object) -> int:
    if code is None or isinstance(code, int):
        return code or 0
    print(code, file=sys.stderr)
    return 1


def _within(trace: TracebackType | None, path: str) -> TracebackType | None:
    """Returns the traceback from the script's own frame on; all of it if the script did not even start."""
    frame = trace
    while frame is not None and frame.tb_frame.f_code.co_filename != path:
        frame = frame.tb_next
    return frame or trace
